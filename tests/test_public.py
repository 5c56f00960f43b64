"""Public means listed, documented and typed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import metadata

import pytest

import crustcredits
import crustcredits.fastapi
import crustcredits.redis
import crustcredits.testing


def test_public_names_are_listed_and_sorted() -> None:
    """`__all__` equals the names of the package."""
    held = [
        name
        for name, value in vars(crustcredits).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    assert crustcredits.__all__ == sorted([*held, "__version__"])


@pytest.mark.parametrize(
    "module", [crustcredits, crustcredits.testing, crustcredits.fastapi, crustcredits.redis]
)
def test_public_names_are_documented(module: object) -> None:
    """Every class, function and public method has a docstring."""
    for name in vars(module)["__all__"]:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue  # the version, and names for unions of types
        assert inspect.getdoc(value), name
        for part, member in vars(value).items() if inspect.isclass(value) else ():
            if not part.startswith("_") and (
                inspect.isfunction(member) or isinstance(member, property)
            ):
                assert inspect.getdoc(member), f"{name}.{part}"


def test_the_version_is_that_of_the_installed_package() -> None:
    """One module holds it."""
    assert metadata.version("crustcredits") == crustcredits.__version__


def test_importing_the_package_loads_no_optional_part() -> None:
    """A service pays only for the parts that it imports."""
    ours = [
        "crustcredits.testing",
        "crustcredits.fastapi",
        "crustcredits.redis",
        "crustcredits.cli",
    ]
    heavy = ["typer", "rich", "pytest", "fastapi", "pydantic", "redis", *ours]
    code = f"import sys, crustcredits; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20
    )
    assert result.stdout.strip() == "[]"
