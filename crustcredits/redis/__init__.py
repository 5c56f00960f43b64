"""Token buckets shared by several processes and counted in Redis. Needs the extra `redis`.

This package owns the messages, the script and degraded mode. Of calls it knows only how many wait;
it must not know keys or HTTP.
Start reading in `shared_tokens.py`, which does no I/O, and `bucket_messages.py`. `coordinator.py`
sends the messages in the form of `protocol.py`, and `exchange.lua` answers them. `window.py` keeps
requests few. `outage.py` has the reaction to a missing answer: in degraded mode a process counts by
itself, for its share. Processes may also share answers: see `shared_answers.py` and `answers.lua`.
`lease.py` is apart from them: it makes one process the leader.
"""

try:
    from crustcredits.redis.backend import RedisBackend
    from crustcredits.redis.lease import Lease
except ModuleNotFoundError as _missing:
    if (_missing.name or "").partition(".")[0] != "redis":
        raise
    raise ImportError(
        "crustcredits.redis needs redis-py, which is not installed; install the extra "
        "crustcredits[redis]"
    ) from _missing

__all__ = ["Lease", "RedisBackend"]
