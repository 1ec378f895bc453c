"""Clips as batches: in the form that they are stored in, so that fewer bytes travel; the rest is done on the device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipmill.loader.damage import Bad
from clipmill.shards.read import Shards


class Batch(NamedTuple):
    """Clips side by side, silence after the shorter ones.

    waves int16 `[B, samples]` of the longest, or of the crop; of stored features float16 or float32
    `[B, frames, bins]`; lengths int64 `[B]` in samples or frames; targets float32 `[B, classes]`; rows int64 `[B]`,
    in the index of the shards read, on the CPU.
    """

    waves: Tensor
    lengths: Tensor
    targets: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on the device, but for the rows."""
        waves, lengths, targets = (part.to(device, non_blocking=True) for part in self[:3])
        return Batch(waves, lengths, targets, self.rows)


@dataclass(frozen=True)
class Digest:
    """Which clips a batch held, and their very samples: sha256 in hex of its keys, and of its waves."""

    keys: str
    samples: str

    @classmethod
    def of(cls, shards: Shards, batch: Batch) -> Digest:
        """Of a batch on the CPU."""
        rows = batch.rows.numpy()
        keys = "\n".join(
            f"{part}/{key}" for part, key in zip(shards.set_of[rows], shards.keys_of(rows), strict=True)
        )
        samples = hashlib.sha256(batch.waves.numpy().data).hexdigest()
        return cls(hashlib.sha256(keys.encode()).hexdigest(), samples)


@dataclass(frozen=True)
class Assembled:
    """A batch on the CPU, and the clips that should have been in it; `digest` where it was asked for."""

    batch: Batch
    bad: tuple[Bad, ...] = ()
    digest: Digest | None = None


def batch_of(shards: Shards, rows: NDArray[np.int64], waves: Tensor, lengths: NDArray[np.int64]) -> Batch:
    """A batch of what was read."""
    beside = [torch.from_numpy(np.ascontiguousarray(array)) for array in (lengths, shards.targets_of(rows))]
    lengths_, targets = (part.pin_memory() for part in beside) if waves.is_pinned() else beside
    return Batch(waves, lengths_, targets, torch.from_numpy(rows))
