"""API keys.

The package owns the secret, its name and account, pools and sources of keys, and the checks of key
text. It must not know the API. Start reading in `api_key.py`.
"""
