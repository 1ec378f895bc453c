"""What is wrong with one row of one of AudioSet's lists, in words. Only bad rows come here, one by one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from clipmill.datasets.label_table import LabelTable

YTID = "[A-Za-z0-9_-]{11}"
"""A YouTube video's id."""

SPREADSHEET = r'^"?#[^\s,"]+'
"""What a spreadsheet leaves of an id that starts with `-`, which it takes for a formula: #NAME?, #NOM?, #WERT! ..."""

LONGEST_S = 12 * 3600
"""No video of the lists is longer, in seconds: beyond it, a time is milliseconds or another column."""

LONGEST_CLIP_S = 3600
"""No clip of such a list is longer, in seconds: beyond it, its times are milliseconds."""

SEGMENT = 'YTID, start_seconds, end_seconds, "label ids", such as --PJHxphWEs, 30.000, 40.000, "/m/09x0r"'
EVENT = "YTID_startms, start_seconds, end_seconds, label id, with tabs between"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read: its line in the file (from 1), and what is wrong with it."""

    line: int
    message: str


def bad_segment(text: str, labels: LabelTable | None, last: bool) -> str:
    """What is wrong with a row of a list of segments; `last`: it is the file's last."""
    if problem := _damaged(text, text.count('"') == 1, last):
        return problem
    fields = [field.strip() for field in text.split(",", 3)]
    if len(fields) < 4:
        cut = ": the line is cut short" if last else ""
        return f"{len(fields)} column{'s' * (len(fields) > 1)}, not 4{cut} ({_quoted(text)})"
    ytid, start, end, rest = fields
    if not re.fullmatch(YTID, ytid):
        if any(re.fullmatch(YTID, field.strip('"')) for field in (start, end, rest)):
            return f"the columns are shifted: the first is {_quoted(ytid)}, no id"
        return f"the id is {_quoted(ytid)} ({len(ytid)} characters), not 11 letters, digits, '-' and '_'"
    if problem := _times(start, end, strict=True):
        return problem
    if '""' in rest and rest.strip('" '):
        return f"the quotes around the labels are doubled, as a spreadsheet saves them: {_quoted(rest)}"
    if '"' not in rest and "," in rest:
        return f"the labels lost their quotes, so that their commas part columns: {_quoted(rest)}"
    if not re.fullmatch('"[^"]*"|/[^",]*', rest):
        return f"the labels are {_quoted(rest)}"
    return _unknown(rest, labels) or _quoted(text)


def bad_event(text: str, labels: LabelTable, last: bool) -> str:
    """What is wrong with a row of a list of strong labels; `last`: it is the file's last."""
    if problem := _damaged(text, False, last):
        return problem
    fields = [field.strip() for field in text.split("\t")]
    if len(fields) != 4:
        cut = ": the line is cut short" if last and len(fields) < 4 else ""
        return f"{len(fields)} column{'s' * (len(fields) > 1)}, not 4{cut} ({_quoted(text)})"
    segment, start, end, label = fields
    if not re.fullmatch(YTID + r"_\d{1,8}", segment):
        return f"the segment is {_quoted(segment)}, not an id of 11 characters, '_' and milliseconds"
    return _times(start, end, strict=False) or _unknown(label, labels) or _quoted(text)


def _damaged(text: str, lone_quote: bool, last: bool) -> str | None:
    if "\ufffd" in text:
        return f"bytes that are not UTF-8 ({_quoted(text)})"
    if found := re.match(SPREADSHEET, text):
        return (
            f"{found.group().strip(chr(34))} in place of the id: a spreadsheet took an id that starts with '-' "
            "for a formula, and the id is lost; take the list as it was published"
        )
    if lone_quote:
        return f"{'the line is cut short' if last else 'a quote is never closed'} ({_quoted(text)})"
    return None


def _times(start: str, end: str, strict: bool) -> str | None:
    for name, text in (("start", start), ("end", end)):
        if re.fullmatch(r"-\d+(\.\d*)?", text):
            return f"the {name} is negative ({text} s)"
        if not re.fullmatch(r"\d+(\.\d+)?", text):
            return f"the {name} is {_quoted(text)}, not a number of seconds"
    if float(end) < float(start) or (strict and float(end) == float(start)):
        return f"it ends at {end} s, not after its start at {start} s"
    if float(end) - float(start) > LONGEST_CLIP_S and strict:
        return f"it lasts from {start} to {end} s, over an hour: are these milliseconds?"
    if float(end) > LONGEST_S:
        return f"it ends at {end} s, and no video is over 12 hours: are these milliseconds?"
    return None


def _unknown(field: str, labels: LabelTable | None) -> str | None:
    ids = [label.strip() for label in field.strip('" ').split(",")]
    if not any(ids):
        return "it has no label"
    unknown = [label for label in ids if labels is not None and label not in labels.names]
    if not unknown or labels is None:
        return None
    return (
        f"unknown label id{'s' * (len(unknown) > 1)} {', '.join(map(_quoted, unknown[:3]))}; expected the "
        f"{len(labels.names)} ids of {labels.path.name} (another table: --label-table)"
    )


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
