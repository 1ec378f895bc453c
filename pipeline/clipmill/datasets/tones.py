"""`tones`: a seeded, synthetic collection that is made offline and broken in places on purpose.

Ten classes, five folds, groups of clips by one voice, and every kind of file that a
raw collection has. It stands in for real data in the demo and in the tests; `broken`
says exactly which clips a later stage must find out, and for what reason.

media/.tones.json   the options that made the folder, and every file it made
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from clipmill.datasets import Prepared, option
from clipmill.datasets._mess import (
    BREAKAGES,
    RECORDERS,
    Breakage,
    Recorder,
    file_name,
    spread,
    write,
    write_broken,
)
from clipmill.datasets._synth import LABELS, draw_voice, render, synthesize
from clipmill.errors import ConfigError, FetchError, TableError
from clipmill.tables import atomic_write, manifest_table, read_json, write_json
from clipmill.types import Clip

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["LABELS", "Tones", "broken", "synthesize", "write_unseen"]

FOLDS = 5
TAKES = 2
"""Clips of one voice; the last voice of a class in a fold may have fewer."""

MARKER = ".tones.json"
VERSION = 2
"""Raise it whenever the same options would give other samples or names: old folders are then made anew."""

# Lossy codecs add up to 0.13 s of padding at the end; a decoded clip must still be at most 5 s.
_SECONDS = (0.3, 4.8)

# One stream of random numbers a purpose, so that no two ever share one.
_DEAL, _VOICE, _TAKE, _UNSEEN = range(4)


@dataclass(frozen=True, slots=True)
class _Job:
    """One file to write: its clip, its place in the collection, what writes it, and how it is broken."""

    clip: Clip
    number: int
    voice: tuple[int, int, int]  # class, fold, number within both: the seed of the voice
    recorder: Recorder
    breakage: Breakage | None


@dataclass(frozen=True)
class Tones:
    """Ten synthetic sounds in a realistic mess of files, made offline.

    A few of the files are corrupt, empty or silent on purpose: the shard stage reports
    them and ends with exit code 3.
    """

    name: ClassVar[str] = "tones"

    clips: int = option(300, help="How many clips to make; at least 10.")
    seed: int = option(0, help="What the clips are drawn from; the same seed gives the same clips.")

    def __post_init__(self) -> None:
        """Refuse options that cannot be."""
        if self.clips < len(LABELS):
            raise ConfigError(f"clips is {self.clips}; at least {len(LABELS)}, one a class: mend --clips")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more: mend --seed")

    def prepare(self, dest: Path) -> Prepared:
        """Make the files under `dest/media` that are not there yet, and list the clips.

        A folder made with other options is made anew; only files that this made before
        are removed. Broken files are in the manifest like all others.

        Raises:
            FetchError: `dest/media` holds files that this did not make.
            TableError: the folder's record of itself is damaged.
            OSError: the folder cannot be written.
        """
        media = dest / "media"
        jobs = _plan(self.clips, self.seed)
        sources = [job.clip.source for job in jobs]
        _claim(media, {"clips": self.clips, "seed": self.seed, "version": VERSION}, sources)
        lacking = [job for job in jobs if not (media / job.clip.source).exists()]
        if lacking:
            _sweep(media, sources)
        for job in lacking:
            with atomic_write(media / job.clip.source) as file:
                file.write(_file_bytes(job, self.seed))
        return Prepared(self.manifest(), media)

    def manifest(self) -> pa.Table:
        """The clips as `clipmill.tables.MANIFEST`, without making a file."""
        clips = [job.clip for job in _plan(self.clips, self.seed)]
        columns = ("key", "source", "labels", "fold", "group")
        return manifest_table({name: [getattr(clip, name) for clip in clips] for name in columns})


def broken(clips: int = 300, seed: int = 0) -> dict[str, str]:
    """The clips that are broken on purpose: key -> reason code of `clipmill.types.REASONS`."""
    return {job.clip.key: job.breakage.reason for job in _plan(clips, seed) if job.breakage}


def write_unseen(dest: Path, seed: int = 0) -> list[tuple[Path, str]]:
    """Write ten whole files that no collection of any seed holds, one a class, of many kinds.

    Returns:
        Each file with its true label; the file names tell nothing of it.
    """
    deal = np.random.default_rng([seed, _UNSEEN])
    written = []
    for number, which in enumerate(deal.permutation(len(LABELS))):
        label, recorder = LABELS[which], RECORDERS[number]
        rng = np.random.default_rng([seed, _UNSEEN, number])
        mono = synthesize(label, rng.uniform(1.0, 4.0), recorder.rate, rng)
        path = dest / f"unseen {number + 1:02d}.{recorder.kind}"
        with atomic_write(path) as file:
            file.write(write(spread(mono, recorder, rng), recorder))
        written.append((path, label))
    return written


def _plan(clips: int, seed: int) -> list[_Job]:
    """Every file of the collection, by number; drawn without making a single sample."""
    rng = np.random.default_rng([seed, _DEAL])
    # Dealt at random over the clips: a class must never be known by its file format.
    recorders = rng.permutation(np.arange(clips) % len(RECORDERS))
    breakages = _deal_breakages(clips, rng)
    jobs = []
    for number in range(clips):
        turn, which = divmod(number, len(LABELS))
        # Shifted by class, so that a few clips spread over all folds too.
        fold = (turn + which) % FOLDS
        series = turn // FOLDS // TAKES
        group = (series * FOLDS + fold) * len(LABELS) + which
        breakage = breakages.get(number)
        recorder = breakage.recorder if breakage else RECORDERS[recorders[number]]
        clip = Clip(f"tone-{number:05d}", "", (LABELS[which],), fold=fold + 1, group=f"voice-{group:02d}")
        clip = replace(clip, source=file_name(recorder, clip, number))
        jobs.append(_Job(clip, number, (which, fold, series), recorder, breakage))
    return jobs


def _deal_breakages(clips: int, rng: np.random.Generator) -> dict[int, Breakage]:
    """Which clips are broken and how: one in forty, yet each reason once where there are 30 clips or more."""
    count = max(min(3, clips // 10), round(clips / 40))
    # In turns over the classes: no class may lose more than its share.
    classes = rng.permutation(len(LABELS))
    order = {int(which): rng.permutation(np.arange(which, clips, len(LABELS))) for which in classes}
    numbers = [int(order[int(classes[i % len(classes)])][i // len(classes)]) for i in range(count)]
    return {number: BREAKAGES[i % len(BREAKAGES)] for i, number in enumerate(numbers)}


def _file_bytes(job: _Job, seed: int) -> bytes:
    """Make the whole file of one job: a pure function of the job and the seed."""
    voice = draw_voice(LABELS[job.voice[0]], np.random.default_rng([seed, _VOICE, *job.voice]))
    rng = np.random.default_rng([seed, _TAKE, job.number])
    mono = render(voice, rng.uniform(*_SECONDS), job.recorder.rate, rng)
    samples = spread(mono, job.recorder, rng)
    return write_broken(samples, job.breakage, rng) if job.breakage else write(samples, job.recorder)


def _claim(media: Path, options: dict[str, Any], sources: list[str]) -> None:
    """Make `media` the folder of these options: empty it of what other options made, and say so in its marker."""
    marker = media / MARKER
    if media.exists() and not media.is_dir():
        raise FetchError(f"{media}: is no folder; move it away, or choose another place with --root")
    if marker.exists():
        record = read_json(marker)
        if not isinstance(record, dict) or not {"options", "files"} <= set(record):
            raise TableError(f"{marker}: is not what tones writes there; remove the folder and run again")
        if record["options"] == options:
            return
        _remove(media, record["files"])
    elif media.exists() and any(not path.name.startswith(f".{MARKER}.") for path in media.iterdir()):
        raise FetchError(
            f"{media}: holds files that tones did not make; move them away, or choose another place with --root"
        )
    # Before the first file: a run that is killed at once must still know its own files again.
    write_json(marker, {"options": options, "files": sorted(sources)})


def _remove(media: Path, files: list[str]) -> None:
    """Remove the files of an earlier run and the folders that this leaves empty."""
    root = media.resolve()
    # Whatever a marker says, nothing outside its folder was made by it.
    paths = [media / name for name in files if (media / name).parent.resolve().is_relative_to(root)]
    _sweep(media, files)
    for path in paths:
        path.unlink(missing_ok=True)
    folders = {folder for path in paths for folder in path.parents if media in folder.parents}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _sweep(media: Path, files: list[str]) -> None:
    """Remove what killed runs left half-written under the temporary names of `atomic_write`."""
    ours = {media / name for name in (*files, MARKER)}
    for leftover in list(media.rglob(".*.tmp")):
        name, _, _ = leftover.name[1:].removesuffix(".tmp").rpartition(".")
        if leftover.with_name(name) in ours:
            leftover.unlink(missing_ok=True)
