"""The nouns that travel between the stages, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NO_SPLIT = "all"
"""The split of a clip whose dataset has none (ESC-50 has folds instead)."""

TRAIN_SPLITS = ("train", "balanced_train", "unbalanced_train")
"""The splits that are trained on; AudioSet's two halves stay apart, so that either can be had alone."""

SPLITS = (*TRAIN_SPLITS, "valid", "eval", "noise", NO_SPLIT)
"""Every value a clip's split may have; `noise` is background sound to mix in, neither trained on nor scored."""

SPLIT_NAMES = {
    "train": "train", "training": "train", "dev": "train", "development": "train",
    "valid": "valid", "validation": "valid", "val": "valid",
    "eval": "eval", "evaluation": "eval", "test": "eval", "testing": "eval",
    NO_SPLIT: NO_SPLIT,
}  # fmt: skip
"""What others call their splits, in lower case -> what they are called here."""

SOUND_SUFFIXES = frozenset({
    ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".avi", ".caf", ".flac", ".m4a", ".mka",
    ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpc", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".spx", ".tta", ".w64",
    ".wav", ".wave", ".webm", ".wma", ".wv",
})  # fmt: skip
"""Endings of files that hold sound, in lower case."""

REASONS = {
    # of the source itself, wherever it came from
    "missing": "the source is not there",
    "unreadable": "the source is there but cannot be read, or is no regular file",
    "not-audio": "the source is plain text, and was never meant as audio",
    "ambiguous": "the labels name a file that stands in several places",
    "bad-name": "the file's name is not valid UTF-8, so no table can hold it",
    "bad-row": "the row of the list cannot be read, or stands there twice",
    "empty": "the source has no bytes, or decodes to no samples",
    "no-audio": "the source holds no audio stream",
    "corrupt": "the source does not decode, stops part-way, or ends before the length it states",
    "too-short": "the source ends before the clip begins, or well before it should end",
    "silent": "no sample of the clip reaches the last of 16 bits",
    "crash": "decoding it takes the decoder down, each time",
    "memory": "decoding it takes more memory than a clip may have",
    "out-of-range": "its feature has a value that the number type does not hold; --dtype float32 may",
    # of the machines that build the shards
    "not-built": "its shard could not be built; the same command tries again",
    # of the site that was asked for it
    "private": "the video is private",
    "removed": "the video was removed, by its uploader or by the site",
    "account-terminated": "the uploader's account is gone, and its videos with it",
    "copyright": "the video is blocked by a copyright claim",
    "geo-blocked": "the video is not shown in this country",
    "age-gated": "the video is shown to signed-in adults alone",
    "members-only": "the video is for paying members, or for sale",
    "live": "the video is a live stream, or has not begun",
    "unavailable": "the site says that there is no such video, and not why",
    "forbidden": "the server refuses it (HTTP 403)",
    "bot-check": "the site wants proof that we are no robot",
    "rate-limited": "the site says that we ask too often",
    "network": "the connection failed, or broke off, or the server did",
    "timeout": "it took longer than the time limit",
    "tool-error": "the tools failed: yt-dlp, ffmpeg, or our own worker",
}
"""Why a clip is not in the shards: reason code -> what it means."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A labelled stretch of a source; one row of the manifest.

    `source` is relative to the dataset's media root. `start_s`/`end_s` are in seconds
    from the start of the source; None means from its beginning / to its end. `bytes` is the
    source's size when it was fetched: another size is another source. `events` are what
    sounds when, where the labels say so: label, start and end in seconds from the clip's start.
    """

    key: str
    source: str
    labels: tuple[str, ...]
    start_s: float | None = None
    end_s: float | None = None
    split: str = NO_SPLIT
    fold: int | None = None
    group: str | None = None
    bytes: int | None = None
    events: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class Audio:
    """Decoded sound, mixed to mono: float32 `[samples]` in -1..1 (lossy peaks may pass 1).

    `rate` is in Hz; `channels` is how many the source has (the most, where that changes part-way).
    """

    samples: NDArray[np.float32]
    rate: int
    channels: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return float(len(self.samples) / self.rate)


@dataclass(frozen=True, slots=True)
class Failure:
    """One clip that a stage could not carry on.

    `outcome` is "failed" (it was tried) or "skipped" (it was never tried: not there,
    not audio, or already lost in an earlier stage).
    """

    key: str
    source: str
    stage: str
    outcome: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What `<shard>.json` says of one finished shard.

    `unit` is the hash of everything that decides the shard's bytes; `planned` are its clips' keys,
    in order, also of those that failed; `index` holds the index rows as columns; `counts`
    reconcile: clips = written + failed.
    """

    shard: str
    unit: str
    spec: dict[str, Any]
    sha256: str
    size: int
    counts: dict[str, int]
    planned: list[str]
    index: dict[str, list[Any]]
    failures: list[dict[str, Any]]
