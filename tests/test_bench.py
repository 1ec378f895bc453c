"""The benchmark of networks: that they take turns, that its numbers reconcile, and that running out of memory is a row."""

from __future__ import annotations

import json
import re
import time
import weakref
from dataclasses import replace
from typing import Any

import click
import pytest
import torch
from torch import Tensor, nn

from clipmill.cli.bench import command
from clipmill.errors import ClipmillError, ConfigError, TrainError
from clipmill.train.bench import REFERENCES, BenchSettings, bench_models, default_models
from clipmill.train.timing import WARM_UP, matrix_rate, time_in_turn, true_float32, unless_out_of_memory
from clipmill_models import (
    FAMILIES,
    Erann,
    Printed,
    count_parameters,
    create_model,
    list_models,
    multiply_adds,
)

CPU = torch.device("cpu")
MORE_THAN_THERE_IS = 10**16
"""Bytes: beyond what any machine can address."""


class Listed(nn.Module):
    """Writes its name down when it is called; sleeps, and asks for too much memory at one call."""

    def __init__(
        self, name: str, heard: list[str], sleep_s: float = 0.0, too_much_at: int | None = None
    ) -> None:
        super().__init__()
        self.name, self.heard, self.sleep_s, self.too_much_at = name, heard, sleep_s, too_much_at

    def forward(self) -> Tensor:
        if self.heard.count(self.name) == self.too_much_at:
            return torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)
        self.heard.append(self.name)
        time.sleep(self.sleep_s)
        return torch.zeros(1)


# Taking turns


def test_in_every_round_each_is_called_once_in_turn_after_all_are_warm() -> None:
    heard: list[str] = []
    time_in_turn({name: Listed(name, heard) for name in "abc"}, CPU, rounds=4)
    warm = WARM_UP["cpu"]
    assert heard == [*"a" * warm, *"b" * warm, *"c" * warm, *"abc" * 4]


def test_each_is_given_its_own_times_one_for_each_round() -> None:
    heard: list[str] = []
    timed = time_in_turn(
        {"slow": Listed("slow", heard, sleep_s=0.05), "fast": Listed("fast", heard)}, CPU, rounds=3
    )
    assert [len(one.seconds) for one in timed.values()] == [3, 3]
    assert min(timed["slow"].seconds) >= 0.05 > min(timed["fast"].seconds)
    assert timed["slow"].peak_bytes is None


@pytest.mark.parametrize(
    "call", [0, WARM_UP["cpu"], WARM_UP["cpu"] + 1], ids=["at once", "first round", "later"]
)
def test_one_that_runs_out_of_memory_has_no_times_and_the_others_go_on(call: int) -> None:
    heard: list[str] = []
    calls = {"a": Listed("a", heard), "big": Listed("big", heard, too_much_at=call), "b": Listed("b", heard)}
    timed = time_in_turn(calls, CPU, rounds=3)
    assert list(timed) == ["a", "big", "b"]
    assert [len(one.seconds) for one in timed.values()] == [3, 0, 3]
    assert heard.count("big") == call


def test_rounds_are_told_as_they_are_done() -> None:
    told: list[tuple[int, str]] = []
    time_in_turn({"a": Listed("a", [])}, CPU, 2, lambda done, facts: told.append((done, facts)))
    assert told == [(0, "warming up a"), (1, ""), (2, "")]


# Memory and precision


def test_what_a_call_held_is_free_again_after_it_ran_out_of_memory() -> None:
    held: list[weakref.ref[Tensor]] = []

    def call() -> Tensor:
        first = torch.ones(1000)
        held.append(weakref.ref(first))
        return first + torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)

    assert unless_out_of_memory(call, CPU) is None
    assert [ref() for ref in held] == [None]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        unless_out_of_memory(lambda: torch.ones(2, 3) @ torch.ones(2, 3), CPU)


