"""The copies of the clips that `benchmarks/loader.py` reads: ours, and each other library's, of the very same samples.

    python benchmarks/loader_sets.py SET WORK        make one of `SETS` from WORK/wav and WORK/flac

`benchmarks/loader.py` runs this for each set, in a process of its own.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import zlib
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from clipmill.audio import encode, prepare_file
from clipmill.run import Local
from clipmill.shards.convert import convert
from clipmill.shards.job import make_shards
from clipmill.shards.plan import ShardSpec
from clipmill.tables import manifest_table, write_json

RATE = 44100
SUFFIXES = {"wav": "pcm16", "flac": "flac"}
"""The two folders of plain files, and the encoding of each."""
TRUTH = "truth.json"
Wave = NDArray[np.int16]


def prepare(source: Path, work: Path, clips: int, seconds: int) -> None:
    """`clips` numbered files as WAV and as FLAC, each real clip under several numbers, and what they hold.

    Clips are as `pipeline shard` has them: mono, 44.1 kHz, padded to whole seconds; with `seconds`, cut or
    repeated to so many.
    """
    waves = [prepare_file(path, RATE) for path in sorted(source.iterdir())[:clips]]
    if seconds:
        waves = [np.resize(wave, seconds * RATE) for wave in waves]
    for suffix, encoding in SUFFIXES.items():
        shutil.rmtree(work / suffix, ignore_errors=True)
        (work / suffix).mkdir(parents=True)
        encoded = [encode(wave, RATE, encoding) for wave in waves]
        for number in range(clips):
            (work / suffix / f"{number:06d}.{suffix}").write_bytes(encoded[number % len(waves)])
    repeated = [waves[number % len(waves)] for number in range(clips)]
    write_json(
        work / TRUTH,
        {"samples": [len(wave) for wave in repeated], "crc32": [zlib.crc32(wave.data) for wave in repeated]},
    )


def numbered(work: Path, suffix: str) -> list[Path]:
    """The clips as files of a kind; each one's place is its number."""
    return sorted((work / suffix).iterdir())


def decoded(source: Path | bytes) -> Wave:
    """A FLAC or WAV file by soundfile: int16 `[samples]`."""
    return soundfile.read(io.BytesIO(source) if isinstance(source, bytes) else source, dtype="int16")[0]


def make_tar(work: Path, out: Path) -> None:
    """Our tars with FLAC, from the WAVs."""
    paths = numbered(work, "wav")
    columns = {
        "key": [path.stem for path in paths],
        "source": [path.name for path in paths],
        "labels": [[f"class{number % 10}"] for number in range(len(paths))],
    }
    manifest, spec = manifest_table(columns), ShardSpec(sample_rate=RATE, keep_silent=True)
    made = make_shards("clips", manifest, [], work / "wav", out, spec, engine=Local(2))
    assert made["counts"]["written"] == len(paths), made["counts"]


def make_converted(format: str, encoding: str, work: Path, out: Path) -> None:
    """Our other shards, from the tars with FLAC."""
    convert(work / "tar-flac", out, format, encoding, engine=Local(2))


def stored(suffix: str, path: Path) -> dict[str, Any]:
    """What litdata and MosaicML keep of a clip: its samples as bytes, or its FLAC file."""
    return {
        "number": int(path.stem),
        "audio": decoded(path).tobytes() if suffix == "wav" else path.read_bytes(),
    }


def make_litdata(suffix: str, work: Path, out: Path) -> None:
    """litdata's chunks, of the size that its documentation names."""
    import_module("litdata").optimize(
        fn=partial(stored, suffix), inputs=numbered(work, suffix), output_dir=str(out),
        chunk_bytes="64MB", num_workers=2, verbose=False,
    )  # fmt: skip


def make_mosaic(suffix: str, work: Path, out: Path) -> None:
    """MosaicML's MDS shards, of the size that is usual there: 64 MiB."""
    columns = {"number": "int", "audio": "bytes"}
    with import_module("streaming").MDSWriter(out=str(out), columns=columns) as writer:
        for path in numbered(work, suffix):
            writer.write(stored(suffix, path))


def make_shar(suffix: str, work: Path, out: Path) -> None:
    """lhotse's Shar. Its own writer goes through floats and moves samples by one; files are put in as they are."""
    lhotse, writers = import_module("lhotse"), import_module("lhotse.shar.writers")
    placeholder = import_module("lhotse.shar.utils").to_shar_placeholder
    size = ShardSpec().clips_per_shard
    out.mkdir()
    with (
        writers.JsonlShardWriter(f"{out}/cuts.%06d.jsonl.gz", size) as cuts,
        writers.TarWriter(f"{out}/recording.%06d.tar", size) as tar,
    ):
        for path in numbered(work, suffix):
            recording = placeholder(lhotse.Recording.from_file(path))
            tar.write(path.name, io.BytesIO(path.read_bytes()))
            said = json.dumps(recording.to_dict()).encode()
            tar.write(f"{path.stem}.json", io.BytesIO(said), count=False)
            cuts.write(recording.to_cut())


SETS: dict[str, Callable[[Path, Path], None]] = {
    "tar-flac": make_tar,
    "tar-pcm16": partial(make_converted, "webdataset", "pcm16"),
    "hdf5-flac": partial(make_converted, "hdf5", "flac"),
    "hdf5-pcm16": partial(make_converted, "hdf5", "pcm16"),
    "litdata-flac": partial(make_litdata, "flac"),
    "litdata-pcm16": partial(make_litdata, "wav"),
    "mosaic-flac": partial(make_mosaic, "flac"),
    "mosaic-pcm16": partial(make_mosaic, "wav"),
    "lhotse-flac": partial(make_shar, "flac"),
    "lhotse-pcm16": partial(make_shar, "wav"),
}
"""What is made beside the plain files; ours are made of one another, in this order."""


if __name__ == "__main__":
    work = Path(sys.argv[2])
    SETS[sys.argv[1]](work, work / sys.argv[1])
