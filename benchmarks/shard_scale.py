"""How sharding the whole of AudioSet starts, and how it ends when all is done: 2.08 million clips, whole processes.

    python benchmarks/shard_scale.py              writes about 4 GB to the temporary folder; some five minutes
    python benchmarks/shard_scale.py --rows 100000

A synthetic list of the official size, every clip of it had. Measured: `pipeline shard audioset` from its start to the
first shard that a worker begins (reading manifest and ledger, planning, writing the plan, starting a worker); then,
with made-up files in the place of all shards, the tables put together from their records; the same command when there
is nothing left to do; and when one clip more has come, for `--append` to plan. Each with its peak memory. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
from fetch_scale import Refuser, timed
from manifest import ROWS, apart, write_synthetic

from clipmill import tables
from clipmill.fetch.fetched import load
from clipmill.fetch.ledger import Ledger
from clipmill.shards.plan import plan, read_layout
from clipmill.shards.write import record_path


def fill(path: Path, manifest: Path, skip: int) -> None:
    """A ledger in which all clips but the first `skip` were had."""
    keys = pq.read_table(manifest, columns=["key"])["key"].to_pylist()[skip:]
    now = time.time()
    with Ledger(path, write=True) as ledger, ledger._base:
        ledger._insert(
            (key, f"{key[:2]}/{key}.webm", "had", "", "", "unbalanced_train", 170_000, "0" * 64, 10.6, 0.3, 10.3, now)
            for key in keys
        )  # fmt: skip


def until_first_shard(command: list[str], out: Path) -> dict[str, float]:
    """Seconds and peak megabytes of the command until a worker begins a shard; then it is ended."""
    os.sync()
    began, ended = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not ended and process.poll() is None:
            time.sleep(0.01)
            ended = time.perf_counter() if any(out.glob(".*.tar.*.tmp")) else 0.0
        process.terminate()
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return {"seconds": round(ended - began, 2), "peak_megabytes": round(usage.ru_maxrss / 1024)}


def finish(root: Path, out: Path) -> None:
    """Put a file and a record in the place of every shard that was planned."""
    got = load(root, "audioset")
    layout = read_layout(out)
    assert layout is not None
    for unit in plan(layout, got.manifest, got.media_root, out):
        rows = unit.clips.drop_columns(["bytes"]).to_pydict()
        count = unit.clips.num_rows
        measured = {
            "samples": 441_000, "sha256": "0" * 64, "duration_s": 10.0, "source_rate": 48_000, "source_channels": 2,
            "peak_db": -1.234567, "rms_db": -20.98765, "loudness_lufs": -22.12, "dc": 0.00012, "clipped": 0.0,
            "silent": 0.0123, "bandwidth_hz": 15_503.9,
        }  # fmt: skip
        rows |= {name: [value] * count for name, value in measured.items()}
        rows |= {
            "shard": [unit.name] * count,
            "row": list(range(count)),
            "offset": [512 + 600_000 * row for row in range(count)],
            "length": [590_000] * count,
        }
        (out / unit.name).write_bytes(b"\0" * 1024)
        record = {
            "shard": unit.name, "unit": unit.hash, "spec": vars(unit.spec), "sha256": "0" * 64, "size": 1024,
            "counts": {"clips": count, "written": count, "failed": 0},
            "index": {name: rows[name] for name in tables.INDEX.names}, "failures": [],
        }  # fmt: skip
        record_path(out / unit.name).write_text(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=ROWS)
    rows = parser.parse_args().rows
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuser)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        apart(write_synthetic, folder, rows)
        data = folder / "data"
        fetch = [
            sys.executable, "-m", "clipmill", "fetch", "audioset", "--root", str(data),
            "--list", str(folder / "unbalanced_train_segments.csv"),
            "--label-table", str(folder / "class_labels_indices.csv"),
            "--url-template", f"http://127.0.0.1:{server.server_address[1]}/{{id}}.webm",
        ]  # fmt: skip
        timed(fetch, until_first=True)
        ledger, manifest = data / "audioset/ledger.sqlite", data / "audioset/manifest.parquet"
        ledger.unlink()
        apart(fill, ledger, manifest, 1)
        out = data / "audioset/shards/webdataset-flac-44100"
        shard = [sys.executable, "-m", "clipmill", "shard", "audioset", "--root", str(data), "--jobs", "2"]
        found = {"rows": rows, "start to first shard": until_first_shard(shard, out)}
        for left in out.glob("audioset-*"):
            left.unlink()
        apart(finish, data, out)
        found["all shards built: put the tables together"] = timed(shard)
        found["nothing left to do"] = timed(shard)
        ledger.unlink()
        apart(fill, ledger, manifest, 0)
        found["one clip more: --append to first shard"] = until_first_shard([*shard, "--append"], out)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
