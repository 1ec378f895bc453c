"""Small charts as SVG, in the colours of the page around them, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clipmill.report.markup import Html, joined, tag

_WIDTH, _HEIGHT = 420, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 8, 34
_POINTS = 300
"""Of a line: more would not be seen."""
_DOTS = 40
"""Up to so many points are drawn each."""
_SIDE, _MARGIN = 190, 30
"""Of a reliability diagram, in pixels."""


class Line(NamedTuple):
    """A line of a chart: its name, and a value at each step; what is not finite is left out."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def line_chart(title: str, lines: Sequence[Line], *, zero: bool = False, mark: float | None = None) -> Html:
    """Values over steps; `zero` begins the axis there, `mark` is a step that is marked. Empty without a value."""
    drawn = [line for line in (_thinned(line) for line in lines) if line.values]
    if not drawn:
        return Html()
    low_x, high_x = _range([x for line in drawn for x in line.steps])
    low, high = _range([y for line in drawn for y in line.values] + [0.0] * zero)

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - low_x) / (high_x - low_x) * (_WIDTH - _LEFT - _RIGHT)
        return round(across, 1), round(
            _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1
        )

    parts = [_rule(*at(low_x, y), *at(high_x, y), "grid") for y in _ticks(low, high)]
    parts += [_words(_LEFT - 6, at(low_x, y)[1] + 4, _short(y), "end") for y in _ticks(low, high)]
    parts += [
        _words(at(x, low)[0], _HEIGHT - _BOTTOM + 15, _short(x), "middle") for x in _ticks(low_x, high_x)
    ]
    parts.append(_words((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, "steps", "middle"))
    if mark is not None and low_x <= mark <= high_x:
        parts.append(_rule(*at(mark, low), *at(mark, high), "mark"))
    for n, line in enumerate(drawn):
        points = list(zip(line.steps, line.values, strict=True))
        places = " ".join("{},{}".format(*at(x, y)) for x, y in points)
        parts.append(tag("polyline", points=places, class_=f"line c{n % 5}"))
        if len(points) <= _DOTS:
            parts += [
                _dot(*at(x, y), 2.5, f"dot c{n % 5}", f"{line.name} {y:.4g} at step {x:.0f}")
                for x, y in points
            ]
    keys = [tag("span", line.name, class_=f"key c{n % 5}") for n, line in enumerate(drawn)]
    caption = tag("figcaption", tag("b", title), *(keys if len(lines) > 1 else ()))
    return tag("figure", caption, _svg(_WIDTH, _HEIGHT, title, parts))


def reliability_diagram(row: dict[str, Any]) -> Html:
    """How often a class is there, over the probability it is given, of a row of `reliability`.

    Bars and dots on the diagonal are honest probabilities; below it the network is too sure. A
    dot's area grows with the clips of its bin.
    """
    room = _SIDE - _MARGIN - 6

    def at(probability: float, share: float) -> tuple[float, float]:
        return round(_MARGIN + probability * room, 1), round(6 + (1 - share) * room, 1)

    parts = [tag("rect", x=_MARGIN, y=6, width=room, height=room, class_="frame")]
    for value in (0, 0.5, 1):
        parts.append(_words(_MARGIN - 4, at(0, value)[1] + 4, f"{value:g}", "end"))
        parts.append(_words(at(value, 0)[0], _SIDE - _MARGIN + 14, f"{value:g}", "middle"))
    parts.append(_words(at(0.5, 0)[0], _SIDE - 2, "probability", "middle"))
    most = max(found["clips"] for found in row["bins"])
    dots = []
    for found in row["bins"]:
        x, y = at(found["probability"], found["share"])
        told = (
            f"probability {found['probability']:.2f}: true for {found['share']:.0%} of {found['clips']} clips"
        )
        parts.append(tag("rect", x=x - 4, y=y, width=8, height=round(at(0, 0)[1] - y, 1), class_="share"))
        dots.append(_dot(x, y, round(2 + 5 * math.sqrt(found["clips"] / most), 1), "dot c0", told))
    parts += [_rule(*at(0, 0), *at(1, 1), "mark"), *dots]
    said = f"AP {row['ap']:.3f}, {row['clips']} clips, error {row['ece']:.3f}"
    caption = tag("figcaption", tag("b", row["label"]), said)
    return tag("figure", caption, _svg(_SIDE, _SIDE, f"reliability of {row['label']}", parts))


def _svg(width: int, height: int, title: str, parts: Sequence[Html]) -> Html:
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _dot(x: float, y: float, radius: float, kind: str, told: str) -> Html:
    return tag("circle", tag("title", told), cx=x, cy=y, r=radius, class_=kind)


def _words(x: float, y: float, text: str, anchor: str) -> Html:
    return tag("text", text, x=round(x, 1), y=round(y, 1), text_anchor=anchor)


def _thinned(line: Line) -> Line:
    """At most `_POINTS` points, each the mean of its neighbours."""
    steps, values = (np.asarray(part, np.float64) for part in line[1:])
    there = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[there], values[there]
    parts = np.array_split(np.arange(len(steps)), min(len(steps), _POINTS)) if len(steps) else []
    return Line(line.name, [float(steps[p].mean()) for p in parts], [float(values[p].mean()) for p in parts])


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0  # a single value stands in the middle
    if low == high:
        return low - room, high + room
    # An axis that can begin at 0 does so.
    return (low if low == 0 else low - room), high + room


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between the two."""
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,.6g}k"
    return f"{value:.4g}"


def charts(drawn: Sequence[Html]) -> Html:
    """Those of the charts that show anything, side by side."""
    return tag("div", joined(drawn), class_="charts")
