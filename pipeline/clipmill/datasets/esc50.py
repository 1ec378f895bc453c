"""ESC-50 (Piczak, ACM MM 2015): audio/*.wav and meta/esc50.csv."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from clipmill.datasets import Prepared, option
from clipmill.datasets.archive import Archived
from clipmill.datasets.folder import by_labels, scan
from clipmill.datasets.labels import Columns, read_labels
from clipmill_manifests import facts

SUBSETS = ("esc50", "esc10")


@dataclass(frozen=True)
class Esc50(Archived):
    """ESC-50: 2000 environmental sounds of 5 s, 50 classes, 5 official folds; and its ESC-10 subset."""

    subset: str = option("esc50", help="All 50 classes, or the 10 of ESC-10.", choices=SUBSETS)

    KIND: ClassVar[str] = "esc50"
    LANDMARK: ClassVar[str] = "meta/esc50.csv"
    COLUMNS: ClassVar[Columns] = Columns("filename", "category", "fold", "src_file")

    @property
    def name(self) -> str:
        """esc50 or esc10."""
        return self.subset

    def hints(self) -> list[str]:
        """What a user of its folds must know; the recordings that straddle are none of ESC-10's."""
        return [] if self.subset == "esc10" else super().hints()

    def prepare(self, dest: Path) -> Prepared:
        """List the clips with their official folds; the group is the Freesound source. See `Dataset`."""
        root = self.root(dest)
        rows = read_labels(root / self.LANDMARK, self.COLUMNS)
        if self.subset == "esc10":
            classes = set(facts("esc50")["esc10_classes"])
            rows = [row for row in rows if classes.issuperset(row.labels)]
        found, _ = scan(root / "audio") if (root / "audio").is_dir() else ([], [])
        return self.grouped(by_labels(root / "audio", found, rows), "freesound")
