"""How many examples the searches of the suite try: `pytest --search few|usual|long`."""

from __future__ import annotations

extent = "usual"
_TIMES = {"few": 0.2, "usual": 1.0, "long": 50.0}


def examples(usual: int) -> int:
    """The number of examples, where `usual` is the number without an option."""
    return max(1, int(usual * _TIMES[extent]))
