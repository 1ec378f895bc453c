"""RAVDESS (Livingstone and Russo, PLOS ONE 2018), its speech: Actor_01..24/MODALITY-CHANNEL-EMOTION-...-ACTOR.wav."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import ClassVar

from clipmill.datasets import Prepared
from clipmill.datasets.archive import Archived
from clipmill.datasets.folder import by_labels, scan
from clipmill.datasets.labels import Row

EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
"""In the order of their codes, 01 to 08."""

ACTORS = 24
ACTORS_PER_FOLD = 6


def fold_of(actor: int) -> int:
    """The fold, 1 to 4, of an actor, 1 to 24: six actors in turn, so three men and three women in each.

    The ERANN paper has four folds by actor but does not list them; men have odd numbers, women even ones.
    """
    return (actor - 1) // ACTORS_PER_FOLD + 1


@dataclass(frozen=True)
class Ravdess(Archived):
    """RAVDESS speech: 1440 spoken sentences, 8 emotions, 24 actors in 4 folds."""

    KIND: ClassVar[str] = "ravdess"
    LANDMARK: ClassVar[str] = "Actor_01"

    def prepare(self, dest: Path) -> Prepared:
        """List the recordings with four folds by actor; the group is the actor. See `Dataset`.

        The names are a full grid, so a recording that is not there is known to be missing.
        """
        root = self.root(dest)
        # Copies exist that hold every folder twice, once more below another.
        found = [source for source in scan(root)[0] if source.startswith("Actor_") and source.count("/") == 1]
        prepared = by_labels(root, found, _rows())
        lost = [
            replace(failure, message="is one of the 1440 recordings, but the archive does not hold it")
            if failure.reason == "missing"
            else failure
            for failure in prepared.failures
        ]
        return self.grouped(replace(prepared, failures=lost), "ravdess-actor")


def _rows() -> list[Row]:
    """Audio only (03), speech (01), emotion, intensity (neutral has but the first), sentence, take, actor."""
    return [
        Row(
            line=0,
            file=f"03-01-{emotion:02d}-{intensity:02d}-{sentence:02d}-{take:02d}-{actor:02d}.wav",
            labels=(EMOTIONS[emotion - 1],),
            fold=fold_of(actor),
            group=f"{actor:02d}",
            split=None,
            start_s=None,
            end_s=None,
        )
        for actor, emotion, intensity, sentence, take in product(
            range(1, ACTORS + 1), range(1, len(EMOTIONS) + 1), (1, 2), (1, 2), (1, 2)
        )
        if (emotion, intensity) != (1, 2)
    ]
