"""What others write beside a clip, in whatever fields they like: its labels, fold, split and group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipmill.types import NO_SPLIT, SPLIT_NAMES, SPLITS

TEXTS = ("json", "cls", "txt")
"""Extensions of what stands beside a clip, in the order that they are asked for its labels."""

_LABEL_FIELDS = ("label", "labels", "class", "classes", "category", "target", "tag", "tags", "text")
_MOST_FOLDS = 1 << 31


@dataclass(frozen=True)
class Described:
    """A clip's labels, and its split, fold and group; `strange` says what was there and could not be taken."""

    labels: tuple[str, ...] = ()
    split: str = NO_SPLIT
    fold: int | None = None
    group: str | None = None
    strange: tuple[str, ...] = ()


def described(texts: Mapping[str, bytes], classes: Sequence[str] = ()) -> Described:
    """What the texts beside a clip say of it.

    Labels are those of the first that has any: of a JSON object its first field of label, labels, class,
    classes, category, target, tag, tags and text that is not null (a text, a number, or a list of them); a
    `.cls` (a class's number or name); the lines of a `.txt`. Whole numbers become the class of that number, or their
    digits where `classes` has none. Of a JSON object also fold (a whole number), split and group.

    Args:
        texts: contents by extension, one of `TEXTS`.
        classes: names of classes by their number.
    """
    strange: list[str] = []
    labels: list[str] | None = None
    said: dict[str, Any] = {}
    if "json" in texts:
        try:
            found = json.loads(texts["json"])
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            said = found
        else:
            strange.append("a .json that is no object")
        field = next((name for name in _LABEL_FIELDS if said.get(name) is not None), None)
        if field is not None:
            labels = _labels(said[field], classes)
            if labels is None:
                strange.append(f"a field {field!r} that is neither text, number nor a list of them")
    for kind in ("cls", "txt"):
        if labels is None and kind in texts:
            lines = texts[kind].decode("utf-8", "replace").splitlines()
            lines = [line.strip() for line in lines if line.strip()]
            labels = [_named(line, classes) if kind == "cls" else line for line in lines]
    fold, group, split = (said.get(name) for name in ("fold", "group", "split"))
    if fold is not None and (type(fold) is not int or not 0 <= fold < _MOST_FOLDS):
        strange.append("a fold that is no whole number from 0 on")
        fold = None
    if group is not None and not (type(group) is int or isinstance(group, str)):
        strange.append("a group that is neither text nor a whole number")
        group = None
    known = {**SPLIT_NAMES, **{name: name for name in SPLITS}}
    if split is not None and (not isinstance(split, str) or split.lower() not in known):
        strange.append(f"a split that is none of {', '.join(SPLITS)}")
        split = None
    return Described(
        tuple(sorted(set(labels or ()))),
        NO_SPLIT if split is None else known[split.lower()],
        fold,
        None if group is None else _clean(str(group)) or None,
        tuple(strange),
    )


def _labels(value: Any, classes: Sequence[str]) -> list[str] | None:
    """A field's value as labels; None where it is nothing of the kind."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
        return None
    named = (_named(one, classes) if isinstance(one, int) else _clean(str(one).strip()) for one in values)
    return [name for name in named if name]


def _named(said: str | int, classes: Sequence[str]) -> str:
    """A class's name, where it is known by its number."""
    text = _clean(str(said))
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else len(classes)
    return classes[number] if number < len(classes) else text


def _clean(text: str) -> str:
    """Text that a table can hold: JSON may have halves of characters."""
    return text.encode("utf-8", "replace").decode()
