"""The command line. Needs the extra `cli`.

It owns options, exit statuses and the words that people see. It must not know how a key is asked
or how calls are held back. Start reading in `app.py`; `run.py` runs a check with its bar,
`tables.py` prints its result.
"""

from crustcredits.cli.app import app

__all__ = ["app"]
