"""Pydantic models of a service's answers, made from this library's models by their attributes.

They know keys by their labels only.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    computed_field,
    model_validator,
)

from crustcredits._errors import CrustCreditsError
from crustcredits._keys.api_key import ApiKey, UnusableKey
from crustcredits._models import Source, State, credits_text, plain
from crustcredits._report import Report
from crustcredits.fastapi.problem_details import problem_of


def _label_of(key: object) -> object:
    return key.label if isinstance(key, (ApiKey, UnusableKey)) else key


def _problem_of(error: object) -> object:
    return problem_of(error) if isinstance(error, CrustCreditsError) else error


_CREDITS_SCHEMA = {
    "type": "string",
    "pattern": r"^-?\d+(\.\d+)?$",
    "description": "Credits, exact to the last digit.",
}

KeyName: TypeAlias = Annotated[str, BeforeValidator(_label_of)]
Credits: TypeAlias = Annotated[
    Decimal, PlainSerializer(credits_text, return_type=str), WithJsonSchema(_CREDITS_SCHEMA)
]
Utc: TypeAlias = Annotated[AwareDatetime, AfterValidator(lambda time: time.astimezone(UTC))]
CheckedAt: TypeAlias = Annotated[Utc, Field(description="When this became known, in UTC.")]
AccountName: TypeAlias = Annotated[
    str | None, Field(validation_alias=AliasChoices(AliasPath("key", "account"), "account"))
]
Plain: TypeAlias = Annotated[Any, BeforeValidator(plain)]


class _Response(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(
        from_attributes=True, validate_by_name=True, frozen=True
    )


class _Dated(_Response):
    if TYPE_CHECKING:
        checked_at: datetime  # each subclass places it among its fields

    @computed_field(description="Seconds since `checked_at`.")  # type: ignore[prop-decorator]  # mypy knows no such property
    @property
    def age(self) -> float:
        """Seconds since `checked_at`."""
        return round(max(0.0, (datetime.now(UTC) - self.checked_at).total_seconds()), 3)


class ErrorResponse(_Response):
    """The reason why a key has no balance, or no newer one."""

    type: str
    title: str


class BalanceResponse(_Dated):
    """The credits of one key, made from a `Balance`."""

    key: KeyName
    account: AccountName = None
    credits: Credits
    checked_at: CheckedAt
    stale: Annotated[bool, Field(description="Whether it is older than requested.")]

    model_config: ClassVar[ConfigDict] = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "key": "prod",
                    "account": "acme",
                    "credits": "138940.37",
                    "checked_at": "2026-09-01T12:00:00Z",
                    "stale": False,
                    "age": 1.25,
                }
            ]
        }
    )


class AccountResponse(BalanceResponse):
    """The account behind one key, made from an `Account`."""

    recurring_credits: Credits | None = None
    recurring_credits_frequency: str | None = None
    recurring_credits_refresh_date: Utc | None = None
    credit_rollover: bool | None = None
    wallets: Plain = None
    credit_topups: Plain = None
    extra: Annotated[dict[str, Any], BeforeValidator(plain)] = Field(default_factory=dict)


class KeyResponse(_Dated):
    """The outcome of checking one key, made from an `Outcome`."""

    key: KeyName
    account: AccountName = None
    state: Annotated[
        State,
        Field(
            description=(
                "`stale`: older than requested. `failed`: the credits are unknown, not zero."
            )
        ),
    ]
    credits: Credits | None
    checked_at: CheckedAt
    source: Source
    error: Annotated[ErrorResponse | None, BeforeValidator(_problem_of)] = None

    model_config: ClassVar[ConfigDict] = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "key": "prod",
                    "account": "acme",
                    "state": "fresh",
                    "credits": "138940.37",
                    "checked_at": "2026-09-01T12:00:00Z",
                    "source": "cached",
                    "error": None,
                    "age": 1.25,
                }
            ]
        }
    )


class PoolResponse(_Response):
    """The outcomes of a pool, made from a `Report`. Unknown credits are null, never 0."""

    ok: Annotated[bool, Field(description="Whether every key listed has a balance.")]
    succeeded: int
    failed: int
    stale: int
    total_credits: Annotated[
        Credits | None,
        Field(
            description="Of the keys listed, each declared account once; null where none is known."
        ),
    ]
    accounts: dict[str, Credits | None]
    lookalikes: Annotated[list[list[str]], Field(description="Undeclared keys with equal answers.")]
    keys: list[KeyResponse]

    @model_validator(mode="before")
    @classmethod
    def _of_report(cls, report: object) -> object:
        if not isinstance(report, Report):
            return report
        return {
            "ok": report.ok,
            "succeeded": len(report.succeeded),
            "failed": len(report.failed),
            "stale": len(report.stale),
            "total_credits": report.total_credits,
            "accounts": report.accounts,
            "lookalikes": [[outcome.key.label for outcome in group] for group in report.lookalikes],
            "keys": list(report),
        }


class HealthResponse(_Response):
    """The state of a pool according to the cache."""

    status: Annotated[
        Literal["ok", "degraded", "unknown"],
        Field(
            description=(
                "`ok`: every balance is known and recent. `degraded`: not all are, or Redis is out "
                "of reach. `unknown`: no balance is known."
            )
        ),
    ]
    keys: Annotated[int, Field(description="Keys in the pool.")]
    known: Annotated[int, Field(description="Keys with a balance, however old.")]
    reasons: list[str]

    model_config: ClassVar[ConfigDict] = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "status": "degraded",
                    "keys": 2,
                    "known": 1,
                    "reasons": ["dev: The credits API does not know the key"],
                }
            ]
        }
    )


class ProblemResponse(BaseModel):
    """A problem document of RFC 9457."""

    type: str
    title: str
    status: int
    key: str | None = None
    retry_after: int | None = None

    model_config: ClassVar[ConfigDict] = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:crustcredits:APITimeoutError",
                    "title": "The credits API did not answer in time",
                    "status": 504,
                }
            ]
        }
    )
