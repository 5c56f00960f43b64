"""The version, in one place: the package, the wheel and the `user-agent` header all read it here."""

__version__ = "0.1.0"
