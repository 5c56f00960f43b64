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
# Seconds without an answer before a process counts by itself (degraded mode). Until then all calls
# wait: requests that it sends while Redis still serves the others are in addition to theirs.
GRACE: Final = 2.5
# It has also sent a message after so many seconds without an answer that had none either, so Redis
# was out of reach for at least as long.
LEAST_OUTAGE: Final = 2.0
# Seconds without a process that had an answer after which others may be in degraded mode: their
# last message may have been under way for as long as the patience when the outage began.
STILL: Final = GRACE - PATIENCE
# Most seconds between two messages of a strict process, and seconds without one after which the
# other processes leave its share to it.
QUIET: Final = 2.0
SILENCE: Final = 2.5 * QUIET
