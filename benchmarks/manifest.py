"""How long AudioSet's 2.08 million rows take to become a manifest, and how much memory.

    python benchmarks/manifest.py                 a synthetic list of the official size and format
    python benchmarks/manifest.py --real DIR      the official lists in DIR (those that are there)

Each measurement is a process of its own. Prints JSON: seconds and peak memory of the manifest, and of the
floor: reading the same bytes and splitting their lines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROWS = 2_084_320
LABELS = 527
ALPHABET = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", dtype=np.uint8)


def write_synthetic(folder: Path, rows: int, seed: int = 0) -> list[Path]:
    """A list in the official format: random ids and starts, one to six labels a row; and its label table."""
    rng = np.random.default_rng(seed)
    mids = np.array([f"/m/0{number:04x}" if number % 9 else f"/t/dd{number:05d}" for number in range(LABELS)])
    letters = ALPHABET[rng.integers(0, len(ALPHABET), size=(rows, 11))]
    ids = pa.Array.from_buffers(
        pa.string(),
        rows,
        [None, pa.py_buffer(np.arange(0, 11 * (rows + 1), 11, dtype=np.int32)), pa.py_buffer(letters)],
    )
    starts = rng.integers(0, 600, size=rows)
    counts = np.minimum(rng.geometric(0.5, size=rows), 6)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    labels = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(mids).take(pa.array(rng.integers(0, LABELS, offsets[-1])))
    )
    lines = pc.binary_join_element_wise(
        ids,
        pc.binary_join_element_wise(pa.array(starts).cast(pa.string()), ".000", ""),
        pc.binary_join_element_wise(pa.array(starts + 10).cast(pa.string()), ".000", ""),
        pc.binary_join_element_wise('"', pc.binary_join(labels, ","), '"', ""),
        ", ",
    )
    path = folder / "unbalanced_train_segments.csv"
    with open(path, "wb") as file:
        file.write(b"# Segments csv\n")
        file.write(f"# num_ytids={rows}, num_segs={rows}, num_unique_labels={LABELS}\n".encode())
        file.write(b"# YTID, start_seconds, end_seconds, positive_labels\n")
        file.write(pc.binary_join(pa.ListArray.from_arrays([0, rows], lines), "\n")[0].as_buffer())
        file.write(b"\n")
    names = "".join(f'{number},{mid},"Sound {number}, so called"\n' for number, mid in enumerate(mids))
    (folder / "class_labels_indices.csv").write_text(f"index,mid,display_name\n{names}")
    return [path]


def apart(function: Callable[..., object], *arguments: object) -> None:
    """Call in a process of its own: what a parent holds counts as its children's peak memory too."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def manifest(folder: Path) -> int:
    from clipmill.datasets.audioset import Audioset

    lists = tuple(sorted(folder.glob("*_segments.csv")))
    dataset = Audioset(lists=lists, label_table=folder / "class_labels_indices.csv")
    return dataset.prepare(folder).manifest.num_rows


def floor(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) - 3 for path in folder.glob("*_segments.csv"))


def measured(what: str, folder: Path) -> dict[str, float]:
    """Run `what` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--inside", what, str(folder)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def inside(what: str, folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    rows = {"manifest": manifest, "floor": floor}[what](folder)
    return {
        "rows": rows,
        "seconds": round(time.perf_counter() - began, 2),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=Path, help="a folder with the official lists and the label table")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the synthetic list")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(inside(given.inside[0], Path(given.inside[1]))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.real or Path(scratch)
        if not given.real:
            apart(write_synthetic, folder, given.rows)
        size = sum(path.stat().st_size for path in folder.glob("*_segments.csv"))
        found = {what: measured(what, folder) for what in ("floor", "manifest")}
    print(json.dumps({"lists_megabytes": round(size / 2**20, 1), **found}, indent=1))


if __name__ == "__main__":
    main()
