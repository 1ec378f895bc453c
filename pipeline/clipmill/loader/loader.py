"""The loader: the batch of any step, in any order, as a pure function of (shards, sampler, seed, step)."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipmill.errors import ConfigError, ShardError
from clipmill.loader.ahead import in_order
from clipmill.loader.batches import Assembled, Batch, Digest, batch_of
from clipmill.loader.damage import MAX_BAD, STORE_REASONS, Bad, Damage, mend
from clipmill.loader.device import on_device
from clipmill.loader.memory import Memory
from clipmill.loader.sampler import Sampler, Shuffled, crop_starts, rank_positions
from clipmill.shards.read import Shards
from clipmill.shards.reader import Unread

TRIES = 8
"""Clips that are tried in the place of one that cannot be read, one after the other."""

_BLOCK = 4096  # positions worked out at once: for one batch alone the sampler costs as much as for a thousand clips

CPU = torch.device("cpu")


class Loader:
    """Batches of clips by random access; the state of a run is one integer, the step.

    The clip at a position depends on the sampler alone, and its crop on (seed, position): so a run that is
    resumed at any step, with any number of workers, sees what an undisturbed one sees. Step s of all ranks
    together holds the positions s * batch_size to (s + 1) * batch_size - 1.

    Args:
        shards: the clips to choose from.
        batch_size: clips in a step, of all ranks together.
        sampler: which clip stands where; by default `Shuffled` by the seed.
        seed: of the crops, and of the default sampler.
        crop: samples (of features: frames) cut from each clip at a random place, of which no more is read or decoded
            than the codec needs; 0: whole clips, with silence after the shorter ones.
        workers: threads that read ahead; 0: batches are read when they are asked for.
        device: where batches go.
        rank: which part of each step is this process's, from 0.
        ranks: into how many parts steps are divided.
        max_bad: share of the clips that may be unreadable before it is an error.
        check: compare each clip's samples with the sha256 in the index.
        tell: called with each clip that cannot be read, and what stands in for it.
        watch: called with (step, `Digest`) of each batch, before it is handed over.

    Attributes:
        damage: the account of clips that could not be read.
    """

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        *,
        sampler: Sampler | None = None,
        seed: int = 0,
        crop: int = 0,
        workers: int = 0,
        device: torch.device | str = CPU,
        rank: int = 0,
        ranks: int = 1,
        max_bad: float = MAX_BAD,
        check: bool = False,
        tell: Callable[[Bad], None] = lambda bad: None,
        watch: Callable[[int, Digest], None] | None = None,
    ) -> None:
        if not len(shards):
            raise ShardError(f"{shards.place}: no clip is left to read")
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("crop", crop, 0)):
            if value != int(value) or value < least:
                raise ConfigError(f"{name} {value}: allowed is any whole number from {least} up")
        rank_positions(0, batch_size, rank, ranks)  # says so now where the ranks cannot share a batch
        self.shards, self.batch_size, self.rank, self.ranks = shards, batch_size, rank, ranks
        self.sampler = Shuffled(len(shards), seed) if sampler is None else sampler
        self.seed, self.crop, self.workers, self.device = seed, crop, workers, torch.device(device)
        self.damage = Damage(len(shards), max_bad, tell)
        self._check, self._watch = check, watch
        self._memory = Memory(shards.dtype, shards.bins, pin=self.device.type == "cuda")
        self._lock = threading.Lock()
        self._blocks: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Steps in an epoch, the last of which may reach into the next."""
        return -(-self.sampler.clips // self.batch_size)

    def batches(self, start: int = 0, stop: int | None = None) -> Generator[Batch, None, None]:
        """Yield the batches of the steps from `start` up to `stop` (None: without end), on the device.

        Raises:
            ShardError: more clips than `max_bad` allows, or `TRIES` in the place of one, cannot be read.
        """
        return on_device(self._on_cpu(start, stop), self.device)

    def assemble(self, step: int, ended: threading.Event | None = None) -> Assembled:
        """The batch of a step on the CPU: this rank's part of it. Once `ended` is set nothing more is tried.

        Raises:
            ShardError: `TRIES` clips in the place of one cannot be read either, or the store does not answer.
        """
        positions = rank_positions(step, self.batch_size, self.rank, self.ranks)
        rows = self._rows(step)
        lengths = self.shards.samples[rows]
        waves = self._memory.empty(len(rows), self.crop or int(lengths.max()))
        missing = {one.place: [one] for one in self._read(positions, rows, waves)}
        bad = []
        for attempt in range(1, TRIES + 1):
            if not missing:
                break
            if ended is not None and ended.is_set():
                raise ShardError("reading was ended")
            waves = self._replace(attempt, positions, rows, waves, missing)
            for place in [place for place, unread in missing.items() if len(unread) == attempt]:
                instead = self.shards.keys_of(rows[place : place + 1])[0]
                bad += [Bad.of(one, instead, step + 1) for one in missing.pop(place)]
            _check_answering(missing, len(rows))
        if missing:
            first, *_, last = next(iter(missing.values()))
            raise ShardError(
                f"{first.shard}: clip {first.key} cannot be read ({first.reason}: {first.message}), nor can {TRIES} "
                f"others in its place, the last {last.key} in {last.shard} ({last.message}). {mend(first)}; where most "
                "clips are lost, --max-bad is of no help"
            )
        lengths = self.shards.samples[rows]
        batch = batch_of(self.shards, rows, waves, np.minimum(lengths, self.crop) if self.crop else lengths)
        digest = None if self._watch is None else Digest.of(self.shards, batch)
        return Assembled(batch, tuple(bad), digest)

    def _on_cpu(self, start: int, stop: int | None) -> Generator[Batch, None, None]:
        steps = itertools.count(start) if stop is None else range(start, stop)
        ended = threading.Event()
        assembled = in_order(partial(self.assemble, ended=ended), steps, self.workers)
        try:
            for step, made in enumerate(assembled, start):
                self.damage.note(made.bad)
                if self._watch is not None and made.digest is not None:
                    self._watch(step, made.digest)
                yield made.batch
        finally:
            ended.set()  # before the threads are waited for
            assembled.close()

    def _rows(self, step: int) -> NDArray[np.int64]:
        """The clips of a step, from a block of steps worked out together: a copy, `[B]`."""
        size = self.batch_size // self.ranks
        steps = max(1, _BLOCK // size)
        block, place = divmod(step, steps)
        with self._lock:
            if block not in self._blocks:
                parts = partial(rank_positions, batch_size=self.batch_size, rank=self.rank, ranks=self.ranks)
                positions = np.concatenate([parts(block * steps + k) for k in range(steps)])
                if len(self._blocks) > 1:  # threads are at two neighbours at most
                    del self._blocks[min(self._blocks)]
                self._blocks[block] = self.sampler.rows(positions)
            return self._blocks[block][place * size : (place + 1) * size].copy()

    def _read(self, positions: NDArray[np.int64], rows: NDArray[np.int64], waves: Tensor) -> list[Unread]:
        starts = None
        if self.crop:
            starts = crop_starts(self.seed, positions, self.shards.samples[rows], self.crop)
        return self.shards.read_into(rows, waves.numpy(), starts, check=self._check)

    def _replace(
        self,
        attempt: int,
        positions: NDArray[np.int64],
        rows: NDArray[np.int64],
        waves: Tensor,
        missing: dict[int, list[Unread]],
    ) -> Tensor:
        """Put into the places of unread clips what another order, derived from the first, has at their positions.

        What cannot be read either is added to `missing`.
        """
        places = np.array(sorted(missing))
        rows[places] = self.sampler.other(attempt).rows(positions[places])
        if not self.crop:
            waves = self._widened(waves, int(self.shards.samples[rows[places]].max()) - waves.shape[1])
        found = self._memory.empty(len(places), waves.shape[1])
        failed = self._read(positions[places], rows[places], found)
        waves[torch.from_numpy(places)] = found
        for one in failed:
            missing[int(places[one.place])].append(one)
        return waves

    def _widened(self, waves: Tensor, samples: int) -> Tensor:
        """The same with room for so many more samples of each clip, which are silence."""
        if samples <= 0:
            return waves
        wider = self._memory.empty(len(waves), waves.shape[1] + samples)
        wider[:, : waves.shape[1]] = waves
        wider[:, waves.shape[1] :] = torch.from_numpy(self.shards.silence)
        return wider


def _check_answering(missing: dict[int, list[Unread]], clips: int) -> None:
    """Raise ShardError where a whole batch, and others in its clips' places, fail for the store's sake."""
    tried = min(map(len, missing.values()), default=0)
    if len(missing) < clips or tried < (3 if clips == 1 else 2):
        return
    if all(one.reason in STORE_REASONS for unread in missing.values() for one in unread):
        first = next(iter(missing.values()))[0]
        raise ShardError(
            f"{first.shard}: the store does not answer: clip {first.key} cannot be read ({first.reason}: "
            f"{first.message}), nor can any other of {clips} clips or of those in their places. {mend(first)}"
        )


class WholeClips:
    """Every clip once and whole, clips of one length together, so that none is padded for another's sake.

    Clips that cannot be read are left out; `damage` lists them.

    Args:
        shards: the clips.
        most_samples: bounds a batch's size; a longer clip goes alone.
        workers: as in `Loader`, like what follows.
    """

    def __init__(
        self,
        shards: Shards,
        most_samples: int,
        *,
        workers: int = 0,
        device: torch.device = CPU,
        max_bad: float = MAX_BAD,
        check: bool = False,
        tell: Callable[[Bad], None] = lambda bad: None,
    ) -> None:
        self.shards, self.workers, self.device, self._check = shards, workers, device, check
        self.damage = Damage(len(shards), max_bad, tell)
        self._memory = Memory(shards.dtype, shards.bins, pin=device.type == "cuda")
        self._parts: list[NDArray[np.int64]] = []
        for length in np.unique(shards.samples):
            rows = np.flatnonzero(shards.samples == length)
            size = max(1, most_samples // int(length))
            self._parts += [rows[start : start + size] for start in range(0, len(rows), size)]

    def batches(self) -> Generator[Batch, None, None]:
        """Yield the batches on the device.

        Raises:
            ShardError: more clips than `max_bad` allows cannot be read.
        """
        return on_device(self._on_cpu(), self.device)

    def _on_cpu(self) -> Generator[Batch, None, None]:
        with closing(in_order(self._assemble, self._parts, self.workers)) as assembled:
            for made in assembled:
                self.damage.note(made.bad)
                if len(made.batch.rows):
                    yield made.batch

    def _assemble(self, part: NDArray[np.int64]) -> Assembled:
        rows = part.copy()  # it goes to whoever takes the batch
        lengths = self.shards.samples[rows]
        waves = self._memory.empty(len(rows), int(lengths.max()))
        unread = self.shards.read_into(rows, waves.numpy(), check=self._check)
        if unread:
            kept = np.setdiff1d(np.arange(len(rows)), [one.place for one in unread])
            rows, lengths, waves = rows[kept], lengths[kept], waves[torch.from_numpy(kept)]
        bad = tuple(map(Bad.of, unread))
        return Assembled(batch_of(self.shards, rows, waves, lengths), bad)
