"""When a request may start.

Must not know HTTP, the cache or the client. It does no I/O and never waits.

`scheduler` is the one admission queue. It takes a token of each bucket, the pace and a connection
slot in the moment in which a request starts, so nothing is held while something else is awaited.
"""
