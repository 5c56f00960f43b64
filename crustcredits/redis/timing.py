"""Seconds and sizes on which the parts of this package agree."""

from __future__ import annotations

from typing import Final

# Most seconds between two messages while a call waits or tokens are out; a lost count is noticed
# within this time.
BEAT: Final = 0.5
# Most buckets in one message.
BUCKETS: Final = 64
# Seconds that one Redis call may take.
PATIENCE: Final = 1.0
# Seconds without a message of any process after which Redis may have been out of reach of all.
STILL: Final = 2 * BEAT
# Most seconds between two messages of a strict process, and seconds without one after which the
# other processes leave its share to it.
QUIET: Final = 2.0
SILENCE: Final = 2.5 * QUIET
