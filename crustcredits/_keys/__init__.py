"""API keys.

It owns the secret, its name and its account, where keys come from, and which text is no key. It
must not know the API. Start reading in `api_key.py`.
"""
