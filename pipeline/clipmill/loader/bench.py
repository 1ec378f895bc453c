"""How fast batches come, and what bounds it: the library of `pipeline bench loader`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill.errors import ConfigError
from clipmill.loader.ahead import AHEAD
from clipmill.loader.damage import Bad
from clipmill.loader.feed import Feed
from clipmill.loader.floors import Floor, measure_floors, what_bounds
from clipmill.loader.sampler import crop_starts
from clipmill.shards.read import Shards

SEED = 0
"""Of orders and crops."""

_MOST_WORKERS = 8


@dataclass(frozen=True)
class LoaderSettings:
    """What is read, and how.

    Attributes:
        where: sets of shards, as `Shards.open` takes them.
        batch: clips in a batch.
        seconds: for so long batches are taken, after the first.
        clips: if not 0, as many batches are taken after the first as hold these, instead of for `seconds`.
        crop_s: seconds cut from each clip; 0: whole clips.
        sampling: one of `SAMPLINGS`.
        feed: threads, access, damage allowed, hashes.
        cache: folder that keeps what is read of far shards.
        timeout_s: within which a far clip's bytes must come.
    """

    where: tuple[str, ...]
    batch: int = 32
    seconds: float = 10.0
    clips: int = 0
    crop_s: float = 0.0
    sampling: str = "shuffled"
    feed: Feed = field(default_factory=lambda: Feed(default_workers()))
    cache: Path | None = None
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.crop_s and self.feed.access == "stream":
            raise ConfigError(
                f"--crop-s {self.crop_s:g}: a stream's clips come whole; allowed is 0, or --access random"
            )


@dataclass(frozen=True)
class _Run:
    """What came after the first batch: rows `[clips]` of the shards; memory in bytes, before and after it."""

    first_batch_s: float
    rows: NDArray[np.int64]
    seconds: float
    cpu_s: float
    before: dict[str, int]
    after: dict[str, int]
    bad: list[Bad]


def default_workers() -> int:
    """Threads that read ahead, unless told otherwise: as many as there are cores, 8 at most."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def bench_loader(
    settings: LoaderSettings,
    device: torch.device,
    *,
    opened: Callable[[Shards], None] = lambda shards: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time the loader, then the floors under it; a plain dict, ready for JSON.

    `clips`, `seconds` and what follows from them are of what came after the first batch: `clips_per_s`,
    `times_real_time` (seconds of sound a second), `read_mb_per_s` (bytes of the clips as the shards keep them; None
    where the HDF5 library reads, and does not say), `delivered_mb_per_s` (int16, without zeros between clips),
    `cpu_ms_per_clip` (user and system, of all threads). `first_batch_s` counts from before the loader is
    built, `open_s` is what opening the shards took before that. Memory is resident, in bytes, its growth from
    the first batch on, and its peak that of the process. `floors`: see `measure_floors`; `bound_by`,
    `bound_share` and `bound`: see `Bound`; `advice` is None where there is none.

    `opened(shards)` hears of the shards; `say(text)` of what is being done.

    Raises:
        ConfigError: settings that do not go together.
        ShardError: shards cannot be opened, or too many clips not be read.
    """
    began = time.perf_counter()
    shards = Shards.open(
        settings.where, cache=settings.cache, settings={"timeout_s": settings.timeout_s}, say=say
    )
    open_s = time.perf_counter() - began
    opened(shards)
    crop = round(settings.crop_s * shards.sample_rate)
    say(f"{shards.place}: {len(shards)} clips, opened in {open_s:.2f} s; reading")
    run = _run(shards, settings, crop, device)
    say("measuring what bounds it")
    feed, rows, lengths = settings.feed, run.rows, shards.samples[run.rows]
    first = settings.batch * (1 + _passed_over(feed))
    positions = np.arange(first, first + len(rows))
    starts = crop_starts(SEED, positions, lengths, crop or int(lengths.max()))
    floors = measure_floors(
        shards, rows, starts, feed, device,
        batch=settings.batch, crop=crop, clips=settings.clips, seconds=settings.seconds,
    )  # fmt: skip
    rate = len(rows) / run.seconds
    bound = what_bounds(rate, floors, max(1, feed.workers), in_turn=feed.access == "random")
    return {
        **_conditions(shards, settings, device),
        **_figures(shards, run, crop, feed.check),
        "open_s": open_s,
        "floors": {name: asdict(floor) for name, floor in floors.items()},
        "bound_by": bound.by,
        "bound_share": bound.share,
        "bound": bound.words,
        "advice": _advice(bound.by, floors, shards, settings),
    }


def _run(shards: Shards, settings: LoaderSettings, crop: int, device: torch.device) -> _Run:
    torch.zeros(1, device=device)  # what it takes to start a device is not the loader's
    feed = settings.feed
    began = time.perf_counter()
    sampler = feed.sampler(shards, settings.sampling, SEED)
    loader = feed.loader(
        shards, settings.batch, sampler=sampler, seed=SEED, crop=crop, device=device, tell=lambda bad: None
    )
    batches = loader.batches()
    next(batches)
    _wait(device)
    first_batch_s = time.perf_counter() - began
    for _ in range(_passed_over(feed)):
        next(batches)
    _wait(device)
    started, cpu, before = time.perf_counter(), time.process_time(), _memory()
    rows: list[NDArray[np.int64]] = []
    # Threads are as far ahead at the end as at the beginning, so what they did meanwhile is what was taken.
    for batch in batches:
        rows.append(batch.rows.numpy())
        took = time.perf_counter() - started
        if len(rows) * settings.batch >= settings.clips if settings.clips else took >= settings.seconds:
            break
    _wait(device)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    bad = loader.damage.found
    return _Run(first_batch_s, np.concatenate(rows), seconds, cpu, before, _memory(), bad)


def _passed_over(feed: Feed) -> int:
    """Batches after the first that are not counted: what threads have ready says nothing of how fast they are."""
    return feed.workers + AHEAD if feed.workers else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory() -> dict[str, int]:
    """Resident memory in bytes: VmRSS, what there is; VmHWM, the most that there was."""
    lines = map(str.split, Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0] in ("VmRSS:", "VmHWM:")}


def _conditions(shards: Shards, settings: LoaderSettings, device: torch.device) -> dict[str, Any]:
    """Everything that the figures depend on."""
    feed = settings.feed
    return {
        "shards": [part.store.place for part in shards.sets],
        "clips_in_index": len(shards),
        "encodings": _encodings(shards),
        "sample_rate": shards.sample_rate,
        "batch": settings.batch,
        "crop_s": settings.crop_s,
        "sampling": settings.sampling,
        "access": feed.access,
        "workers": feed.workers,
        "check_hashes": feed.check,
        "cache": None if settings.cache is None else str(settings.cache),
        "cores": len(os.sched_getaffinity(0)),
        "device": str(device),
    }


def _figures(shards: Shards, run: _Run, crop: int, check: bool) -> dict[str, Any]:
    """What follows from the run."""
    clips, seconds, encoded = len(run.rows), run.seconds, _encoded_bytes(shards, run.rows, crop, check)
    lengths = shards.samples[run.rows]
    samples = int((np.minimum(lengths, crop) if crop else lengths).sum())
    return {
        "first_batch_s": run.first_batch_s,
        "clips": clips,
        "seconds": seconds,
        "clips_per_s": clips / seconds,
        "times_real_time": samples / shards.sample_rate / seconds,
        "read_mb_per_s": None if encoded is None else encoded / seconds / 1e6,
        "delivered_mb_per_s": 2 * samples / seconds / 1e6,
        "cpu_ms_per_clip": 1e3 * run.cpu_s / clips,
        "memory_bytes": run.after["VmRSS"],
        "memory_growth_bytes": run.after["VmRSS"] - run.before["VmRSS"],
        "peak_memory_bytes": run.after["VmHWM"],
        "bad_clips": len(run.bad),
        "bad_reasons": dict(Counter(bad.reason for bad in run.bad)),
    }


def _encoded_bytes(shards: Shards, rows: NDArray[np.int64], crop: int, check: bool) -> int | None:
    """What is read of these clips; None where the HDF5 library reads one in its own way."""
    whole, which = shards.stored(rows), shards.set_of[rows]
    total = 0
    for number, part in enumerate(shards.sets):
        here = whole[which == number] - shards.reader.firsts[number]
        length = part.index["length"].fill_null(-1).to_numpy()[here]
        if (length < 0).any():
            return None
        codes, names = np.zeros(len(here), np.int32), [part.info["spec"]["encoding"]]
        if "codec" in part.index.column_names:
            every, names = part.index.coded("codec")
            codes = every[here]
        samples = part.index["samples"].to_numpy()[here]
        wanted = np.minimum(samples, crop) if crop and not check else samples
        raw = np.array([name == "pcm16" for name in names], bool)[codes]
        total += int(np.where(raw, 2 * wanted, length).sum())
    return total


def _encodings(shards: Shards) -> list[str]:
    return sorted({part.info["spec"]["encoding"] for part in shards.sets})


def _advice(by: str, floors: dict[str, Floor], shards: Shards, settings: LoaderSettings) -> str | None:
    """The flag that helps; None where there is none."""
    if by == "store" and floors["store"].mb_per_s is None:
        return "the HDF5 library reads one clip at a time; tars and uncompressed HDF5 are read by all threads at once"
    workers, cores = settings.feed.workers, len(os.sched_getaffinity(0))
    far = shards.far
    if by == "store" and far:
        more = f"--workers {2 * max(1, workers)} has more requests under way"
        return more if settings.cache else f"--cache DIR keeps on this machine what was read once; {more}"
    if by != "device" and workers < cores:
        return f"--workers {cores}: this process may use {cores} cores, and reads ahead with {workers}"
    if by == "decode" and _encodings(shards) != ["pcm16"]:
        return "shards made with --encoding pcm16 need no decoding, and about twice the disk"
    if by == "store" and "pcm16" in _encodings(shards):
        return "shards made with --encoding flac take about half the bytes"
    if by == "loader" and settings.batch < 32:
        return "a larger --batch costs less for each clip"
    return "--crop-s copies less of each clip" if by == "device" and not settings.crop_s else None
