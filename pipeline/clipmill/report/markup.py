"""Pages of one file: everything inline, nothing fetched, and what the user's data say always escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""A browser that obeys it fetches nothing for the page, whatever is in it."""


_VOID = ("br", "img", "meta")
"""Elements without content, which no end tag closes."""


class Html(str):
    """Text that is HTML already; any other is escaped where it goes into a page."""

    __slots__ = ()


def html(value: Any) -> Html:
    """A value as HTML: escaped, unless it is `Html`; None as a dash."""
    if isinstance(value, Html):
        return value
    return Html("–" if value is None else escape(str(value)))  # noqa: RUF001 - a dash for people


def tag(name: str, *content: Any, **attributes: Any) -> Html:
    """An element; attributes that are None are left out, and `class_` is class, `data_v` data-v."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{said}>" if name in _VOID else f"<{name}{said}>{joined(content)}</{name}>")


def joined(parts: Iterable[Any]) -> Html:
    """The parts one after the other."""
    return Html("".join(map(html, parts)))


class Section(NamedTuple):
    """A part of a page, to which the page's own links lead by its title."""

    title: str
    content: Html


def section(title: str, *content: Any, hint: str | None = None, half: bool = False) -> Section:
    """A part of the page under its heading; one that is `half` shares the width with the next."""
    said = tag("p", hint, class_="hint") if hint else ""
    kind = "half" if half else None
    return Section(title, tag("section", tag("h2", title), said, *content, id=_anchor(title), class_=kind))


def number(value: float | None, digits: int = 3) -> str | None:
    """A figure as people read it."""
    return None if value is None else f"{value:.{digits}f}"


def cell(value: Any, *, key: float | str | None = None, part: float | None = None) -> Html:
    """A cell of a table: `key` is what it is sorted by, `part`, 0 to 1, draws a bar behind it."""
    bar = {} if part is None else {"class_": "bar", "style": f"--v:{min(max(part, 0.0), 1.0):.3f}"}
    return tag("td", value, data_v=key, **bar)


def figure_cell(value: float | None, digits: int = 3, *, bar: bool = False) -> Html:
    """A cell of a figure, sorted by its value; nothing stands in it where it does not exist."""
    key = None if value is None else repr(float(value))
    return cell(number(value, digits), key=key, part=value if bar else None)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, sortable: bool = False, texts: int = 1
) -> Html:
    """A table whose first `texts` columns are texts and the others numbers; cells may be made by `cell`."""
    heads = [
        tag(
            "th",
            tag("button", name, type="button") if sortable else name,
            class_="text" if n < texts else None,
        )
        for n, name in enumerate(columns)
    ]
    lines = []
    for row in rows:
        cells = [value if _is_cell(value) else cell(value) for value in row]
        # The first columns are read from the left.
        marked = [
            Html(c.replace("<td", '<td class="text"', 1))
            if n < texts and " class=" not in c.partition(">")[0]
            else c
            for n, c in enumerate(cells)
        ]
        lines.append(tag("tr", *marked))
    body = tag(
        "table",
        tag("thead", tag("tr", *heads)),
        tag("tbody", *lines),
        class_="sortable" if sortable else None,
    )
    return tag("div", body, class_="scroll")


def facts(pairs: Iterable[tuple[str, Any]]) -> Html:
    """Names and what they stand for, in columns."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs))


def data_uri(kind: str, data: bytes) -> str:
    """Bytes of a media type, such as image/png, as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def page(title: str, header: Html, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole file, which is UTF-8 whatever names are in it; `notes` are what the reader should know first."""
    links = [tag("a", part.title, href=f"#{_anchor(part.title)}") for part in sections]
    remarks = tag("ul", *(tag("li", note) for note in notes), class_="notes") if notes else ""
    style, script = (
        Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', title)}\n<style>\n{style}</style>"
    )
    body = "\n".join(
        [header, tag("nav", *links), remarks, "<main>", *(part.content for part in sections), "</main>"]
    )
    whole = (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n{body}\n<script>\n{script}</script>\n</body>\n</html>\n"
    )
    return as_utf8(whole)


def as_utf8(text: str) -> str:
    """A text in which what UTF-8 cannot hold, such as a file's name in Latin-1, is escaped."""
    return text.encode(errors="backslashreplace").decode()


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def _is_cell(value: Any) -> bool:
    return isinstance(value, Html) and value.startswith("<td")
