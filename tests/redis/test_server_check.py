"""Mistakes of a server that the user corrects."""

from __future__ import annotations

import re
from importlib.resources import files

from redis.exceptions import NoPermissionError

from crustcredits.redis.server_check import mistake


def test_a_user_without_rights_is_told_all_commands_of_the_scripts() -> None:
    scripts = "".join(
        files("crustcredits.redis").joinpath(name).read_text(encoding="utf-8")
        for name in ("answers.lua", "exchange.lua", "lease.lua")
    )
    commands = set(re.findall(r"redis\.p?call\(\s*'(\w+)'", scripts))
    assert len(commands) > 15
    told = str(mistake(NoPermissionError("no")))
    assert commands | {"EVALSHA", "EVAL", "HGET"} <= set(re.findall("[A-Z]+", told))
