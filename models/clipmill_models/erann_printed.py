"""What ERANN's papers print of it: parameters, multiply-adds, and clips a second on a Tesla V100."""

from __future__ import annotations

from collections.abc import Iterator

from clipmill_models.base import Printed

_JOURNAL_SPEEDS = {
    "2-4": (137, 246), "2-5": (96, 149), "0-6": (53, 74), "1-6": (71, 108), "2-6": (82, 124), "3-6": (79, 128),
}  # fmt: skip
"""Audios a second at B = 1 and B = 32, 10 s clips on a Tesla V100: the journal's Table 4."""

_ESC50_SPEEDS = {
    "0-3": 421, "1-3": 583, "0-4": 300, "1-4": 428, "2-4": 482, "2-5": 294, "0-6": 150, "1-6": 218, "2-6": 245,
}  # fmt: skip
"""The same at B = 32, for 5 s clips and 50 classes: Table 6."""

_JOURNAL_MILLIONS = {
    ("Table 4", 527): "2-4 24.5, 2-5 38.2, 0-6 54.4, 1-6 54.5, 2-6 54.9, 3-6 56.5",
    ("Table 6", 50): "0-3 13.5, 1-3 13.6, 0-4 24.0, 1-4 24.1, 2-4 24.3, 2-5 37.9, 0-6 54.1, 1-6 54.2, 2-6 54.6",
    ("Table 8", 10): "0-3 13.5, 1-3 13.5, 0-4 24.0, 1-4 24.1, 2-4 24.2, 2-5 37.9, 0-6 54.0, 1-6 54.1, 2-6 54.5",
    ("Table 9", 8): "1-3 13.5, 0-4 24.0, 1-4 24.1, 2-4 24.2, 2-5 37.9, 0-6 54.0, 1-6 54.1, 2-6 54.5",
}  # fmt: skip
"""Millions of parameters that the journal prints: (table, classes) -> networks. Table 7 repeats some of Table 6's."""

_PREPRINT_TABLE_4 = {
    "8x4-4": ("24,504,849", "26.21"), "8x4-5": ("38,198,545", "40.93"), "8x1-6": ("54,435,473", "126.56"),
    "8x2-6": ("54,532,241", "77.18"), "8x4-6": ("54,919,313", "58.92"), "8x8-6": ("56,467,601", "52.99"),
}  # fmt: skip
"""Parameters, and 10^9 multiply-adds of a 10 s clip."""

_MULTIPLY_ADDS_DIFFER = {
    "8x4-4": "26.204 by the rule that gives the others",
    "8x1-6": "126.538 by the rule that gives the others",
    "8x8-6": "52.9987, printed cut off",
}

_SLIDES_AT_8_S = {
    "8x1-6": "101.231", "8x2-6": "61.745", "8x4-6": "47.137", "8x8-6": "42.399", "8x4-5": "32.743", "8x4-4": "20.964",
}  # fmt: skip
"""10^9 multiply-adds of an 8 s clip: Table XII of the authors' earlier slides, where the network is called RANN."""


def preprint_figures() -> Iterator[Printed]:
    """Those of the preprint, and of the slides before it."""
    for size, (parameters, giga) in _PREPRINT_TABLE_4.items():
        yield Printed(f"erann-{size}", parameters, "parameters", "preprint, Table 4")
        note = _MULTIPLY_ADDS_DIFFER.get(size, "")
        yield Printed(f"erann-{size}", f"{giga} G", "multiply-adds", "preprint, Table 4", note=note)
    for size, giga in _SLIDES_AT_8_S.items():
        yield Printed(f"erann-{size}", f"{giga} G", "multiply-adds", "RANN slides, Table XII", seconds=8.0)
    # There as RANN-4x4-6, which is the same network.
    yield Printed("erann-8x4-6", "23.569 G", "multiply-adds", "RANN slides, Table XII", seconds=4.0)


def journal_figures() -> Iterator[Printed]:
    """Those of the journal paper."""
    for (table, classes), row in _JOURNAL_MILLIONS.items():
        for entry in row.split(", "):
            size, millions = entry.split()
            yield Printed(
                f"erann-{size}", f"{millions} M", "parameters", f"journal, {table}", num_classes=classes
            )
    for size, millions in (("2-5", "37.9 M"), ("1-6", "54.2 M")):
        note = "the count for 50 classes; Table 4 has that for 527"
        yield Printed(f"erann-{size}", millions, "parameters", "journal, Table 5", note=note)
    for size, speeds in _JOURNAL_SPEEDS.items():
        for batch, speed in zip((1, 32), speeds, strict=True):
            yield Printed(f"erann-{size}", str(speed), f"audios/s, B={batch}", "journal, Table 4")
    for size, speed in _ESC50_SPEEDS.items():
        yield Printed(f"erann-{size}", str(speed), "audios/s, B=32", "journal, Table 6", 50, 5.0)
