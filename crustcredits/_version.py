"""The version, the only copy: the package, the wheel and the `user-agent` header read it here."""

__version__ = "0.1.0"
