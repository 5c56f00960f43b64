"""Single-flight calls and the cache of their answers.

Owns one call for each key and endpoint, its waiters and retries, the circuit breaker and the cache.
Must not know aiohttp. Start reading in `single_flight.py`. `dispatcher.py` sends its calls when the
admission queue grants them; `store.py` holds the cache entries, and `policy.py` says how old they
may be.
"""
