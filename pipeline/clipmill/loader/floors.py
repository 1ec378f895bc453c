"""What a loader could reach: each thing that it has to do, done alone, and which of them bounds it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill.errors import DecodeError, ShardError
from clipmill.loader.feed import Feed
from clipmill.loader.memory import Memory
from clipmill.loader.streaming import opened, tars_of
from clipmill.shards.places import Job, ShardSet
from clipmill.shards.read import Shards
from clipmill.stores import ReadFailure

BOUND = 0.8
"""A loader that reaches this much of a floor is bound by it."""

FLOOR_S = 3.0
"""Each floor is measured for so long at most."""

FAR_S, FAR_CLIPS = 5.0, 200
"""A far store is read once more for so long and for so many clips at most: its bytes may cost money."""

_MOST_BYTES = 256 << 20  # of clips in memory, encoded and decoded
_PIECE = 1 << 20  # bytes of a tar that are read at once
_DOING = {"decode": "decoding", "store": "reading", "device": "copying to the device"}

_T = TypeVar("_T")
Done = tuple[float, int]
"""Clips, and bytes of them."""


@dataclass(frozen=True)
class Floor:
    """What is reached where one thing is done alone.

    Attributes:
        clips_per_s: by all threads together.
        mb_per_s: of the shards' bytes, on the device of int16; None where the HDF5 library reads, and does not say.
        cpu_ms_per_clip: user and system, of all threads.
    """

    clips_per_s: float
    mb_per_s: float | None
    cpu_ms_per_clip: float


@dataclass(frozen=True)
class Bound:
    """What bounds a loader.

    Attributes:
        by: "decode", "store", "device", or "loader" itself.
        share: what the loader reaches of the slowest floor.
        words: the same, as a sentence.
    """

    by: str
    share: float
    words: str


def what_bounds(clips_per_s: float, floors: Mapping[str, Floor], threads: int, *, in_turn: bool) -> Bound:
    """What bounds a loader that reaches `clips_per_s`.

    `in_turn`: a thread reads, then decodes; so both together are a bound too, below that of either.
    """
    rates = {name: floor.clips_per_s for name, floor in floors.items()}
    slowest = min(rates, key=rates.__getitem__)
    share = clips_per_s / rates[slowest]
    by_whom = "" if slowest == "device" else f" in {threads} thread{'s' * (threads > 1)}"
    said = f"{share:.2f} of what {_DOING[slowest]} alone reaches{by_whom}, {rates[slowest]:.1f} clips/s"
    if share >= BOUND:
        return Bound(slowest, share, f"bound by {_DOING[slowest]}: {said}")
    if in_turn and slowest != "device" and rates.keys() >= {"decode", "store"}:
        together = clips_per_s * (1 / rates["decode"] + 1 / rates["store"])
        if together >= BOUND:
            turns = f"{together:.2f} of reading and decoding in turn"
            return Bound(slowest, share, f"bound by {_DOING[slowest]}: {said}, and {turns}")
    return Bound("loader", share, f"bound by the loader itself: {said}, the slowest floor")


def measure_floors(
    shards: Shards,
    rows: NDArray[np.int64],
    starts: NDArray[np.int64],
    feed: Feed,
    device: torch.device,
    *,
    batch: int,
    crop: int,
    clips: int,
    seconds: float,
) -> dict[str, Floor]:
    """Do what the loader does with the clips at `rows`, of which as many are taken as fit in memory.

    "decode": their bytes, in memory, are decoded into ready buffers; left out where none need it. "store":
    their bytes are read, from the page cache, the disk or afar, as they come; what the HDF5 library reads it decodes
    too. "device": batches are copied to it; CUDA alone.

    Args:
        rows: `[clips]`, of `shards`, in the order of the run.
        starts: `[clips]`: where their crops begin, in samples.
        feed: how they were read.
        batch: clips that a thread reads at once.
        crop: samples of each; 0: whole clips.
        clips: if not 0, no more are taken for each floor.
        seconds: each floor is measured for no longer.

    Raises:
        ShardError: none of the clips can be read any more.
    """
    seconds = min(seconds, FLOOR_S)
    threads = max(1, feed.workers)
    stream, far = feed.access == "stream", shards.far
    longest = int(shards.samples[rows].max())
    most = max(1, _MOST_BYTES // (2 * longest + 2 * (crop or longest)))
    if far:
        most = min(most, FAR_CLIPS // 2 if stream else FAR_CLIPS)
    rows, starts = rows[:most], starts[:most]
    sample = _Sample(shards, rows, starts, np.zeros((len(rows), crop or longest), np.int16), feed.check)
    parts = [range(first, min(first + batch, len(rows))) for first in range(0, len(rows), batch)]
    floors: dict[str, Floor | None] = {}
    # Near, this warms what it reads into; far, there is but one pass.
    floors["store"] = _rate(sample.read, parts, threads, FAR_S if far else math.inf)
    if stream:
        floors["store"] = _rate_of_tars(shards, rows, threads, FAR_CLIPS // 2 if far else clips, seconds)
    elif not far:
        floors["store"] = _rate(sample.read, _repeated(parts, -(-clips // batch)), threads, seconds)
    if sample.decodes:
        floors["decode"] = _rate(sample.decode, _repeated(sorted(sample.came), clips), threads, seconds)
    if device.type == "cuda":
        waves = Memory(pin=True).empty(batch, crop or longest)
        floors["device"] = _rate(lambda _: _copied(waves, device), _repeated([0], 0), 1, seconds)
    found = {name: floor for name, floor in floors.items() if floor is not None}
    if not found:
        raise ShardError(f"{shards.place}: clips that were read a moment ago are not there any more")
    return found


class _Clip(NamedTuple):
    """A clip to read and decode; `kept` has room for its bytes, or none where only the HDF5 library reads it."""

    part: ShardSet
    job: Job
    kept: memoryview

    @property
    def fetched(self) -> bool:
        """Whether it comes from afar, many at once."""
        return len(self.kept) > 0 and not self.part.store.near


class _Sample:
    """Clips with room for their bytes and their samples. Threads may work on the same clip: they write the same.

    Attributes:
        came: places of the clips that were read.
    """

    def __init__(
        self,
        shards: Shards,
        rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        out: NDArray[np.int16],
        check: bool,
    ) -> None:
        self._reader, self._check = shards.reader, check
        self.came: set[int] = set()
        out.fill(0)  # memory that was never written to is slow the first time
        clips = []
        for part, jobs in self._reader.jobs(shards.stored(rows), out, starts):
            for job in jobs:
                length = 0 if job.offset < 0 else job.stretch(check)[2]
                clips.append(_Clip(part, job, memoryview(bytearray(length))))
        self._clips = sorted(clips, key=lambda clip: clip.job.place)

    def read(self, places: Iterable[int]) -> Done:
        """Read these clips as the loader reads a batch; those that do not come do not count."""
        chosen = [self._clips[place] for place in places]
        far = {id(clip.part): clip.part for clip in chosen if not clip.part.store.near}
        done = [clip for clip in chosen if not clip.fetched and self._read_one(clip)]
        for part in far.values():
            here = [clip for clip in chosen if clip.part is part and clip.fetched]
            found = part.store.fetch([clip.job.stretch(self._check) for clip in here])
            for clip, data in zip(here, found, strict=True):
                if not isinstance(data, ReadFailure):
                    clip.kept[:] = data
                    done.append(clip)
        self.came.update([clip.job.place for clip in done])
        return len(done), sum(len(clip.kept) for clip in done)

    def _read_one(self, clip: _Clip) -> bool:
        try:
            if not len(clip.kept):
                self._reader.by_hdf5(clip.part, clip.job)
                return True
            name, offset, length = clip.job.stretch(self._check)
            return clip.part.store.read_into(name, offset, [clip.kept]) == length
        except (ReadFailure, DecodeError):
            return False

    @property
    def decodes(self) -> bool:
        """Whether any clip that was read is more than samples."""
        return any(self._encoded(self._clips[place]) for place in self.came)

    def decode(self, place: int) -> Done:
        """Decode a clip that was read, if it needs that."""
        clip = self._clips[place]
        if self._encoded(clip):
            self._reader.decode(clip.part, clip.job, clip.kept, self._check)
        return 1, len(clip.kept)

    def _encoded(self, clip: _Clip) -> bool:
        return len(clip.kept) > 0 and (self._check or not clip.job.raw)


def _rate_of_tars(
    shards: Shards, rows: NDArray[np.int64], threads: int, most: int, seconds: float
) -> Floor | None:
    """Tars that hold these clips read from front to back, one by each thread at a time; of `most` clips, if not 0."""
    wanted = np.zeros(len(shards), bool)
    wanted[rows] = True
    tars = [tar for tar in tars_of(shards) if wanted[tar.rows].any()]
    until = time.perf_counter() + seconds

    def read(place: int) -> Done:
        tar, found = tars[place], 0
        try:
            size = tar.part.store.size(tar.name)
            enough = most / threads * size / len(tar.rows) if most else size
            with opened(tar.part.store, tar.name) as file:
                while found < enough and time.perf_counter() < until and (piece := file.read(_PIECE)):
                    found += len(piece)
        except (OSError, ShardError):
            return 0, 0
        return len(tar.rows) * found / size, found

    places = _repeated(range(len(tars)), threads if most else 0)
    return _rate(read, places, threads, seconds)


def _copied(waves: torch.Tensor, device: torch.device) -> Done:
    waves.to(device, non_blocking=True)
    torch.cuda.synchronize(device)
    return len(waves), waves.nbytes


def _repeated(items: Iterable[_T], most: int) -> Iterator[_T]:
    """Items again and again; `most` of them, if not 0."""
    return itertools.islice(itertools.cycle(items), most or None)


def _rate(work: Callable[[_T], Done], items: Iterable[_T], threads: int, seconds: float) -> Floor | None:
    """What threads do together that each take the next item until `seconds` have passed; None where they do nothing."""
    shared, began, cpu = iter(items), time.perf_counter(), time.process_time()

    def turns(_: int) -> Done:
        clips, size = 0.0, 0
        for item in shared:
            done = work(item)
            clips, size = clips + done[0], size + done[1]
            if time.perf_counter() - began >= seconds:
                break
        return clips, size

    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(turns, range(threads)))
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    clips, size = (sum(each) for each in zip(*done, strict=True))
    return Floor(clips / took, size / took / 1e6 if size else None, 1e3 * cpu / clips) if clips else None
