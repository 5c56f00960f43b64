"""Entry point of `python -m crustcredits` and of the script `crustcredits`.

It knows only the name of the command line's module. Typer and rich are optional, so nothing that
needs them is imported before `main` is called.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the extra `cli`, print one line on how to install it."""
    try:
        from crustcredits.cli import app  # noqa: PLC0415  # so that its absence is reported here
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.exit(_missing())
    app()


def _missing() -> int:
    sys.stderr.write(
        "crustcredits: typer or rich is not installed; run pip install 'crustcredits[cli]'\n"
    )
    return 2


if __name__ == "__main__":
    main()
