"""`GrantedTokens`: the tokens of one bucket that Redis granted to this process, and their reports.

A token is unused first, then taken by an attempt, then out until its return. Tokens are alike but
for the reserve that they leave: of the tokens for a call, the one granted first is used first,
and the one used first ends first. No I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import attrs

from crustcredits.redis.local_tokens import FRESH


@attrs.frozen(kw_only=True)
class Granted:
    """One token.

    Attributes:
        number: Its number, unique within the process.
        at: When its lease began.
        is_own: Whether the process granted it by itself, in degraded mode.
        kept: How many tokens the call leaves for which it was asked.
    """

    number: int
    at: float
    is_own: bool = False
    kept: int = 0


class GrantedTokens:
    """The tokens of one bucket.

    Args:
        lease: Seconds after its grant at which Redis takes back a token without a report.

    Attributes:
        unused: The tokens that no attempt has taken, in the order of their grants.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self.unused: deque[Granted] = deque()
        self._taken: deque[Granted] = deque()
        self._ended: deque[tuple[int, float]] = deque()  # number and return time
        self._unreported: list[tuple[int, float]] = []  # of these, those to report
        self._given_back: list[Granted] = []
        # How many of these are in the message under way.
        self._in_message: tuple[int, int] = (0, 0)

    # --- use

    def free(self, kept: int) -> int:
        """How many tokens calls may take that leave `kept` tokens."""
        return sum(token.kept >= kept for token in self.unused) if kept else len(self.unused)

    def grant(self, numbers: range, at: float, kept: int) -> None:
        """Add tokens that Redis granted."""
        self.unused.extend(Granted(number=number, at=at, kept=kept) for number in numbers)

    def take_first(self) -> None:
        """Let an attempt take the token that was granted first."""
        self._taken.append(self.unused.popleft())

    def take_for(self, kept: int) -> None:
        """Let an attempt take a token.

        Its call leaves `kept` tokens. A token that was asked for by a call that leaves fewer is
        used last.
        """
        if len(self.unused) == 1:  # the usual case, at little cost
            self.take_first()
            return
        token = min(self.unused, key=lambda each: (each.kept < kept, each.kept, each.at))
        self.unused.remove(token)
        self._taken.append(token)

    def take_own(self, number: int, now: float) -> None:
        """Let an attempt take a token of this process in degraded mode."""
        self._taken.append(Granted(number=number, at=now, is_own=True))

    def end(self, when: float, *, is_reported: bool) -> None:
        """End one attempt; its token returns at `when`."""
        ended = self._taken.popleft().number, when
        self._ended.append(ended)
        if is_reported:
            self._unreported.append(ended)

    def give_back_taken(self, *, is_known: bool) -> bool:
        """End one attempt that the server does not count. Returns whether Redis must know."""
        return self._give_back(self._taken.popleft(), is_known=is_known)

    def give_back_unused(self, *, is_known: bool) -> bool:
        """Give back the token that was granted first. Returns whether Redis must know."""
        return self._give_back(self.unused.popleft(), is_known=is_known)

    def give_back_lost(self, numbers: range, at: float) -> None:
        """Give back tokens that a lost message may have brought."""
        self._given_back += [Granted(number=number, at=at) for number in numbers]

    # --- state

    def forget_returned(self, now: float) -> None:
        """Forget the tokens whose return time has come."""
        while self._ended and self._ended[0][1] <= now:
            self._ended.popleft()

    def has_expired(self, now: float) -> bool:
        """Whether the token that was granted first may not be used any more."""
        return bool(self.unused) and now - self.unused[0].at > FRESH

    @property
    def has_reports(self) -> bool:
        """Whether there are returns and unused tokens that Redis does not know of."""
        return bool(self._unreported or self._given_back)

    @property
    def is_empty(self) -> bool:
        """Whether no token is out, and none is to be given back."""
        return not (self.unused or self._taken or self._ended or self._given_back)

    # --- reports

    def begin_report(self, now: float) -> None:
        """Note that the message under way reports the present state."""
        self._given_back = [token for token in self._given_back if now < token.at + self._lease]
        self._in_message = len(self._unreported), len(self._given_back)

    def returns(self, now: float, *, all_tokens: bool) -> list[tuple[int, float]]:
        """Numbers of tokens, and the seconds until their return; of all that are out on demand."""
        homes: Sequence[tuple[int, float]] = self._unreported
        if all_tokens:
            under_way = (*self.unused, *self._taken)
            leased = [(token.number, token.at + self._lease) for token in under_way]
            homes = [*self._ended, *leased]
        return [(number, home - now) for number, home in homes]

    def given_back(self) -> list[int]:
        """Numbers of tokens that are not out any more."""
        return [token.number for token in self._given_back]

    def reported(self) -> None:
        """Note that Redis has received the report."""
        ended, given_back = self._in_message
        del self._unreported[:ended], self._given_back[:given_back]

    def forget_reports(self) -> None:
        """Forget the returns to report: all tokens will be registered again."""
        self._unreported.clear()

    def _give_back(self, token: Granted, *, is_known: bool) -> bool:
        # Redis does not know a token that this process granted by itself and has not registered.
        must_know = is_known or not token.is_own
        if must_know:
            self._given_back.append(token)
        return must_know
