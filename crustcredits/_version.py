"""The only copy of the version: the package, the wheel and the `user-agent` header use it."""

__version__ = "0.1.0"
