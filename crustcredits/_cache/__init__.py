"""Single-flight and kept answers.

It owns one call for each key and endpoint, its waiters, its retries, the circuit breaker and the
cache. It must not know aiohttp. Start reading in `single_flight.py`: `dispatcher.py` sends its
calls when the admission queue grants them, `store.py` and `policy.py` keep what came of them.
"""
