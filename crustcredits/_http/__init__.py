"""One request to the API.

The package owns the protocol, the addresses of the API and its proxy, the transport over aiohttp,
and the retry decision. It must not know the cache, the admission queue or the client. Start reading
in `protocol.py`, which does no I/O; `transport.py` is the core's only importer of aiohttp.
"""
