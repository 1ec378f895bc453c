"""Several processes train one network: the curve of one process, killed and stopped without loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from clipmill.cli.train import command as train_command
from clipmill.errors import ConfigError
from clipmill.train.checkpoint import read_last
from clipmill.train.ranks import Ranks, joined_ranks
from test_train import command, lines, same_state, shards_of, start


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Of unlike lengths, and trained on whole: ranks must agree on a width.
    return shards_of(tmp_path_factory.mktemp("easy"))


FLAGS = (
    *("--crop-s", "0", "--mixup", "between-class", "--pitch-semitones", "2", "--noise-snr-db", "10"),
    # Adam moves a weight by the whole rate whatever its gradient: where that is all but zero, rounding gives the sign.
    *("--batch-size", "8", "--schedule", "constant", "--learning-rate", "5e-5", "--save-every", "1"),
)


def torchrun(where: Path, out: Path, *more: str, restarts: int = 0) -> subprocess.Popen[str]:
    """The training command as two ranks."""
    python, *rest = command(where, out, *more)
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return start(*launcher, "--max-restarts", str(restarts), "--monitor-interval", "0.1", *rest)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def alone(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the command."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    asked = command(easy, out, *FLAGS)[4:]
    assert train_command.main(asked, standalone_mode=False) == 0
    return out


def close(one: Path, other: Path) -> None:
    """The curves of two runs are the same, to float32's rounding as 16 steps of Adam amplify it."""
    for kind, names in (("train", ("loss",)), ("eval", ("loss", "map", "clips"))):
        assert [row["step"] for row in lines(one, kind)] == [row["step"] for row in lines(other, kind)]
        for ours, theirs in zip(lines(one, kind), lines(other, kind), strict=True):
            for name in names:
                assert ours[name] == pytest.approx(theirs[name], rel=3e-2), (kind, ours["step"], name)


def test_two_ranks_give_the_loss_curve_of_one_process_with_the_batch_of_both(easy, alone, tmp_path):
    process = torchrun(easy, tmp_path / "pair", *FLAGS, "--log-batches")
    out, said = process.communicate(timeout=250)
    assert process.returncode == 0, said
    close(tmp_path / "pair", alone)
    first, same = (lines(run, "train")[0]["loss"] for run in (alone, tmp_path / "pair"))
    assert same == pytest.approx(first, rel=1e-4), "of the same weights, rounding alone differs"
    assert out.count("best: accuracy") == out.count("run: ") == 1, "the first rank alone speaks"
    assert said.count("recipe small-cpu") == 1
    assert (tmp_path / "pair" / "batches-rank1.jsonl").exists()
    assert sum("best: " in line for line in out.splitlines()) == 1


def test_a_rank_that_is_killed_is_started_again_with_the_others_and_goes_on_from_the_last_save(
    easy, alone, tmp_path
):
    out = tmp_path / "killed"
    process = torchrun(easy, out, *FLAGS, restarts=1)
    while not (out / "last.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    said = process.communicate(timeout=280)[1]
    assert process.returncode == 0, said
    assert "going on from step" in said
    close(out, alone)


def test_a_signal_to_one_rank_stops_all_at_one_step_and_each_saves_nothing_twice(easy, tmp_path):
    out = tmp_path / "stopped"
    process = torchrun(easy, out, *FLAGS, "--steps", "4000", "--eval-every", "4000", restarts=1)
    while not (out / "last.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGUSR1)
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 0, "or torchrun would begin anew"
    assert said.count("--resume goes on") == 1
    assert f"stopped at step {read_last(out)['step']} of 4000" in said


def test_ranks_cross_validate_together(easy, tmp_path):
    flags = ("--steps", "2", "--eval-every", "2", "--mixup", "none", "--access", "random")
    python, *words = command(easy, tmp_path / "cv", *flags)
    at = words.index("--fold")
    words[at : at + 2] = ["--folds", "1,2"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(python, *launcher, *words)
    out, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    told = json.loads((tmp_path / "cv" / "crossval.json").read_text())
    assert [(row["run"], row["done"]) for row in told["runs"]] == [
        ("fold1-seed0", True),
        ("fold2-seed0", True),
    ]
    assert out.count("deviation") == 1


def test_a_rank_takes_a_device_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match=r"--device cuda:1: each of 2 ranks takes a GPU of its own"),
        joined_ranks("cuda:1"),
    ):
        pass
    if not torch.cuda.is_available():
        with (
            pytest.raises(ConfigError, match=r"torch finds no CUDA devices: .*--nproc-per-node"),
            joined_ranks("cuda"),
        ):
            pass


def test_one_process_alone_exchanges_nothing():
    with joined_ranks("cpu") as (ranks, device):
        assert (ranks, device) == (Ranks(), "cpu")
    network, value = nn.Linear(2, 2), torch.randn(4, 3)
    assert ranks.shared(network, torch.device("cpu")) is network
    assert ranks.joined(value) is value
    assert ranks.mean(value) is value
    assert ranks.meet(True, ["x"]) == (True, ["x"])
    assert same_state(ranks.own(value), value)


_BATCH_NORM = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from clipmill.train.ranks import Ranks, joined_ranks
with joined_ranks("cpu") as (ranks, _):
    torch.manual_seed(0)
    x = torch.randn(6, 3, 5, 4) * 3 + 2
    weights = torch.randn(6, 3, 5, 4)
    def network():
        torch.manual_seed(1)
        return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    whole, parts = network(), network()
    together = ranks.shared(parts, torch.device("cpu"))
    for _ in range(3):
        for model, inputs, factor, scale in ((whole, x, weights, 1), (together, ranks.own(x), ranks.own(weights), 2)):
            y = model(inputs)
            (y * factor).sum().mul(scale).backward()
    assert parts.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, msg=name)
    for one, other in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.eval()(x), whole.eval()(x))
    assert ranks.joined(ranks.own(x)).equal(x)
    assert ranks.widest(3 + ranks.rank) == 4
    assert ranks.gathered(ranks.rank) == [0, 1]
    assert ranks.meet(ranks.rank == 1, ["bad"] * ranks.rank) == (True, ["bad"])
    assert ranks.from_first(lambda: ranks.rank) == 0
    assert float(ranks.mean(torch.tensor(float(ranks.rank)))) == 0.5
print("fine")
"""


def test_batch_norm_over_two_ranks_is_that_of_the_whole_batch_forward_and_backward(tmp_path):
    script = tmp_path / "norm.py"
    script.write_text(_BATCH_NORM)
    process = start(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)
    )
    out, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert out.count("fine") == 2


def test_the_metrics_of_a_restarted_run_hold_each_step_once(alone):
    steps = [json.loads(line)["step"] for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
