"""The command line. Needs the extra `cli`.

This package owns options, exit statuses and the text that people see. It must not know how a
balance is requested or how the rate limit delays calls. The demo uses the sandbox of `testing`.
Start reading in `app.py`; `run.py` runs a check with its progress bar, `tables.py` prints its
result.
"""

from crustcredits.cli.app import app

__all__ = ["app"]
