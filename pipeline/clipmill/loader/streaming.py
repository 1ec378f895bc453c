"""Sequential access by the webdataset library: whole tars from front to back, where range reads are dear.

The library reads the tars and shuffles; what is known of a clip comes from the index, as with random access.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill.audio import SUFFIXES
from clipmill.errors import ConfigError, ShardError
from clipmill.loader.ahead import in_order
from clipmill.loader.batches import Assembled, Batch, Digest, batch_of
from clipmill.loader.damage import MAX_BAD, Bad, Damage
from clipmill.loader.device import on_device
from clipmill.loader.loader import CPU
from clipmill.loader.memory import Memory
from clipmill.loader.orders import key, permuted
from clipmill.loader.sampler import rank_positions
from clipmill.shards.foreign.scan import HDF5_SUFFIXES
from clipmill.shards.places import ShardSet
from clipmill.shards.read import Shards, rows_by_value
from clipmill.stores import ReadFailure, Store

BUFFER = 1000
"""Clips in the shuffle buffer, unless told otherwise."""

NO_PROMISE = (
    "--access stream reads shards from front to back: clips are shuffled within a buffer only; another number of "
    "workers or ranks gives other batches; between ranks, clips come equally often only over many passes; and a "
    "resumed run begins its pass anew, in another order. `--access random` has none of these limits"
)
"""What streaming cannot promise, for whoever chose it."""

_ORDER, _DRAWN = 100, 101  # uses of random numbers, which no sampler has
_AT_ONCE = 16  # clips that a thread reads before it hands them over
_PIECE = 2 << 20  # bytes of a far tar in one request
_PIECES = 4  # of them under way at once for each tar


class _Tar(NamedTuple):
    """A shard that holds clips which were chosen: its set, its name, and their rows in the shards read."""

    part: ShardSet
    name: str
    rows: NDArray[np.int64]


class _Clip(NamedTuple):
    """A clip's row in the shards read, and its sound file as the tar holds it."""

    row: int
    data: bytes


