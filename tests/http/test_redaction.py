"""The server's text without the secret, and fit for a log line."""

from __future__ import annotations

import json

from crustcredits import Account, ApiKey
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.protocol import Response, read_response
from tests.http.responses import KEY, NOW, account, error, read


def test_a_secret_echoed_by_the_server_is_masked() -> None:
    """In values and names, URL-quoted and in another case."""
    echo = KEY.get_secret_value()
    found = account(
        api_key=echo,
        wallets=[{f"of {echo}": [echo.upper()]}],
        recurring_credits_frequency=f"x{echo}",
        credit_topups=[1],
    )
    assert "sk-0123456789" not in repr(found).lower()
    assert found.extra == {"api_key": "***"}
    foreign = read_response(
        USER_CREDITS,
        KEY,
        Response(403, {}, f'{{"message": "é {echo.upper()}"}}'.encode()),
        now=NOW,
        period=60.0,
    )
    assert "***" in str(foreign)
    assert echo not in str(foreign).lower()
    quoted = ApiKey("sk/0123456789+x", name="prod")
    refused = read_response(
        USER_CREDITS,
        quoted,
        Response(403, {}, b'{"message": "SK%2F0123456789%2bX"}'),
        now=NOW,
        period=60.0,
    )
    assert "prod: the plan or the key's rights do not allow the request (***); " in str(refused)


def test_a_message_of_the_server_is_made_fit_for_a_log_line() -> None:
    """It is one bounded line, and an echoed secret is masked."""
    said = json.dumps({"message": "bad key sk-0123456789\n\x1b[31m" + "x" * 1000})
    found = error(said, status=401, x_request_id="r sk-0123456789")
    assert "sk-0123456789" not in str(found) + str(found.request_id)
    assert "bad key ***" in str(found)
    assert str(found).isprintable()
    assert len(found.message) <= 400
    assert found.request_id == "r ***"
    assert error("{}", status=401, x_request_id="\x00 \x01").request_id is None


def test_a_lone_surrogate_is_replaced() -> None:
    """No encoding could write it, and the balance is kept."""
    found = read(
        '{"account": {"credits": 1, "plan\\ud800": "a\\udfffb", "wallets": ["\\ud83d\\ude00"]}}',
        path=ACCOUNT_CREDITS,
    )
    assert isinstance(found, Account)
    assert found.extra == {"plan\ufffd": "a\ufffdb"}
    assert found.wallets == ["\U0001f600"]
    json.dumps(found.to_dict(), ensure_ascii=False).encode()
