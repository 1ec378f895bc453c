"""UrbanSound8K (Salamon, Jacoby and Bello, ACM MM 2014): audio/fold1..10/*.wav and metadata/UrbanSound8K.csv."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from clipmill.datasets import Prepared
from clipmill.datasets.archive import Archived
from clipmill.datasets.folder import by_labels, scan
from clipmill.datasets.labels import Columns, read_labels


@dataclass(frozen=True)
class UrbanSound8K(Archived):
    """UrbanSound8K: 8732 city sounds of up to 4 s, 10 classes, 10 official folds."""

    KIND: ClassVar[str] = "urbansound8k"
    LANDMARK: ClassVar[str] = "metadata/UrbanSound8K.csv"
    COLUMNS: ClassVar[Columns] = Columns("slice_file_name", "class", "fold", "fsID")

    def prepare(self, dest: Path) -> Prepared:
        """List the slices with their official folds; the group is the Freesound source. See `Dataset`.

        `start` and `end` of the table are places in the Freesound recording: a slice is the whole of its file.
        """
        root = self.root(dest)
        rows = read_labels(root / self.LANDMARK, self.COLUMNS)
        found, _ = scan(root / "audio") if (root / "audio").is_dir() else ([], [])
        return self.grouped(by_labels(root / "audio", found, rows), "freesound")
