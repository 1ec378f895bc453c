"""Facts about datasets, as TOML: titles, homepages, sizes, licences, citations, classes."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def facts(name: str) -> dict[str, Any]:
    """The facts of one dataset.

    Raises:
        KeyError: no such dataset.
    """
    file = files(__name__) / f"{name}.toml"
    if not file.is_file():
        raise KeyError(name)
    return tomllib.loads(file.read_text(encoding="utf-8"))


def names() -> list[str]:
    """The datasets that have facts, sorted."""
    return sorted(
        file.name.removesuffix(".toml") for file in files(__name__).iterdir() if file.name.endswith(".toml")
    )
