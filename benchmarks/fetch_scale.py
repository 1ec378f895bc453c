"""How a fetch of the whole of AudioSet starts and tells, with 2.08 million rows: each figure one whole process.

    python benchmarks/fetch_scale.py              writes about 1.5 GB to the temporary folder; three minutes
    python benchmarks/fetch_scale.py --rows 100000

A synthetic list of the official size; a ledger in which 87 % of it was had and 8 % lost; a local server. Measured: from
the start of the command to its first request, when nothing has been fetched and when 5 % is left, and `--status`; with
each process's peak memory. The floor is Python importing pyarrow and reading the
manifest's keys. Prints JSON.
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from manifest import ROWS, apart, write_synthetic

from clipmill.fetch.ledger import Ledger

FLOOR = "import sys, pyarrow.parquet as pq; pq.read_table(sys.argv[1], columns=['key'])"


def fill(path: Path, manifest: Path, seed: int = 0) -> None:
    """A ledger as months of fetching leave it: 87 % had, 8 % lost, 5 % left."""
    keys = pq.read_table(manifest, columns=["key"])["key"].to_pylist()
    rng = np.random.default_rng(seed)
    drawn = rng.random(len(keys))
    reasons = np.array(["unavailable", "private", "account-terminated", "network"])[
        rng.integers(0, 4, len(keys))
    ]
    now = time.time()

    def rows():
        for key, draw, reason in zip(keys, drawn, reasons, strict=True):
            if draw < 0.87:
                yield (
                    key,
                    f"ab/{key}.webm",
                    "had",
                    "",
                    "",
                    "unbalanced_train",
                    170_000,
                    "0" * 64,
                    10.0,
                    0.2,
                    10.2,
                    now,
                )
            elif draw < 0.95:
                message = f"[youtube] {key[:11]}: Video unavailable. This video is no longer available"
                yield (key, "", "failed", str(reason), message, "unbalanced_train", *[None] * 5, now)

    with Ledger(path, write=True) as ledger, ledger._base:
        ledger._insert(rows())


class Refuser(BaseHTTPRequestHandler):
    """Notes when the first request comes, and answers 404."""

    first = 0.0

    def do_GET(self) -> None:
        Refuser.first = Refuser.first or time.perf_counter()
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def timed(command: list[str], until_first: bool = False) -> dict[str, float]:
    """Seconds and peak megabytes of a process; or seconds until the server was first asked, and then it is ended."""
    os.sync()  # what came before has left the disk alone
    Refuser.first, began = 0.0, time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if until_first:
            while not Refuser.first:
                time.sleep(0.005)
            process.terminate()
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    ended = Refuser.first if until_first else time.perf_counter()
    return {"seconds": round(ended - began, 2), "peak_megabytes": round(usage.ru_maxrss / 1024)}


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
        path = folder / "unbalanced_train_segments.csv"
        fetch = [
            sys.executable, "-m", "clipmill", "fetch", "audioset", "--root", str(folder / "data"), "--list", str(path),
            "--label-table", str(folder / "class_labels_indices.csv"),
            "--url-template", f"http://127.0.0.1:{server.server_address[1]}/{{id}}.webm",
        ]  # fmt: skip
        found = {"rows": rows, "first start to first request": timed(fetch, until_first=True)}
        manifest = folder / "data/audioset/manifest.parquet"
        (folder / "data/audioset/ledger.sqlite").unlink()
        apart(fill, folder / "data/audioset/ledger.sqlite", manifest)
        found["restart to first request"] = timed(fetch, until_first=True)
        found["--status"] = timed([*fetch[:7], "--status"])
        found["floor: import pyarrow, read the keys"] = timed([sys.executable, "-c", FLOOR, str(manifest)])
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
