"""Clips as batches for the device: int16 on the way, so that half the bytes travel; the rest is done there."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipmill.errors import ShardError
from clipmill.shards.read import Shards
from clipmill.train.sampler import step_rows


class Batch(NamedTuple):
    """Clips side by side, zeros after the shorter ones.

    waves int16 `[B, samples]` of the longest; lengths int64 `[B]` in samples; targets float32
    `[B, classes]`; rows int64 `[B]`, in the index of the shards read.
    """

    waves: Tensor
    lengths: Tensor
    targets: Tensor
    rows: Tensor


class StepBatches(Dataset[Batch | ShardError]):
    """The batch of every training step: `[step]` is a pure function of (shards, seed, step)."""

    def __init__(self, shards: Shards, seed: int, batch_size: int) -> None:
        self.shards, self.seed, self.batch_size = shards, seed, batch_size

    def __getitem__(self, step: int) -> Batch | ShardError:
        return _read(self.shards, step_rows(self.seed, step, self.batch_size, len(self.shards)))


class WholeClipBatches(Dataset[Batch | ShardError]):
    """Every clip once and whole, clips of one length together, so that no clip is padded for another's sake.

    `most_samples` bounds a batch's size; a longer clip goes alone.
    """

    def __init__(self, shards: Shards, most_samples: int) -> None:
        self.shards = shards
        self.rows: list[NDArray[np.int64]] = []
        for length in np.unique(shards.samples):
            rows = np.flatnonzero(shards.samples == length)
            size = max(1, most_samples // int(length))
            self.rows += [rows[start : start + size] for start in range(0, len(rows), size)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Batch | ShardError:
        return _read(self.shards, self.rows[place])


def stream(
    batches: Dataset[Batch | ShardError], places: range, workers: int, *, pin: bool
) -> Iterator[Batch]:
    """Yield the batches at `places`, in order, read ahead by `workers` processes (0: in this one).

    Raises:
        ShardError: a clip cannot be read; names the shard and the key.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=places,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for batch in loader:
        if isinstance(batch, ShardError):
            raise batch
        yield batch


def _read(shards: Shards, rows: NDArray[np.int64]) -> Batch | ShardError:
    """Decode clips into a batch; an error is handed on, for a raised one would arrive as a traceback's text."""
    lengths = shards.samples[rows]
    waves = np.zeros((len(rows), int(lengths.max())), np.int16)
    try:
        for place, row in enumerate(rows):
            waves[place, : lengths[place]] = shards.read(int(row))
    except ShardError as error:
        return error
    arrays = (waves, lengths, shards.targets[rows], rows)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def _as_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C and a preemption reach the whole process group: the parent ends the step first, then us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
