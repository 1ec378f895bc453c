"""Several processes train one network: the curve of one process, killed and stopped without loss."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import warm
from clipmill.cli.train import command as train_command
from clipmill.errors import ConfigError
from clipmill.train.checkpoint import read_last
from clipmill.train.ranks import Ranks, joined_ranks
from conftest import SHALLOW
from test_train import command, lines, same_state, shards_of

pytestmark = pytest.mark.usefixtures("shallow")


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Of unlike lengths, and trained on whole: ranks must agree on a width.
    return shards_of(tmp_path_factory.mktemp("easy"))


FLAGS = (
    *("--crop-s", "0", "--mixup", "between-class", "--pitch-semitones", "2", "--noise-snr-db", "10"),
    # Adam moves a weight by the whole rate whatever its gradient: where that is all but zero, rounding gives the sign.
    *("--batch-size", "8", "--schedule", "constant", "--learning-rate", "5e-5"),
    *("--steps", "8", "--eval-every", "4", "--save-every", "1"),
)


def torchrun(*program: object, restarts: int = 0) -> warm.Program:
    """Two ranks of a program."""
    flags = ("--standalone", "--nproc-per-node", 2, "--max-restarts", restarts, "--monitor-interval", 0.1)
    return warm.start("torch.distributed.run", *flags, *program)


def folds_1_and_2(asked: list[str]) -> list[str]:
    """The command as a cross-validation."""
    at = asked.index("--fold")
    return [*asked[:at], "--folds", "1,2", *asked[at + 2 :]]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def alone(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the command."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    asked = command(easy, out, *FLAGS)[2:]
    assert train_command.main(asked, standalone_mode=False) == 0
    return out


def close(one: Path, other: Path) -> None:
    """The curves of two runs are the same in their first 8 steps, to float32's rounding as Adam amplifies it."""
    for kind, names in (("train", ("loss",)), ("eval", ("loss", "map", "clips"))):
        ours, theirs = ([row for row in lines(run, kind) if row["step"] <= 8] for run in (one, other))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for our, their in zip(ours, theirs, strict=True):
            for name in names:
                assert our[name] == pytest.approx(their[name], rel=3e-2), (kind, our["step"], name)


_TOGETHER = """
import json, os, sys, torch
from torch import nn
from clipmill.cli.train import command
from clipmill.train.ranks import Ranks, joined_ranks
pair, crossval = json.loads(sys.argv[1])
assert command.main(pair, standalone_mode=False) == 0
if os.environ["RANK"] == "0":
    for stream in (sys.stdout, sys.stderr):
        print("====", file=stream, flush=True)
# The ranks meet anew where those of another start would: torch's store remembers where they met before.
os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
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
print("fine", flush=True)
os.environ["TORCHELASTIC_RESTART_COUNT"] = "2"
assert command.main(crossval, standalone_mode=False) == 0
"""


@dataclass(frozen=True)
class Together:
    """What two ranks did in one start: a run, BatchNorm beside that of the whole batch, and a cross-validation."""

    pair: Path
    crossval: Path
    out: list[str]
    err: list[str]


@pytest.fixture(scope="module")
def together(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("together")
    pair = command(easy, folder / "pair", *FLAGS, "--log-batches")[2:]
    flags = ("--steps", "2", "--eval-every", "2", "--mixup", "none", "--access", "random")
    crossval = folds_1_and_2(command(easy, folder / "cv", *flags)[2:])
    (folder / "together.py").write_text(f"{SHALLOW}\n{_TOGETHER}")
    process = torchrun(folder / "together.py", json.dumps([pair, crossval]))
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return Together(folder / "pair", folder / "cv", out.split("====\n"), err.split("====\n"))


def test_two_ranks_give_the_loss_curve_of_one_process_with_the_batch_of_both(alone, together):
    close(together.pair, alone)
    first, same = (lines(run, "train")[0]["loss"] for run in (alone, together.pair))
    assert same == pytest.approx(first, rel=1e-4), "of the same weights, rounding alone differs"
    out, said = together.out[0], together.err[0]
    assert out.count("best: accuracy") == out.count("run: ") == 1, "the first rank alone speaks"
    assert said.count("recipe small-cpu") == 1
    assert (together.pair / "batches-rank1.jsonl").exists()
    assert sum("best: " in line for line in out.splitlines()) == 1


def test_batch_norm_over_two_ranks_is_that_of_the_whole_batch_forward_and_backward(together):
    assert together.out[1].count("fine") == 2


def test_ranks_cross_validate_together(together):
    told = json.loads((together.crossval / "crossval.json").read_text())
    assert [(row["run"], row["done"]) for row in told["runs"]] == [
        ("fold1-seed0", True),
        ("fold2-seed0", True),
    ]
    assert together.out[1].count("deviation") == 1


@pytest.fixture(scope="module")
def disturbed(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The first run of a cross-validation, and what it says: a rank is killed after the first save, and a while after
    one is told to stop."""
    folder = tmp_path_factory.mktemp("runs") / "disturbed"
    out, script = folder / "fold1-seed0", folder.with_suffix(".py")
    script.write_text(f"{SHALLOW}; from clipmill.cli import main; main()")
    asked = folds_1_and_2(command(easy, folder, *FLAGS, "--steps", "4000")[1:])
    process = torchrun(script, *asked, restarts=1)

    def until(condition: Callable[[], bool]) -> None:
        while not condition():
            assert process.poll() is None, process.said("err")
            time.sleep(0.01)

    until((out / "last.pt").exists)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    until(lambda: "going on from step" in process.said("err"))
    until(lambda: (out / "metrics.jsonl").read_text().count('"kind": "eval"') >= 2)  # those of steps 4 and 8
    os.kill(children(process.pid)[1], signal.SIGUSR1)
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 0, f"or torchrun would begin anew: {said}"
    return out, said


def test_a_rank_that_is_killed_is_started_again_with_the_others_and_goes_on_from_the_last_save(
    alone, disturbed
):
    out, said = disturbed
    assert "going on from step" in said
    close(out, alone)


def test_a_signal_to_one_rank_stops_all_at_one_step_and_each_saves_nothing_twice(disturbed):
    out, said = disturbed
    after = said.rpartition("going on from step")[2]  # before, a rank may have missed the one that was killed
    assert after.count("--resume goes on") == 1
    assert f"stopped at step {read_last(out)['step']} of 4000" in said


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


@pytest.mark.parametrize("value", ["abc", "0", "-1", ""])
def test_an_environment_that_counts_no_ranks_is_named(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with (
        pytest.raises(ConfigError, match=f"^WORLD_SIZE={value}: allowed is a whole number from 1 up"),
        joined_ranks("cpu"),
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


def test_the_metrics_of_a_restarted_run_hold_each_step_once(disturbed):
    steps = [json.loads(line)["step"] for line in (disturbed[0] / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
