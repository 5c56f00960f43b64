"""Token buckets that several processes share, counted in Redis. Needs the extra `redis`.

It owns the messages, the script, and counting alone while Redis is out of reach. It must not know
calls, keys or HTTP. Start reading in `shared_tokens.py`, which does no I/O; `coordinator.py` sends
its messages, `exchange.lua` answers them.
"""

from crustcredits.redis.buckets import RedisBuckets

__all__ = ["RedisBuckets"]
