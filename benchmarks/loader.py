"""Whole epochs in random order by clipmill's loader, and by other libraries', from the very same samples.

    python benchmarks/loader.py ../shared/data/esc10/audio            some quarter of an hour; 9 GB of temporary files
    python benchmarks/loader.py FOLDER --clips 4000 --seconds 10 --only ours,litdata,floor --json out.json

The other libraries stand in an environment beside clipmill, its own `pip install litdata mosaicml-streaming lhotse`;
what is not installed, or fails, is left out with the reason. FOLDER holds sound clips; each stands there under several
names until there are --clips of them: several shards of 256 for each worker, or those that share out shards have
nothing to share. They are kept as int16 at 44.1 kHz, padded to whole seconds, and as FLAC:

ours        tars and HDF5 through `clipmill.loader`, shuffled as a whole.
webdataset  the same tars through the webdataset library, a shuffle buffer of 1,000 clips.
files       a folder of WAVs, or of FLACs, with torch's Dataset and DataLoader, shuffled as a whole.
litdata     `optimize` and its streaming loader, shuffled as it does: chunks, and within them.
mosaic      MosaicML streaming: MDS shards and its streaming loader, shuffled as it does: in blocks.
lhotse      Shar, with its lazy reader and its dynamic sampler, a shuffle buffer of 1,000 clips.
floor       decoding FLAC from memory in bare threads, by dr_flac and by soundfile; reading samples by bare `preadv`.

All but ours, and lhotse, which has its own, decode FLAC by soundfile. All give batches of int16, with as many workers
(threads in ours, processes elsewhere), no pinned memory, and else each library's defaults. Each run is a process of
its own. In the first round every sample that comes is compared with what it should be, and memory is watched: what is
private or shared, without files that are mapped. It also warms the disk's cache. Then everything runs in turns,
--rounds times, and each time it is seen that every clip comes just once.

Clips a second count from the first batch on. `first` is from before the loader is built, its libraries imported, to
the first batch; CPU is of a whole epoch, workers too. Ratios are taken in each round, and their median is shown; the
best peer is the one that this is lowest to.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

from loader_peers import CONTENDERS
from loader_sets import RATE, SETS, TRUTH, prepare

from clipmill.tables import read_json, write_json

LIMIT_S = 1800
FLOORS = {"flac": "floor-dr_flac", "pcm16": "floor-preadv"}
LIBRARIES = (
    "clipmill",
    "webdataset",
    "litdata",
    "mosaicml-streaming",
    "lhotse",
    "soundfile",
    "torch",
    "numpy",
)


class Failed(Exception):
    """A process ended badly; says the last line of its log."""


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [below for child in listed.read_text().split() for below in tree(int(child))]
    return found


def memory_mb(pid: int) -> float:
    """Memory of a process and all below it; what several of them share counts once."""
    total = 0
    for one in tree(pid):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1])
    return total / 1024


def run(script: str, *arguments: object, watch: bool = False) -> tuple[str, float]:
    """One of the scripts beside this one: what it printed, and with `watch` its peak memory in MB.

    Raises:
        Failed: it failed, or took too long.
    """
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    peak, until = 0.0, time.monotonic() + LIMIT_S
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as log,
        tempfile.TemporaryDirectory() as leavings,  # locks and chunks that libraries forget
    ):
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, start_new_session=True,
            env=os.environ | {"TMPDIR": leavings},
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() < until:
                if watch:
                    try:
                        peak = max(peak, memory_mb(process.pid))
                    except OSError:  # a process that has just ended
                        continue
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        log.seek(0)
        if process.returncode:
            lines = log.read().split("\n")
            raise Failed(next((line for line in reversed(lines) if line.strip()), f"rc {process.returncode}"))
        return out.read(), peak


def make_sets(options: argparse.Namespace, work: Path, names: list[str]) -> dict[str, str]:
    """Whatever is not there yet of what the contenders read; returns why some of them cannot run."""
    settings = {"folder": str(options.folder.resolve()), "clips": options.clips, "seconds": options.seconds}
    if not (work / "settings.json").exists():
        prepare(options.folder, work, options.clips, options.seconds)
        write_json(work / "settings.json", settings)
    elif (found := read_json(work / "settings.json")) != settings:
        sys.exit(f"{work}: was made with {found}; --work elsewhere, or remove it")
    wanted = {CONTENDERS[name].set for name in names} & SETS.keys()
    # All our shards are made from one of them.
    wanted |= {"tar-flac"} if any(name.startswith(("tar", "hdf5")) for name in wanted) else set()
    failed = {}
    for name in (name for name in SETS if name in wanted and not (work / f"{name}.made").exists()):
        shutil.rmtree(work / name, ignore_errors=True)
        try:
            print(f"making {name}", file=sys.stderr, flush=True)
            run("loader_sets.py", name, work)
            (work / f"{name}.made").touch()
        except Failed as error:
            failed[name] = str(error)
    return {name: failed[CONTENDERS[name].set] for name in names if CONTENDERS[name].set in failed}


def measure(
    options: argparse.Namespace, work: Path, names: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures of all rounds of each contender, and why some are missing."""
    skipped = make_sets(options, work, names)
    found: dict[str, Any] = {name: {"rounds": []} for name in names if name not in skipped}
    for turn in range(options.rounds + 1):
        for name in list(found):
            print(f"round {turn} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            arguments = [name, work, options.workers, options.batch]
            try:
                if turn == 0:
                    found[name]["memory_mb"] = run("loader_peers.py", *arguments, "--check", watch=True)[1]
                else:
                    said = run("loader_peers.py", *arguments)[0]
                    found[name]["rounds"].append(json.loads(said.splitlines()[-1]))
            except Failed as error:
                skipped[name] = str(error)
                del found[name]
    return found, skipped


def summed_up(found: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The figures of each contender: medians over the rounds, and ratios to the others; `seconds` of a clip."""
    rows = {}
    for name, one in found.items():
        of = {key: [turn[key] for turn in one["rounds"]] for key in one["rounds"][0]}
        speed = median(of["clips_s"])
        rows[name] = {
            "encoding": CONTENDERS[name].encoding,
            "clips_s": speed,
            "clips_s_min": min(of["clips_s"]),
            "clips_s_max": max(of["clips_s"]),
            "clips_s_with_first": median(of["clips_s_with_first"]),
            "mb_s": speed * seconds * RATE * 2 / 1e6,
            "times_real_time": speed * seconds,
            "first_s": median(of["first_s"]),
            "cpu_ms_per_clip": 1000 * median(of["cpu_s"]),
            "memory_mb": one["memory_mb"],
            "rounds": one["rounds"],
        }
    for row in rows.values():
        peers = {
            name: ratio(row, other)
            for name, other in rows.items()
            if not name.startswith(("ours", "floor")) and other["encoding"] == row["encoding"]
        }
        if peers:
            row["best_peer"] = min(peers, key=peers.__getitem__)
            row["to_best_peer"] = peers[row["best_peer"]]
        if (floor := FLOORS[row["encoding"]]) in rows:
            row["to_floor"] = ratio(row, rows[floor])
    return rows


def ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times as fast, round by round: what slows the machine for a while slows both."""
    pairs = zip(one["rounds"], other["rounds"], strict=True)
    return median(mine["clips_s"] / theirs["clips_s"] for mine, theirs in pairs)


def show(rows: dict[str, Any], skipped: dict[str, str]) -> None:
    """The table."""
    heads = (
        "clips/s",
        "min",
        "max",
        "MB/s",
        "x real time",
        "/ best peer",
        "/ floor",
        "CPU ms",
        "MB",
        "first s",
    )
    print(f"{'':18}" + "".join(f"{head:>13}" for head in heads))
    for name, row in sorted(rows.items(), key=lambda item: (item[1]["encoding"], -item[1]["clips_s"])):
        whole = ("clips_s", "clips_s_min", "clips_s_max", "mb_s", "times_real_time")
        cells = [f"{row[key]:.0f}" for key in whole]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ("to_best_peer", "to_floor")]
        cells += [f"{row['cpu_ms_per_clip']:.2f}", f"{row['memory_mb']:.0f}", f"{row['first_s']:.2f}"]
        print(f"{name:18}" + "".join(f"{cell:>13}" for cell in cells))
    if {"ours-tar-flac", "ours-tar-pcm16"} <= rows.keys():
        print(f"our tars, PCM16 / FLAC: {ratio(rows['ours-tar-pcm16'], rows['ours-tar-flac']):.1f}")
    for name, why in skipped.items():
        print(f"{name:18} left out: {why}")


def versions() -> dict[str, str]:
    installed = {found.name: found.version for found in distributions()}
    return {library: installed.get(library, "not installed") for library in LIBRARIES}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument(
        "--seconds", type=int, default=0, help="cut or repeat each clip to so many; 0: whole clips"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="names or their beginnings, such as ours,floor-dr")
    parser.add_argument("--work", type=Path, help="keep the sets here, and find them again")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [name for name in CONTENDERS if name.startswith(tuple(options.only.split(",")))]
    load = os.getloadavg()
    if not names:
        parser.error(f"--only {options.only}: allowed are the beginnings of {', '.join(CONTENDERS)}")
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        found, skipped = measure(options, work, names)
        samples = read_json(work / TRUTH)["samples"]
    rows = summed_up(found, sum(samples) / len(samples) / RATE)
    show(rows, skipped)
    if options.json:
        asked = {name: getattr(options, name) for name in ("clips", "seconds", "workers", "batch", "rounds")}
        about = asked | {"cores": len(os.sched_getaffinity(0)), "load_before": load, "versions": versions()}
        write_json(options.json, about | {"contenders": rows, "left_out": skipped})


if __name__ == "__main__":
    main()
