"""Credits left on each of your Crustdata API keys, from asyncio, within the API's rate limit."""

from crustcredits._cache.policy import CacheOptions
from crustcredits._client import CreditsClient
from crustcredits._errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BackendUnavailableError,
    BadRequestError,
    ClientClosedError,
    ConfigurationError,
    CrustCreditsError,
    GatewayError,
    InternalServerError,
    InvalidKeyError,
    MissingKeyError,
    PaymentRequiredError,
    PermissionDeniedError,
    RateLimitError,
    RateLimitWaitError,
    UnexpectedResponseError,
)
from crustcredits._http.retry import Retry
from crustcredits._keys.api_key import ApiKey, KeyLike, UnusableKey
from crustcredits._keys.key_pool import KeysLike
from crustcredits._keys.sources import (
    keys_from_env,
    keys_from_file,
    keys_from_records,
    keys_from_text,
)
from crustcredits._models import Account, Balance, Known, Outcome, Source, State, Unknown
from crustcredits._rate_limit_status import RateLimitStatus
from crustcredits._ratelimit.config import RateLimit, Scope
from crustcredits._ratelimit.quota import Quota
from crustcredits._report import (
    CreditsRequirementError,
    CreditsUnknownError,
    InsufficientCreditsError,
    Report,
)
from crustcredits._validation import Seconds
from crustcredits._version import __version__

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "Account",
    "ApiKey",
    "AuthenticationError",
    "BackendUnavailableError",
    "BadRequestError",
    "Balance",
    "CacheOptions",
    "ClientClosedError",
    "ConfigurationError",
    "CreditsClient",
    "CreditsRequirementError",
    "CreditsUnknownError",
    "CrustCreditsError",
    "GatewayError",
    "InsufficientCreditsError",
    "InternalServerError",
    "InvalidKeyError",
    "KeyLike",
    "KeysLike",
    "Known",
    "MissingKeyError",
    "Outcome",
    "PaymentRequiredError",
    "PermissionDeniedError",
    "Quota",
    "RateLimit",
    "RateLimitError",
    "RateLimitStatus",
    "RateLimitWaitError",
    "Report",
    "Retry",
    "Scope",
    "Seconds",
    "Source",
    "State",
    "UnexpectedResponseError",
    "Unknown",
    "UnusableKey",
    "__version__",
    "keys_from_env",
    "keys_from_file",
    "keys_from_records",
    "keys_from_text",
]
