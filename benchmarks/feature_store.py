"""How fast stored features are read, beside computing them anew, on the same clips and the same cores.

    python benchmarks/feature_store.py SHARDS                     a folder of `pipeline shard`; minutes on one core
    python benchmarks/feature_store.py SHARDS --threads 2 --dtype float32 --only logmel,cqt --json out.json

read        features of clips chosen at random, whole and checked, from the store into a batch; the files are in the
            page cache, as for anything that is read again and again
compute     the same features of waveforms that are in memory already, as one batch
from sound  the same, and the waveforms are read and decoded from the shards before

A round times each of the three on the same clips, in turns. Ratios are taken in each round, and their median is shown,
with the least and the most. Nothing is kept: the store is made in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from clipmill.augment import to_float
from clipmill.features import FEATURES, create_feature
from clipmill.featurestore import StoredClips, make_features
from clipmill.shards.read import Shards
from clipmill.tables import write_json
from clipmill.train.timing import device_name, time_in_turn

CPU = torch.device("cpu")


def main() -> None:
    options = _options()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    shards = Shards.open(options.shards)
    # Clips of one length, so that computing pads none of them.
    lengths, counts = np.unique(shards.samples, return_counts=True)
    length = int(lengths[counts.argmax()])
    alike = np.flatnonzero(shards.samples == length)
    rows = np.random.default_rng(0).choice(alike, min(options.clips, len(alike)), replace=False)
    print(f"{len(rows)} clips of {length / shards.sample_rate:g} s at {shards.sample_rate} Hz, {options.dtype}, "
          f"{options.threads} threads, on {device_name(CPU)}")  # fmt: skip
    print(
        "| feature | read, clips/s | compute, clips/s | from sound, clips/s | read / compute | read / from sound |"
    )
    print("|---|--:|--:|--:|--:|--:|")
    found = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name in options.only.split(",") if options.only else FEATURES:
            feature = create_feature(name, sample_rate=shards.sample_rate)
            clips = make_features(shards, Path(folder), feature, options.dtype).entry.clips
            found[name] = row = measured(feature, clips, shards, rows, options.rounds)
            ratios = " | ".join(
                "{:.1f} ({:.1f} to {:.1f})".format(*row[f"read_to_{other}"]) for other in OTHERS
            )
            speeds = " | ".join(f"{row[f'{call}_clips_s']:.0f}" for call in ("read", *OTHERS))
            print(f"| {name} | {speeds} | {ratios} |", flush=True)
    if options.json:
        about = {"clips": len(rows), "samples": length, "threads": options.threads, "dtype": options.dtype}
        about |= {"device": device_name(CPU), "load": os.getloadavg(), "torch": torch.__version__}
        write_json(options.json, about | {"features": found})


OTHERS = ("compute", "from_sound")


def measured(feature: Any, clips: StoredClips, shards: Shards, rows: Any, rounds: int) -> dict[str, Any]:
    """Clips a second of each way, and how many times as fast reading is, in each round."""
    stored = np.empty((len(rows), int(clips.samples[rows].max()), clips.bins), clips.dtype)
    waves = np.empty((len(rows), int(shards.samples[rows].max())), np.int16)

    def read() -> None:
        assert not clips.read_into(rows, stored)

    def compute() -> None:
        feature(to_float(torch.from_numpy(waves))).transpose(1, 2).to(
            torch.from_numpy(stored).dtype
        ).contiguous()

    def from_sound() -> None:
        assert not shards.read_into(rows, waves)
        compute()

    calls = {"from_sound": from_sound, "compute": compute, "read": read}
    timed = {name: one.seconds for name, one in time_in_turn(calls, CPU, rounds).items()}
    said: dict[str, Any] = {f"{name}_clips_s": len(rows) / median(seconds) for name, seconds in timed.items()}
    for other in OTHERS:
        ratios = [slow / fast for slow, fast in zip(timed[other], timed["read"], strict=True)]
        said[f"read_to_{other}"] = [median(ratios), min(ratios), max(ratios)]
    return said


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", help="a folder of shards")
    parser.add_argument("--clips", type=int, default=32, help="in a batch")
    parser.add_argument("--threads", type=int, default=1, help="and cores")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help=f"of {','.join(FEATURES)}")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
