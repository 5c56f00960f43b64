"""When a request may start.

Must not know HTTP, the cache or the client. Every decision is a function of values.

`scheduler` is the one admission queue. It takes a token of each bucket, the pace and a connection
slot in the moment in which a request starts, so nothing is held while something else is awaited.
"""
