"""When a request may start.

This package owns the admission queue, the tokens, the cooldowns and the pace. Of HTTP it knows only
the status of an answer; it must not know the cache or the client. It does no I/O and never waits.

Start reading in `scheduler.py`: it takes a token of each bucket, the pace and a connection slot in
the moment in which a request starts, so nothing is held while something else is awaited.
"""
