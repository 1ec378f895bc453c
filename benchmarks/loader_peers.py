"""What `benchmarks/loader.py` compares: our loader, other libraries', and the floors.

    python benchmarks/loader_peers.py NAME WORK WORKERS BATCH            read one set once; prints figures as JSON
    python benchmarks/loader_peers.py NAME WORK WORKERS BATCH --check    the same, and compare every sample

`benchmarks/loader.py` runs this, each time in a process of its own. Everything gives batches of int16
`[batch, longest]`, zeros at the ends of shorter clips, with the clips' numbers.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
import torch
from loader_sets import TRUTH, Wave, decoded, numbered
from torch.utils.data import DataLoader, Dataset, default_collate

from clipmill.audio.stored import decode_flac_into
from clipmill.shards.read import Shards
from clipmill.tables import read_json

BUFFER = 1000  # clips in the shuffle buffers of those that have one
WAV_HEADER = 44  # bytes
Item = tuple[Wave, int]
Batches = Iterator[tuple[Any, Any]]


def collated(items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch, by torch's own collation: in a worker it writes straight into shared memory."""
    waves, numbers = zip(*items, strict=True)
    longest = max(len(wave) for wave in waves)
    padded = [wave if len(wave) == longest else np.pad(wave, (0, longest - len(wave))) for wave in waves]
    return default_collate(padded), torch.tensor(numbers)


# The loaders: each is given the folder of its set, the number of workers and the batch size.


