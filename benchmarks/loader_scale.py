"""Starting to read AudioSet: 2,084,320 clips of 527 classes, opened, filtered, sampled, up to the first step's clips.

    python benchmarks/loader_scale.py

An index as `pipeline shard` writes it, with labels as frequent as AudioSet's are, and no audio. Each sampling runs in
a process of its own: seconds from before the shards are opened to the clips and targets of the first step, seconds for
the steps after it, and peak memory above that of the imports. The floor beside it is
reading the columns that this needs by pyarrow.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipmill import tables
from clipmill.shards.account import DATASET_FILE, FILES, INDEX_FILE

CLIPS, CLASSES, PER_SHARD, STEPS = 2_084_320, 527, 1024, 200

CHILD = """
import json, resource, sys, time
import numpy as np, pyarrow.parquet
from concurrent.futures import ThreadPoolExecutor
from clipmill import tables
from clipmill.shards.read import Shards
where, sampling, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
from clipmill.loader import choose_sampler          # brings torch, whose memory is not ours
from pathlib import Path
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
peak = lambda: 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
imported, began = resident(), time.perf_counter()
if sampling == "floor":
    columns = ["shard", "offset", "length", "samples", "key", "labels", "split"]
    table = pyarrow.parquet.ParquetFile(Path(where) / "index.parquet").read(columns=columns)
    print(json.dumps({"start_s": time.perf_counter() - began, "memory": peak() - imported}))
    sys.exit()
shards = Shards.open(where).where("split == 'unbalanced_train' or split == 'balanced_train'")
sampler = choose_sampler(shards, sampling, 0)
rows = sampler.rows(np.arange(32))
out = np.empty((32, 0), np.int16)
shards.read_into(rows, out)                          # finds the places; of no samples nothing is read
shards.targets_of(rows)
started = time.perf_counter()
for step in range(1, steps):
    rows = sampler.rows(np.arange(32 * step, 32 * step + 32))
    shards.targets_of(rows)
with ThreadPoolExecutor(8) as pool:                  # as many as read ahead: none may hold copies of its own
    list(pool.map(lambda _: (shards.samples, shards.label_ids, shards.read_into(rows, out)), range(8)))
print(json.dumps({"start_s": started - began, "step_ms": 1e3 * (time.perf_counter() - started) / steps,
                  "memory": peak() - imported, "clips": len(shards)}))
"""


def write(folder: Path) -> None:
    """A dataset.json and an index.parquet of `CLIPS` clips."""
    rng = np.random.default_rng(0)
    names = [f"class {number:03d}" for number in range(CLASSES)]
    share = 1 / np.arange(1, CLASSES + 1)
    counts = rng.integers(1, 4, CLIPS)
    ids = rng.choice(CLASSES, counts.sum(), p=share / share.sum())
    # No clip has a label twice: a second one of the same becomes the next class.
    owner = np.repeat(np.arange(CLIPS), counts)
    order = np.lexsort((ids, owner))
    ids, owner = ids[order], owner[order]
    again = np.r_[False, (ids[1:] == ids[:-1]) & (owner[1:] == owner[:-1])]
    ids, owner = ids[~again], owner[~again]
    firsts = np.searchsorted(owner, np.arange(CLIPS + 1)).astype(np.int32)
    labels = pa.ListArray.from_arrays(
        firsts, pa.DictionaryArray.from_arrays(ids.astype(np.int32), names).cast(pa.string())
    )
    numbers = np.arange(CLIPS)
    shards = [f"audioset-{number:06d}.tar" for number in range(-(-CLIPS // PER_SHARD))]
    split = np.where(numbers < 22_000, 0, np.where(numbers < 42_000, 1, 2)).astype(np.int32)
    columns = {
        "key": pa.array([f"Y{number * 7919 % 10**9:011d}_{number % 500}000" for number in numbers]),
        "shard": pa.DictionaryArray.from_arrays((numbers // PER_SHARD).astype(np.int32), shards).cast(
            pa.string()
        ),
        "row": (numbers % PER_SHARD).astype(np.int32),
        "offset": numbers % PER_SHARD * 450_000 + 512,
        "length": np.full(CLIPS, 448_123),
        "samples": np.full(CLIPS, 441_000),
        "labels": labels,
        "split": pa.DictionaryArray.from_arrays(split, ["balanced_train", "eval", "unbalanced_train"]).cast(
            pa.string()
        ),
        "source": pa.array([f"media/{number:07d}.webm" for number in numbers]),
        "sha256": pa.array([f"{number:064x}" for number in rng.integers(0, 2**62, CLIPS)]),
    }
    filler = {pa.float64(): 10.0, pa.float32(): 0.1, pa.int32(): 48000}
    for field in tables.INDEX:
        if field.name not in columns:
            values = pa.nulls(CLIPS, field.type) if field.nullable else np.full(CLIPS, filler[field.type])
            columns[field.name] = values
    tables.write_table(folder / INDEX_FILE, pa.table(columns, schema=tables.INDEX))
    said = {
        **{
            "name": "audioset",
            "labels": names,
            "root_sha256": "",
            "stopped": None,
            "about": {},
            "made_from": {},
        },
        "spec": {"format": "webdataset", "encoding": "flac", "sample_rate": 44100},
        "counts": {"in": CLIPS, "written": CLIPS, "failed": 0, "skipped": 0, "reasons": {}},
        "shards": [
            {"shard": name, "bytes": 0, "clips": PER_SHARD, "written": PER_SHARD, "sha256": "", "failed": 0}
            for name in shards
        ],
        "files": dict.fromkeys(FILES, ""),
    }
    tables.write_json(folder / DATASET_FILE, said)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        size = (Path(folder) / INDEX_FILE).stat().st_size
        print(f"{CLIPS:,} clips, {CLASSES} classes, an index of {size / 1e6:.0f} MB")
        for sampling in ("floor", "shuffled", "balanced", "weighted", "sequential"):
            found = []
            for _ in range(3):
                command = [sys.executable, "-c", CHILD, folder, sampling, str(STEPS)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                found.append(json.loads(done.stdout))
            one = sorted(found, key=lambda row: row["start_s"])[1]
            step = f", {one['step_ms']:.2f} ms for each step's clips and targets" if "step_ms" in one else ""
            print(
                f"{sampling:<11} {one['start_s']:.2f} s to the first step{step}, {one['memory'] / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
