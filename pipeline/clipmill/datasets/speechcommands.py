"""Speech Commands V2 (Warden, 2018): WORD/SPEAKER_nohash_N.wav, validation_list.txt and testing_list.txt."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from clipmill.datasets import Prepared
from clipmill.datasets.archive import Archived
from clipmill.datasets.folder import by_labels, scan
from clipmill.datasets.labels import Row
from clipmill.errors import TableError
from clipmill_manifests import facts

NOISE_FOLDER = "_background_noise_"
LISTS = {"valid": "validation_list.txt", "eval": "testing_list.txt"}
"""Split -> the file that lists its clips; every other clip is for training."""

_CLIP = re.compile(r"([a-z]+)/([0-9a-f]+)_nohash_\d+\.wav")


@dataclass(frozen=True)
class SpeechCommands(Archived):
    """Speech Commands V2: 105829 spoken words of up to 1 s, 35 words, official train, valid and eval splits."""

    KIND: ClassVar[str] = "speechcommands"
    LANDMARK: ClassVar[str] = "testing_list.txt"

    def prepare(self, dest: Path) -> Prepared:
        """List the words with their official splits; the group is the speaker. See `Dataset`.

        The long recordings of background noise are kept apart: split `noise`, no label, so
        that they are neither trained on nor scored as a 36th word.
        """
        root = self.root(dest)
        words = set(facts(self.KIND)["targets"])
        found, _ = scan(root)
        split_of = _listed(root, words)
        clips = {source for source in found if _word(source) in words} | split_of.keys()
        rows = [_row(source, split_of.get(source, "train")) for source in sorted(clips)]
        noise = [
            source for source in found if source.startswith(f"{NOISE_FOLDER}/") and source.endswith(".wav")
        ]
        rows += [Row(0, source, (), None, None, "noise", None, None) for source in noise]
        prepared = by_labels(root, found, rows)
        # Only the lists name files that may not be there.
        lost = [
            replace(failure, message=f"{LISTS[split_of[failure.source]]} names it, but there is no such file")
            for failure in prepared.failures
        ]
        return self.grouped(replace(prepared, failures=lost), "speechcommands")


def _word(source: str) -> str | None:
    match = _CLIP.fullmatch(source)
    return match[1] if match else None


def _row(source: str, split: str) -> Row:
    word, speaker = _CLIP.fullmatch(source).groups()  # type: ignore[union-attr]
    return Row(0, source, (word,), None, speaker, split, None, None)


def _listed(root: Path, words: set[str]) -> dict[str, str]:
    """The clips that a list names, with their split.

    Raises:
        TableError: a list is not there, or a line of it is no clip or stands in the other list too.
    """
    split_of: dict[str, str] = {}
    for split, name in LISTS.items():
        try:
            lines = (root / name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TableError(f"{root / name}: cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            source = line.strip()
            if not source:
                continue
            if _word(source) not in words:
                raise TableError(
                    f"{root / name}, line {number}: found {source!r}, expected WORD/SPEAKER_nohash_N.wav "
                    f"with one of the {len(words)} words"
                )
            if split_of.setdefault(source, split) != split:
                raise TableError(
                    f"{root / name}, line {number}: {source!r} stands in {LISTS[split_of[source]]} too"
                )
    return split_of
