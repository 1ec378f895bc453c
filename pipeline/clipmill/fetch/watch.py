"""Who is told how a fetch goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _nothing(*_: Any) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Watch:
    """`update(done, facts)` after each step of what `total(what, count, unit)` began; `say(line)` for what stays.

    Without arguments: tells nobody.
    """

    total: Callable[[str, int, str], None] = _nothing
    update: Callable[[int, str], None] = _nothing
    say: Callable[[str], None] = _nothing


QUIET = Watch()
