"""Single-flight calls and the cache of their answers.

Owns one call for each key and endpoint, its waiters and retries, the circuit breaker and the cache.
Must not know aiohttp. Start reading in `lookup.py`: the answer for a key, from a cache entry
(`store.py`, `cache_entry.py`) or from a call that all callers share (`single_flight.py`).
`dispatcher.py` sends the calls that the admission queue grants.
"""