class StreamLoader:
    """Batches of clips as they come from tars that are read from front to back; see `NO_PROMISE` for what that costs.

    The shards, in an order drawn for each pass, are dealt out to the ranks, and to the threads of each. What a
    rank's threads read is put together clip by clip in turn, shuffled in one buffer, and never ends: so all ranks give
    as many clips, and on one rank every clip comes once in each pass. Runs from step 0 with equal arguments give equal
    batches; from a later step they begin the pass that it falls in, in an order of their own.

    Args:
        shards: the clips to choose from; others in the same tars are read past.
        batch_size: clips in a step, of all ranks together.
        seed: of the orders of shards and clips.
        buffer: clips of each rank that wait to be drawn from, encoded: of 10 s in FLAC, half a megabyte each.
        workers: threads that read tars, one each, and as many that decode; fewer read where there are too few
            shards. 0: everything is done when a batch is asked for.
        device: where batches go.
        rank: which part of each step is this process's, from 0.
        ranks: into how many parts steps are divided.
        max_bad: share of the clips that may be unreadable before it is an error.
        tell: called with each clip that cannot be read; the stream's next comes in its place.
        watch: called with (step, `Digest`) of each batch, before it is handed over.

    Attributes:
        damage: the account of clips that could not be read.

    Raises:
        ConfigError: shards are HDF5 files, fewer than the ranks, or the ranks cannot share a batch.
    """

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        *,
        seed: int = 0,
        buffer: int = BUFFER,
        workers: int = 0,
        device: torch.device = CPU,
        rank: int = 0,
        ranks: int = 1,
        max_bad: float = MAX_BAD,
        tell: Callable[[Bad], None] = lambda bad: None,
        watch: Callable[[int, Digest], None] | None = None,
    ) -> None:
        rank_positions(0, batch_size, rank, ranks)  # says so now where the ranks cannot share a batch
        self._tars = tars_of(shards)
        if len(self._tars) < ranks:
            raise ConfigError(
                f"{shards.place}: {len(self._tars)} shards hold the clips to read, and there are {ranks} ranks, each "
                "of which reads shards of its own with --access stream; `--access random` has no such limit"
            )
        self.shards, self.batch_size, self.rank, self.ranks = shards, batch_size, rank, ranks
        self.seed, self.buffer, self.workers, self.device = seed, buffer, workers, device
        self.damage = Damage(len(shards), max_bad, tell)
        self._lanes = max(1, min(workers, len(self._tars) // ranks))
        self._watch = watch
        self._memory = Memory(pin=device.type == "cuda")
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Steps in a pass over all clips, the last of which may reach into the next."""
        return -(-len(self.shards) // self.batch_size)

    def batches(self, start: int = 0, stop: int | None = None) -> Generator[Batch, None, None]:
        """Yield the batches of the steps from `start` up to `stop` (None: without end), on the device.

        From a `start` above 0 these are not the batches that a run from 0 has there; see `NO_PROMISE`.

        Raises:
            ShardError: more clips than `max_bad` allows, or all of them, cannot be read.
        """
        return on_device(self._on_cpu(start, stop), self.device)

    def _on_cpu(self, start: int, stop: int | None) -> Generator[Batch, None, None]:
        size = self.batch_size // self.ranks
        steps = itertools.count(start) if stop is None else range(start, stop)
        with closing(self._clips(start)) as clips:
            parts = (list(itertools.islice(clips, size)) for _ in steps)
            with closing(in_order(self._assemble, parts, self.workers)) as assembled:
                for step, (made, good) in zip(itertools.count(start), assembled, strict=False):
                    while made.bad:
                        self.damage.note(made.bad)
                        made, good = self._assemble([*good, *itertools.islice(clips, len(made.bad))])
                    if self._watch is not None and made.digest is not None:
                        self._watch(step, made.digest)
                    yield made.batch

    def _assemble(self, clips: Sequence[_Clip]) -> tuple[Assembled, list[_Clip]]:
        """The batch of these clips on the CPU, and those of them that could be decoded."""
        rows = np.array([clip.row for clip in clips], np.int64)
        lengths = self.shards.samples[rows]
        waves = self._memory.empty(len(rows), int(lengths.max()))
        unread = self.shards.decode_into(rows, [clip.data for clip in clips], waves.numpy())
        batch = batch_of(self.shards, rows, waves, lengths)
        digest = None if self._watch is None else Digest.of(self.shards, batch)
        bad = tuple(map(Bad.of, unread))
        places = {one.place for one in unread}
        good = [clip for place, clip in enumerate(clips) if place not in places]
        return Assembled(batch, bad, digest), good

    def _clips(self, start: int) -> Generator[_Clip, None, None]:
        """The clips of this rank, from the pass on that the step `start` falls in, pass after pass."""
        from webdataset.filters import shuffle

        first = start * self.batch_size // len(self.shards)
        with ExitStack() as stack:
            lanes = []
            for number in range(self._lanes):
                lane = stack.enter_context(closing(self._lane(self.rank + self.ranks * number, start, first)))
                ahead = in_order(_next_of, itertools.repeat(lane), 1 if self.workers else 0)
                lanes.append(itertools.chain.from_iterable(stack.enter_context(closing(ahead))))
            for number in itertools.count(first):
                drawn = random.Random(int(key(self.seed, _DRAWN, start, number, self.rank)[0]))
                yield from shuffle(self.buffer, rng=drawn)(self._pass(lanes))
                if len(found := self.damage.found) == len(self.shards):
                    raise ShardError(f"none of the {len(found)} clips can be read; the first: {found[0]}")

    def _pass(self, lanes: Sequence[Iterator[_Clip | Bad | None]]) -> Iterator[_Clip]:
        """The clips of one pass, one of each lane in turn; a lane that has no more of them is left out."""
        left = list(lanes)
        while left:
            for lane in tuple(left):
                found = next(lane)
                if found is None:
                    left.remove(lane)
                elif isinstance(found, Bad):
                    self.damage.note([found])
                else:
                    yield found

    def _lane(self, lane: int, start: int, first: int) -> Generator[_Clip | Bad | None, None, None]:
        """What one thread reads, of all ranks' threads: the clips of its shards, and None after each pass.

        The orders of all passes, end to end, are dealt out in turn: so each lane has as many shards as any other.
        """
        lanes, tars = self.ranks * self._lanes, len(self._tars)
        for number in itertools.count(first):
            # A run that is often interrupted must not always begin with the same shards.
            order = permuted(key(self.seed, _ORDER, start, number), np.arange(tars), tars)
            for place in order[(lane - number * tars) % lanes :: lanes]:
                yield from self._read(self._tars[place])
            yield None

    def _read(self, tar: _Tar) -> Iterator[_Clip | Bad]:
        """The chosen clips of a tar as they come, then those that did not."""
        from webdataset.tariterators import tar_file_iterator

        with self._lock:  # threads that load a column at once would each hold a copy
            wanted = self._members(tar)
        reason, why = "corrupt", "its shard ends before it"
        try:
            with opened(tar.part.store, tar.name) as file:
                chosen = tar_file_iterator(
                    file, skip_meta=None, select_files=lambda name: _plain(name) in wanted
                )
                for member in chosen:
                    yield _Clip(wanted.pop(_plain(member["fname"])), member["data"])
        except ReadFailure as error:
            reason, why = error.reason, _said(error)
        except OSError as error:
            reason, why = "unreadable", _said(error)
        except Exception as error:  # of tarfile and what it unpacks with, at what nobody has fed them yet
            why = f"its shard is damaged before it: {_said(error)}"
        shard, lost = tar.part.store.path(tar.name), list(wanted.values())
        for one in self.shards.keys_of(np.array(lost, np.int64)) if lost else ():
            yield Bad(one, shard, reason, why)

    def _members(self, tar: _Tar) -> dict[str, int]:
        """Member name -> row of the chosen clips of a tar."""
        if tar.part.info.get("foreign"):
            names = self.shards.columns["source"].take(tar.rows).to_pylist()
        else:
            suffix = SUFFIXES[tar.part.info["spec"]["encoding"]]
            names = [f"{one}.{suffix}" for one in self.shards.keys_of(tar.rows)]
        return dict(zip(names, tar.rows.tolist(), strict=True))


class _FarTar(io.RawIOBase):
    """A far file to be read from front to back: as many bytes as are asked for come by several requests at once."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store, self._name, self._size, self._at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self._size)
        pieces = [(self._name, at, min(_PIECE, end - at)) for at in range(self._at, end, _PIECE)]
        begun = self._at
        for piece in self._store.fetch(pieces):
            if isinstance(piece, ReadFailure):
                if self._at == begun:
                    raise piece
                break  # what came before it counts, and it is asked for once more
            buffer[self._at - begun : self._at - begun + len(piece)] = piece
            self._at += len(piece)
        return self._at - begun


def opened(store: Store, name: str) -> BinaryIO:
    """A shard to be read from front to back; raises ReadFailure."""
    file = store.open(name)
    if store.near:
        return file
    with file:
        size = file.seek(0, os.SEEK_END)
    return io.BufferedReader(_FarTar(store, name, size), _PIECE * _PIECES)


def tars_of(shards: Shards) -> list[_Tar]:
    """The shards that hold any of the clips; raises ConfigError where one is no tar."""
    if shards.bins is not None:
        raise ConfigError(
            "--access stream: reads tars of sound, and this is a feature store; --access random reads it"
        )
    rows = np.arange(len(shards)) if shards.columns.rows is None else shards.columns.rows
    which, firsts = shards.set_of, shards.reader.firsts
    tars = []
    for number, part in enumerate(shards.sets):
        here = np.flatnonzero(which == number)
        codes, names = part.index.coded("shard")
        found = rows_by_value(codes[rows[here] - firsts[number]])
        tars += [_Tar(part, names[code], here[places]) for code, places in found.items()]
    for tar in tars:
        if tar.name.endswith(HDF5_SUFFIXES):
            raise ConfigError(
                f"{tar.part.store.path(tar.name)}: --access stream reads tars alone; `--access random` reads HDF5 too, "
                "and `pipeline convert --format webdataset` makes tars of it"
            )
    return tars


def _next_of(lane: Iterator[_Clip | Bad | None]) -> list[_Clip | Bad | None]:
    return list(itertools.islice(lane, _AT_ONCE))


def _plain(name: str) -> str:
    """A member's name as the index has it: what is no UTF-8 comes from tarfile otherwise."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _said(error: Exception) -> str:
    """What an error says, without the stream's name, which webdataset puts at its end."""
    return str(error).partition(" @ <")[0]
