"""Killed and resumed, a run sees the very batches that an undisturbed one sees: any workers, any ranks, near and far."""

from __future__ import annotations

import json
import signal
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import warm
from clipmill.loader import Loader
from clipmill.shards.read import Shards
from conftest import Bucket
from test_train import RATE, plan_of, shards_of, signal_after_first_save, started


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("easy"))


def seen(out: Path) -> list[dict[str, Any]]:
    """Each step's hashes of keys and samples, in the order in which they were written."""
    return [json.loads(line) for line in (out / "batches.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(easy: Path) -> list[dict[str, Any]]:
    """What the run of `command` sees where nothing befalls it: the first 16 steps of 4 clips."""
    steps: list[dict[str, Any]] = []
    clips = plan_of(easy, fold=1).clips
    loader = Loader(
        clips, 4, crop=RATE, watch=lambda step, found: steps.append({"step": step + 1, **asdict(found)})
    )
    assert len(list(loader.batches(0, 16))) == 16
    assert len({row["samples"] for row in steps}) == 16
    return steps


def test_a_killed_training_run_goes_on_with_the_very_batches_here_or_from_afar(
    easy, undisturbed, bucket: Bucket, tmp_path
):
    # More steps, so that there is something left to be killed; all but the first 16 do not matter here.
    flags = ("--log-batches", "--steps", "400", "--eval-every", "400")
    killed = started(bucket.fill(easy), tmp_path, *flags, "--workers", "2")
    signal_after_first_save(tmp_path, killed, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    with open(tmp_path / "batches.jsonl", "a") as file:
        file.write('{"keys": "half a li')
    resumed = started(easy, tmp_path, *flags, "--resume", "--workers", "1")
    while len((tmp_path / "batches.jsonl").read_text().splitlines()) < 20:
        assert resumed.poll() is None, resumed.said("err")
        time.sleep(0.01)
    resumed.send_signal(signal.SIGTERM)
    assert "going on from step" in resumed.communicate(timeout=120)[1]
    steps = [row for row in seen(tmp_path) if row["step"] <= 16]
    assert steps == undisturbed


RANK = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from clipmill.loader import Digest, Loader
from clipmill.shards.read import Shards

torch.set_num_threads(1)
where, out, workers, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
shards = Shards.open(where)
saved = out / f"{rank}-of-{ranks}.json"
rows = json.loads(saved.read_text()) if saved.exists() else []
for batch in Loader(shards, 6, seed=9, crop=12000, workers=workers, rank=rank, ranks=ranks).batches(len(rows), stop):
    total = batch.waves.double().sum()
    dist.all_reduce(total)  # as gradients are: every rank waits here for all others
    rows.append([shards.keys_of(batch.rows.numpy()), [int(wave.long().sum()) for wave in batch.waves], float(total)])
    Path(f"{saved}.new").write_text(json.dumps(rows))
    os.replace(f"{saved}.new", saved)
    dist.barrier()
dist.destroy_process_group()
"""


def run_ranks(where: str, out: Path, workers: int, stop: int, ranks: int, kill_at: int | None = None) -> None:
    """Run `RANK` in so many processes; `kill_at`: until the first has that many steps, then SIGKILL for the last."""
    out.mkdir(exist_ok=True)
    script = out / "rank.py"
    script.write_text(RANK)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
        }
        processes.append(warm.start(script, where, out, workers, stop, env=env))
    if kill_at is None:
        for process in processes:
            assert process.wait(timeout=100) == 0, process.said("err")
        return
    while not (out / f"0-of-{ranks}.json").exists() or len(steps_of(out, 0, ranks)) < kill_at:
        assert all(process.poll() is None for process in processes), [p.said("err") for p in processes]
        time.sleep(0.002)
    for process in reversed(processes):  # what a scheduler does to those that are left
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=100)


def steps_of(out: Path, rank: int, ranks: int) -> list[Any]:
    return json.loads((out / f"{rank}-of-{ranks}.json").read_text())


def test_two_ranks_killed_and_resumed_see_together_what_one_sees(easy, bucket: Bucket, tmp_path):
    shards = Shards.open(easy)
    whole = [
        (
            shards.keys_of(batch.rows.numpy()),
            [int(wave.long().sum()) for wave in batch.waves],
            float(batch.waves.double().sum()),
        )
        for batch in Loader(shards, 6, seed=9, crop=12000).batches(0, 40)
    ]
    out = tmp_path / "two"
    run_ranks(str(easy), out, workers=2, stop=4000, ranks=2, kill_at=11)
    # They may stand a step apart, and have come far: they go on together from a step that both had saved.
    done = [steps_of(out, rank, 2) for rank in range(2)]
    assert min(map(len, done)) >= 10
    for rank in range(2):
        (out / f"{rank}-of-2.json").write_text(json.dumps(done[rank][:10]))
    # And from afar, with another number of workers.
    run_ranks(bucket.fill(easy), out, workers=1, stop=40, ranks=2)
    parts = [steps_of(out, rank, 2) for rank in range(2)]
    assert [len(part) for part in parts] == [40, 40]
    for step, (keys, sums, total) in enumerate(whole):
        for rank in range(2):
            assert parts[rank][step] == [keys[rank::2], sums[rank::2], total]