def test_float32_is_true_float32_inside_and_as_before_outside() -> None:
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    torch.set_float32_matmul_precision("high")
    try:
        with true_float32(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before[1:]


def test_the_matrix_rate_is_that_of_a_product_timed_here() -> None:
    rate = matrix_rate(CPU, torch.float32)
    a = torch.randn(1024, 1024)
    began = time.perf_counter()
    for _ in range(5):
        a @ a
    plain = 5 * 2 * 1024**3 / (time.perf_counter() - began) / 1e12
    assert plain / 10 < rate < plain * 10


# The report


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    settings = BenchSettings(
        ("erann-0-1", " ERANN-1-1", "erann-0-1"), batches=(1, 2, 1), seconds=1.0, frontend=False, rounds=3
    )
    return bench_models(settings, CPU)


def test_a_row_for_each_model_at_each_batch_once(report: dict[str, Any]) -> None:
    rows = [(row["model"], row["batch"]) for row in report["rows"]]
    assert rows == [("erann-0-1", 1), ("erann-1-1", 1), ("erann-0-1", 2), ("erann-1-1", 2)]


def test_the_figures_of_a_row_reconcile(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert row["audios_per_s"] * row["median_ms"] / 1e3 == pytest.approx(row["batch"])
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["tflops"] == pytest.approx(2 * row["multiply_adds"] * row["audios_per_s"] / 1e12)
        assert row["share_of_matrix_rate"] * report["matrix_tflops"] == pytest.approx(row["tflops"])
        assert not row["out_of_memory"]


def test_sizes_are_those_of_audiosets_527_classes_and_of_clips_of_that_length(report: dict[str, Any]) -> None:
    network = create_model("erann-1-1", 527)
    row = report["rows"][1]
    assert row["parameters"] == count_parameters(network)
    assert row["multiply_adds"] == multiply_adds(network, (128, 128))


def test_the_report_is_json_and_says_under_what_conditions_it_was_made(report: dict[str, Any]) -> None:
    said = json.loads(json.dumps(report))
    assert said["torch"] == torch.__version__
    assert (said["dtype"], said["compile"], said["frontend"], said["rounds"]) == ("fp32", False, False, 3)
    assert (said["threads"], said["batches"], said["seconds"]) == (1, [1, 2], 1.0)
    assert said["device"]
    assert any("in turn" in line for line in said["protocol"])


def test_without_the_papers_networks_in_the_run_nothing_is_relative_to_them(report: dict[str, Any]) -> None:
    fields = ["paper_audios_per_s", "times_paper", *(f"times_{name}" for name in REFERENCES), "memory_bytes"]
    assert all(row[field] is None for row in report["rows"] for field in fields)


def test_speed_is_relative_to_cnn14_of_the_same_run() -> None:
    settings = BenchSettings(("erann-1-1", "cnn14"), batches=(1,), seconds=1.0, frontend=False, rounds=1)
    erann, cnn14 = bench_models(settings, CPU)["rows"]
    assert erann["times_cnn14"] == pytest.approx(cnn14["median_ms"] / erann["median_ms"])
    assert cnn14["times_cnn14"] == 1
    assert erann["times_ast"] is None


class Published(Erann):
    """A family of which a paper prints a speed."""

    PRINTED = (Printed("erann-1-1", "1,250", "audios/s, B=2", "a paper, Table 9", seconds=1.0),)


def test_a_printed_speed_stands_beside_ours_of_that_network_batch_and_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "erann-", Published)
    settings = BenchSettings(("erann-1-1", "erann-0-1"), (1, 2), 1.0, frontend=False, rounds=1)
    rows = {(row["model"], row["batch"]): row for row in bench_models(settings, CPU)["rows"]}
    row = rows.pop(("erann-1-1", 2))
    assert (row["paper"], row["paper_audios_per_s"]) == ("a paper, Table 9", 1250.0)
    assert row["times_paper"] == pytest.approx(row["audios_per_s"] / 1250)
    longer = bench_models(replace(settings, seconds=2.0), CPU)["rows"]
    assert all(
        other["paper_audios_per_s"] is other["times_paper"] is None for other in [*rows.values(), *longer]
    )


def test_a_batch_that_no_machine_can_hold_is_a_row_that_says_so() -> None:
    settings = BenchSettings(("erann-0-1",), batches=(10**10, 1), seconds=1.0, rounds=1)
    large, small = bench_models(settings, CPU)["rows"]
    assert large["out_of_memory"]
    assert large["audios_per_s"] is large["median_ms"] is large["tflops"] is None
    assert large["parameters"] == small["parameters"]
    assert not small["out_of_memory"]
    assert small["audios_per_s"] > 0


def test_what_the_compiler_cannot_do_names_the_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    settings = BenchSettings(("cnn14",), (1,), 1.0, compile=True, frontend=False, rounds=1)
    with (
        config.patch({"cpp.cxx": (None, "/nonexistent/compiler")}),
        pytest.raises(TrainError, match="--compile: "),
    ):
        bench_models(settings, CPU)


def test_the_networks_timed_by_default_can_all_be_built() -> None:
    assert default_models()[:2] == ("erann-1-6", "cnn14")
    assert set(default_models()) <= set(list_models())


# The command


def bench(*words: object) -> int:
    return command.main(["models", *map(str, words)], standalone_mode=False)


SMALL = ("--device", "cpu", "--seconds", 1, "--rounds", 2)


def test_the_command_prints_a_table_and_the_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--model", "erann-0-1, erann-1-1", "--batch", "1,2,10000000000", *SMALL) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("erann-")]
    assert [row[:2] for row in rows] == [
        [name, batch] for batch in ("1", "2", "10000000000") for name in ("erann-0-1", "erann-1-1")
    ]
    assert [row[2] == "OOM" for row in rows] == [False] * 4 + [True] * 2
    assert "from sound at 44.1 kHz" in out
    assert "matrix rate" in out
    assert "\n- each round calls each network once, in turn" in out
    assert "x ast" not in out


def test_the_command_prints_json_in_bfloat16_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--model", "erann-1-1", "--batch", 1, "--dtype", "bf16", "--json", *SMALL) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["dtype"], said["frontend"], said["sample_rate"], said["rounds"]) == ("bf16", True, 44100, 2)
    assert [row["model"] for row in said["rows"]] == ["erann-1-1"]


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (("--model", "vgg"), "--model vgg: no model is called 'vgg': allowed is .*erann"),
        (("--model", ","), "--model.*one or more"),
        (("--batch", "1,0"), "--batch.*whole numbers from 1 up"),
        (("--batch", "two"), "--batch.*whole numbers from 1 up"),
        (("--dtype", "fp16"), "'fp32', 'bf16'"),
        (("--frontend", "maybe"), "'on', 'off'"),
        (("--seconds", "0"), "x>=1"),
        (("--rounds", "0"), "x>=1"),
        (("--device", "tpu"), "--device tpu: allowed are auto, cpu"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_allowed(flags: tuple[str, ...], allowed: str) -> None:
    with pytest.raises((click.UsageError, ClipmillError)) as raised:
        bench(*flags)
    error = raised.value
    said = error.format_message() if isinstance(error, click.UsageError) else str(error)
    assert re.search(allowed, said)
    assert error.exit_code == 2


def test_a_clip_longer_than_a_network_takes_is_told_before_anything_is_timed() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=r"--model ast --seconds 30: .* 1 to 1024 frames"):
        bench("--model", "ast", "--seconds", 30)


# On a GPU


@pytest.mark.gpu
def test_on_cuda_compiled_bfloat16_fits_tells_memory_and_a_batch_too_large_is_a_row() -> None:
    settings = BenchSettings(
        ("erann-1-1", "erann-0-1"), batches=(1, 4, 10**7), seconds=2.0, dtype="bf16", compile=True, rounds=5
    )
    report = bench_models(settings, torch.device("cuda"))
    rows = {(row["model"], row["batch"]): row for row in report["rows"]}
    assert all(row["out_of_memory"] == (batch == 10**7) for (_, batch), row in rows.items())
    one, four = rows["erann-1-1", 1], rows["erann-1-1", 4]
    assert four["memory_bytes"] > one["memory_bytes"] > 4 * one["parameters"]
    assert 0 < one["share_of_matrix_rate"] < 1
    assert report["device"] == torch.cuda.get_device_name()
