"""Shards from real clips: clipmill, one ffmpeg process for each clip under joblib, and the floor; the same workers.

    python benchmarks/shard.py ../shared/data/esc10/audio            some twelve minutes
    python benchmarks/shard.py FOLDER --clips 1000 --formats ogg,wav

FOLDER holds sound clips in Ogg, such as ESC-10's. They are taken as they are, and encoded as other collections come:
`wav` 48 kHz stereo 16 bit (UrbanSound8K), `wav44` 44.1 kHz mono 16 bit (ESC-50), `opus` in WebM, 48 kHz stereo, and
`aac` in MPEG-4, 44.1 kHz stereo (YouTube). Each clip stands there under several names. For each format, one after the
other:

floor   clipmill's own decode, resample and encode calls in a bare loop, in so many processes that do nothing else.
ours    `pipeline shard`, the whole process: planning, workers, isolation, measures, hashes, tars, index, card.
ffmpeg  what people do today: joblib over `ffmpeg -i IN -ac 1 -ar 44100 OUT.flac`; no padding, no measures, no hashes,
        no tar. A quarter of the clips, times four.

Floor and ours are run twice, and the second time counts: the first warms the disk's cache and the machine's memory.
Prints JSON: seconds; the ratios ffmpeg / ours and ours / floor; ours with one worker against all of them; and the peak
memory of a worker with its decoder, by the time a quarter of the clips were done and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from joblib import Parallel, delayed

from clipmill.audio import decode, encode, resample, to_int16
from clipmill.audio.ffmpeg import ffmpeg_program

FORMATS = {
    "ogg": (".ogg", []),
    "wav": (".wav", ["-ar", "48000", "-ac", "2", "-c:a", "pcm_s16le"]),
    "wav44": (".wav", ["-ar", "44100", "-ac", "1", "-c:a", "pcm_s16le"]),
    "opus": (".webm", ["-ar", "48000", "-ac", "2", "-c:a", "libopus", "-b:a", "96k"]),
    "aac": (".m4a", ["-ar", "44100", "-ac", "2", "-c:a", "aac", "-b:a", "128k"]),
}
RATE = 44100


def prepare(source: Path, media: Path, kind: str, clips: int) -> int:
    """`clips` files of a kind under `media`, each real clip under several names; returns how many."""
    suffix, options = FORMATS[kind]
    made = []
    media.mkdir(parents=True)
    for path in sorted(source.glob("*.ogg")):
        target = media / f"{path.stem}{suffix}"
        if options:
            command = [ffmpeg_program(), "-loglevel", "error", "-i", str(path), *options, str(target)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        else:
            shutil.copy(path, target)
        made.append(target)
    for number in range(len(made), clips):
        os.link(made[number % len(made)], media / f"{number:05d}{suffix}")
    return max(clips, len(made))


def bare(paths: list[Path]) -> float:
    """The calls themselves, and how long they took."""
    began = time.perf_counter()
    for path in paths:
        audio = decode(path)
        encode(to_int16(resample(audio.samples, audio.rate, RATE)), RATE, "flac")
    return time.perf_counter() - began


def floor(media: Path, jobs: int) -> float:
    """The longest of `jobs` bare loops that run at the same time."""
    paths = sorted(media.iterdir())
    parts = [paths[first::jobs] for first in range(jobs)]
    with Parallel(n_jobs=jobs) as pool:
        pool(delayed(bare)(part[:3]) for part in parts)
        return max(pool(delayed(bare)(part) for part in parts))


def one_ffmpeg(path: Path, out: Path) -> None:
    """One clip, by a process of its own."""
    command = [
        ffmpeg_program(), "-y", "-loglevel", "fatal", "-i", str(path), "-ac", "1", "-ar", str(RATE),
        str(out / f"{path.stem}.flac"),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def peer(media: Path, out: Path, jobs: int) -> float:
    """One ffmpeg process for each clip: the seconds that all would take, by a quarter of them."""
    out.mkdir()
    paths = sorted(media.iterdir())
    some = paths[: len(paths) // 4]
    began = time.perf_counter()
    Parallel(n_jobs=jobs)(delayed(one_ffmpeg)(path, out) for path in some)
    return (time.perf_counter() - began) * len(paths) / len(some)


def resident(pid: int) -> dict[int, int]:
    """The peak memory in kB of every process below one."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                peak = next(
                    line for line in (entry / "status").read_text().splitlines() if line.startswith("VmHWM")
                )
            except (OSError, StopIteration):
                continue
            found[int(entry.name)] = (parent, int(peak.split()[1]))
    below, todo = {}, [pid]
    while todo:
        one = todo.pop()
        children = [child for child, (parent, _) in found.items() if parent == one]
        todo += children
        own = found.get(one, (0, 0))[1]
        below[one] = own + sum(found[child][1] for child in children if one != pid)
    return {child: below[child] for child, (parent, _) in found.items() if parent == pid}


def ours(root: Path, jobs: int, clips: int) -> dict[str, float]:
    """`pipeline shard`: seconds, and a worker's peak memory with its decoder's in MB, early and at the end."""
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "clipmill", "shard", "media", "--root", str(root), "--out", str(out)]
    peaks = {"early": 0, "end": 0}
    began = time.perf_counter()
    with subprocess.Popen([*command, "--jobs", str(jobs)], stderr=subprocess.DEVNULL) as process:

        def watch() -> None:
            while process.poll() is None:
                most = max(resident(process.pid).values(), default=0)
                done = len(list(out.glob("*.json"))) * 256 if out.exists() else 0
                peaks["end"] = max(peaks["end"], most)
                if done <= clips / 4:
                    peaks["early"] = max(peaks["early"], most)
                time.sleep(0.25)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        seconds = time.perf_counter() - began
        watcher.join()
    assert process.returncode == 0
    return {"seconds": seconds, **{name: round(peak / 1024) for name, peak in peaks.items()}}


def measure(source: Path, kind: str, clips: int, jobs: int, scratch: Path) -> dict[str, object]:
    """All the figures of one format."""
    root = scratch / kind
    clips = prepare(source, root / "files", kind, clips)
    fetch = ["fetch", "folder", "--name", "media", "--from", str(root / "files"), "--root", str(root)]
    subprocess.run([sys.executable, "-m", "clipmill", *fetch], check=True, stderr=subprocess.DEVNULL)
    for _ in range(2):
        bottom, many = floor(root / "files", jobs), ours(root, jobs, clips)
    bottom_one, one = floor(root / "files", 1), ours(root, 1, clips)
    other = peer(root / "files", root / "flac", jobs)
    shutil.rmtree(root)
    return {
        "clips": clips,
        "workers": jobs,
        "seconds": {
            "floor": round(bottom, 2),
            "ours": round(many["seconds"], 2),
            "ffmpeg": round(other, 2),
            "floor, one worker": round(bottom_one, 2),
            "ours, one worker": round(one["seconds"], 2),
        },
        "ffmpeg / ours": round(other / many["seconds"], 2),
        "ours / floor": round(many["seconds"] / bottom, 2),
        "ours / floor, one worker": round(one["seconds"] / bottom_one, 2),
        "one worker / all": round(one["seconds"] / many["seconds"], 2),
        "megabytes of a worker, at a quarter and at the end": [many["early"], many["end"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--formats", default=",".join(FORMATS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.formats.split(","):
            found = measure(options.source, kind, options.clips, options.jobs, Path(scratch))
            print(json.dumps({kind: found}, indent=1), flush=True)


if __name__ == "__main__":
    main()
