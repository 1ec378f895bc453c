"""ESC-50 (Piczak, ACM MM 2015) as its archive unpacks: audio/*.wav and meta/esc50.csv."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pyarrow.compute as pc

from clipmill.datasets import Prepared, option
from clipmill.datasets.folder import by_labels, scan
from clipmill.datasets.labels import Columns, read_labels
from clipmill.errors import FetchError
from clipmill_manifests import facts

SUBSETS = ("esc50", "esc10")


@dataclass(frozen=True)
class Esc50:
    """ESC-50: 2000 environmental sounds of 5 s, 50 classes, 5 official folds; and its ESC-10 subset."""

    from_dir: Path = option(
        flag="--from", help="The unpacked archive: the folder with audio/ and meta/esc50.csv."
    )
    subset: str = option("esc50", help="All 50 classes, or the 10 of ESC-10.", choices=SUBSETS)

    COLUMNS: ClassVar[Columns] = Columns("filename", "category", "fold", "src_file")

    @property
    def name(self) -> str:
        """esc50 or esc10."""
        return self.subset

    def prepare(self, dest: Path) -> Prepared:
        """List the clips with their official folds; the group is the Freesound source. See `Dataset`."""
        root = self.from_dir.resolve()
        table = root / "meta" / "esc50.csv"
        if not table.is_file():
            raise FetchError(
                f"{self.from_dir}: has no meta/esc50.csv; --from is the folder that the archive unpacks to "
                f"({facts('esc50')['archive']})"
            )
        rows = read_labels(table, self.COLUMNS)
        if self.subset == "esc10":
            classes = set(facts("esc50")["esc10_classes"])
            rows = [row for row in rows if classes.issuperset(row.labels)]
        found, _ = scan(root / "audio") if (root / "audio").is_dir() else ([], [])
        prepared = by_labels(root / "audio", found, rows)
        # A Freesound source keeps to one fold by design; its number alone could meet another dataset's.
        groups = pc.binary_join_element_wise("freesound", prepared.manifest["group"], "-")
        place = prepared.manifest.schema.get_field_index("group")
        return replace(prepared, manifest=prepared.manifest.set_column(place, "group", groups))