def ours(folder: Path, workers: int, batch: int) -> Batches:
    """Our tars or HDF5."""
    loading = import_module("clipmill.loader")
    shards = Shards.open(folder)
    numbers = shards.columns["key"].cast(pa.int64()).to_numpy()
    sampler, device = loading.Shuffled(len(shards), seed=0), torch.device("cpu")
    loader = loading.Loader(shards, batch, sampler=sampler, workers=workers, device=device)
    left = len(shards)
    for got in loader.batches(0, -(-left // batch)):
        # The last batch goes on into the next epoch.
        yield got.waves[:left], numbers[got.rows[:left]]
        left -= batch


class Files(Dataset[Item]):
    """A folder of sound files."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Item:
        return decoded(self.paths[place]), place


def files(folder: Path, workers: int, batch: int) -> Batches:
    """torch alone."""
    dataset = Files(numbered(folder.parent, folder.name))
    yield from DataLoader(dataset, batch, shuffle=True, num_workers=workers, collate_fn=collated)


def is_audio(name: str) -> bool:
    return not name.endswith(".json")


def webdataset_item(sample: dict[str, Any]) -> Item:
    return decoded(sample["flac"] if "flac" in sample else sample["wav"]), int(sample["__key__"])


def webdataset(folder: Path, workers: int, batch: int) -> Batches:
    """The webdataset library over our tars; what it shuffles are bytes, decoded later."""
    library = import_module("webdataset")
    paths = sorted(map(str, folder.glob("*.tar")))
    dataset = library.WebDataset(paths, shardshuffle=len(paths), select_files=is_audio, seed=0)
    dataset = dataset.shuffle(BUFFER).map(webdataset_item).batched(batch, collation_fn=collated)
    yield from library.WebLoader(dataset, batch_size=None, num_workers=workers)


def stored_batch(samples: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of what litdata and MosaicML keep: FLAC files, or samples as bytes."""
    kept = [(sample["audio"], int(sample["number"])) for sample in samples]
    return collated([
        (decoded(audio) if audio[:4] == b"fLaC" else np.frombuffer(audio, np.int16), number)
        for audio, number in kept
    ])  # fmt: skip


def litdata(folder: Path, workers: int, batch: int) -> Batches:
    """litdata's own loader."""
    library = import_module("litdata")
    dataset = library.StreamingDataset(str(folder), shuffle=True)
    yield from library.StreamingDataLoader(
        dataset, batch_size=batch, num_workers=workers, collate_fn=stored_batch
    )


def mosaic(folder: Path, workers: int, batch: int) -> Batches:
    """MosaicML streaming's own loader."""
    library = import_module("streaming")
    dataset = library.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    yield from library.StreamingDataLoader(
        dataset, batch_size=batch, num_workers=workers, collate_fn=stored_batch
    )


class Cuts(Dataset[Any]):
    """What lhotse's users write: its sampler gives a batch's cuts, its decoder their samples as floats."""

    def __getitem__(self, cuts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return collated([
            ((cut.load_audio()[0] * np.float32(32768)).astype(np.int16), int(cut.id)) for cut in cuts
        ])  # fmt: skip


def lhotse(folder: Path, workers: int, batch: int) -> Batches:
    """lhotse's Shar, its shards split over the workers: with a seed for each, as in its recipes, epochs never end."""
    library, samplers = import_module("lhotse"), import_module("lhotse.dataset.sampling")
    wrapper = import_module("lhotse.dataset.iterable_dataset").IterableDatasetWrapper
    cuts = library.CutSet.from_shar(in_dir=folder, split_for_dataloading=True, shuffle_shards=True, seed=0)
    sampler = samplers.DynamicCutSampler(
        cuts, max_cuts=batch, shuffle=True, shuffle_buffer_size=BUFFER, rank=0, world_size=1
    )
    yield from DataLoader(wrapper(Cuts(), sampler), batch_size=None, num_workers=workers)


# The floors: nothing but the work itself, in threads, each with a buffer that is there already. What they need is
# loaded as they are called, before the clock starts; their first batch is empty, their second is everything.


def in_threads(
    work: Callable[[Sequence[int], Wave], None], samples: Sequence[int], workers: int, batch: int
) -> Batches:
    """`work` on a part of the clips in each of the threads, in random order."""
    order = np.random.default_rng(0).permutation(len(samples))
    buffers = [np.zeros((batch, max(samples)), np.int16) for _ in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        yield None, []
        list(pool.map(work, [order[first::workers] for first in range(workers)], buffers))
        yield None, order


def decoding(decode_into: Callable[[bytes, Wave], None]) -> Callable[[Path, int, int], Batches]:
    """A decoder by itself, over FLAC files in memory."""

    def floor(folder: Path, workers: int, batch: int) -> Batches:
        files = [path.read_bytes() for path in numbered(folder.parent, folder.name)]
        samples = read_json(folder.parent / TRUTH)["samples"]

        def work(part: Sequence[int], buffer: Wave) -> None:
            for turn, number in enumerate(part):
                decode_into(files[number], buffer[turn % batch, : samples[number]])

        return in_threads(work, samples, workers, batch)

    return floor


def libsndfile(data: bytes, out: Wave) -> None:
    soundfile.read(io.BytesIO(data), out=out, dtype="int16")


def preadv(folder: Path, workers: int, batch: int) -> Batches:
    """Reading by itself: one positioned read for each clip."""
    index = Shards.open(folder).index.sort_by("key")
    opened = {name: os.open(folder / name, os.O_RDONLY) for name in index["shard"].unique().to_pylist()}
    shards, offsets, samples = (index[name].to_pylist() for name in ("shard", "offset", "samples"))

    def work(part: Sequence[int], buffer: Wave) -> None:
        header = bytearray(WAV_HEADER)
        for turn, number in enumerate(part):
            wave = buffer[turn % batch, : samples[number]]
            read = os.preadv(opened[shards[number]], [header, wave.data], offsets[number])
            assert read == WAV_HEADER + wave.nbytes

    return in_threads(work, samples, workers, batch)


@dataclass(frozen=True)
class Contender:
    """One thing that is measured: the set that it reads, and what is imported before the clock starts."""

    batches: Callable[[Path, int, int], Batches]
    set: str
    needs: tuple[str, ...] = ()

    @property
    def encoding(self) -> str:
        return "flac" if "flac" in self.set else "pcm16"


OURS = ("clipmill.loader",)
LHOTSE = ("lhotse", "lhotse.dataset.iterable_dataset", "lhotse.dataset.sampling")
CONTENDERS = {
    "ours-tar-flac": Contender(ours, "tar-flac", OURS),
    "ours-hdf5-flac": Contender(ours, "hdf5-flac", OURS),
    "webdataset-flac": Contender(webdataset, "tar-flac", ("webdataset",)),
    "files-flac": Contender(files, "flac"),
    "litdata-flac": Contender(litdata, "litdata-flac", ("litdata",)),
    "mosaic-flac": Contender(mosaic, "mosaic-flac", ("streaming",)),
    "lhotse-flac": Contender(lhotse, "lhotse-flac", LHOTSE),
    "floor-dr_flac": Contender(decoding(decode_flac_into), "flac"),
    "floor-soundfile": Contender(decoding(libsndfile), "flac"),
    "ours-tar-pcm16": Contender(ours, "tar-pcm16", OURS),
    "ours-hdf5-pcm16": Contender(ours, "hdf5-pcm16", OURS),
    "webdataset-pcm16": Contender(webdataset, "tar-pcm16", ("webdataset",)),
    "files-pcm16": Contender(files, "wav"),
    "litdata-pcm16": Contender(litdata, "litdata-pcm16", ("litdata",)),
    "mosaic-pcm16": Contender(mosaic, "mosaic-pcm16", ("streaming",)),
    "lhotse-pcm16": Contender(lhotse, "lhotse-pcm16", LHOTSE),
    "floor-preadv": Contender(preadv, "tar-pcm16"),
}


def cpu_s() -> float:
    """Seconds of processor time, of this process and of those of its children that have ended."""
    mine, theirs = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime


def epoch(contender: Contender, work: Path, workers: int, batch: int, check: bool) -> dict[str, float]:
    """One whole epoch: seconds to the first batch, clips a second after it and with it, processor time.

    Raises:
        AssertionError: a clip did not come just once, or, with `check`, not as it is.
    """
    truth, seen = read_json(work / TRUTH), []
    batches = contender.batches(work / contender.set, workers, batch)
    cpu, began, times = cpu_s(), time.perf_counter(), []
    for waves, numbers in batches:
        times.append(time.perf_counter())
        seen.append([int(number) for number in numbers])
        if check and waves is not None:
            assert waves.dtype is torch.int16
            for wave, number in zip(waves.numpy(), seen[-1], strict=True):
                samples, rest = np.split(wave, [truth["samples"][number]])
                assert zlib.crc32(samples.data) == truth["crc32"][number], f"clip {number} has other samples"
                assert not rest.any(), f"clip {number} is not padded with zeros"
    cpu = cpu_s() - cpu  # the workers have ended by now
    clips = len(truth["samples"])
    came = sorted(number for numbers in seen for number in numbers)
    assert came == list(range(clips)), (
        f"{len(came)} clips came, {len(set(came))} of them different, of {clips}"
    )
    return {
        "first_s": times[0] - began,
        "clips_s": (clips - len(seen[0])) / (times[-1] - times[0]),
        "clips_s_with_first": clips / (times[-1] - began),
        "cpu_s": cpu / clips,
    }


def main() -> None:
    name, work, workers, batch = sys.argv[1:5]
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is copied anyway
    contender = CONTENDERS[name]
    for library in contender.needs:
        import_module(library)
    print(json.dumps(epoch(contender, Path(work), int(workers), int(batch), "--check" in sys.argv)))


if __name__ == "__main__":
    main()
