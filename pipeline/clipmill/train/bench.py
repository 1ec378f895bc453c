"""How fast networks are beside each other: the library of `pipeline bench models`.

What is compared runs in one process and takes turns: in every round each network is called
once, so that whatever slows a machine down for a while slows all of them. All networks stay
on the device for the whole run: eight of the papers' are 2.3 GB of weights, and moving them
in between would put copies between the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipmill.errors import ConfigError
from clipmill.features import FrontEnd
from clipmill.train.compiling import compiling
from clipmill.train.timing import (
    MATRIX,
    WARM_UP,
    Timed,
    Update,
    device_name,
    matrix_rate,
    time_in_turn,
    true_float32,
    unless_out_of_memory,
)
from clipmill_models import (
    ModelError,
    Printed,
    Tagger,
    count_parameters,
    create_model,
    multiply_adds,
    outline_model,
)

RATE = 44100
"""Of the sound that comes in where the front end is timed too, in Hz: that of the shards."""

CLASSES = 527
"""AudioSet's, as in the papers' table of speed."""

REFERENCES = ("ast", "cnn14")
"""What the papers compare with: each row has its speed relative to those of them that are in the run."""

ROUNDS = {"cpu": 5, "cuda": 50}
"""Turns that each network has, unless the settings say otherwise."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BenchSettings:
    """What is timed, and how.

    Attributes:
        models: names of networks, each timed once.
        batches: clips in a call; every network is timed at each.
        seconds: length of a clip.
        dtype: "fp32", true float32 without TF32 (the papers' V100 has none), or "bf16": autocast
            to bfloat16, entered anew for each call, with weights in float32.
        compile: compile front end and network together by `torch.compile` in its default mode,
            for each batch size anew.
        frontend: time from sound at 44.1 kHz (resampling and log-mel included), else from what
            the network itself takes.
        rounds: turns at each batch size; 0: `ROUNDS` of the device.
    """

    models: tuple[str, ...]
    batches: tuple[int, ...] = (1, 32)
    seconds: float = 10.0
    dtype: str = "fp32"
    compile: bool = False
    frontend: bool = True
    rounds: int = 0

    def on(self, device: torch.device) -> BenchSettings:
        """The same with its rounds decided, and each model and batch once."""
        return replace(
            self,
            models=tuple(dict.fromkeys(name.strip().lower() for name in self.models)),
            batches=tuple(dict.fromkeys(self.batches)),
            rounds=self.rounds or ROUNDS[device.type],
        )


@dataclass(frozen=True)
class _Subject:
    """One network of the run.

    Attributes:
        network: it without its weights, on the meta device: what it takes and what is printed of it.
        stack: what is called; None where memory ran out for its weights.
        weight_bytes: of weights and buffers.
    """

    network: Tagger
    parameters: int
    multiply_adds: int
    stack: Callable[[Tensor], Tensor] | None
    weight_bytes: int


def default_models() -> tuple[str, ...]:
    """The paper's network and what it is compared with; AST only where `transformers` is installed."""
    return ("erann-1-6", "cnn14", *(["ast"] if find_spec("transformers") else []))


def bench_models(
    settings: BenchSettings, device: torch.device, update: Update = lambda done, facts: None
) -> dict[str, Any]:
    """Time every network at every batch size; a plain dict, ready for JSON.

    `rows` has one entry for each pair, batch by batch: audios/s (clips a second: batch / median
    time), the median, p10 and p90 of the times in ms, sizes, TFLOP/s (two for each multiply-add
    of the network, the front end's not counted) and their share of the rate of a matrix product,
    memory in bytes (CUDA only: weights, input and the most that a call holds), what the paper
    prints, and speed relative to it and to `REFERENCES` (the median over the rounds of the ratio
    within each). Where memory ran out, `out_of_memory` is True and what was to be measured None.
    `update(done, facts)` hears of rounds.

    Raises:
        ConfigError: a name or a length of clips that a network does not take.
        TrainError: `compile` fails.
    """
    settings = settings.on(device)
    rows: list[dict[str, Any]] = []
    plans = [_plan(name, settings.seconds) for name in settings.models]
    with true_float32(device), _all_compiled(settings) if settings.compile else nullcontext():
        update(0, "measuring the rate of a matrix product")
        rate = matrix_rate(device, DTYPES[settings.dtype])
        subjects = {plan[0].name: _subject(*plan, settings, device) for plan in plans}
        for place, batch in enumerate(settings.batches):
            before = place * settings.rounds
            with torch.inference_mode():
                inputs = _inputs(subjects, batch, settings, device)
                calls = {
                    name: partial(_infer, subject.stack, inputs[name], device, DTYPES[settings.dtype])
                    for name, subject in subjects.items()
                    if subject.stack is not None and name in inputs
                }
                timed = time_in_turn(calls, device, settings.rounds, update, before)
            rows += _rows(subjects, inputs, timed, batch, settings.seconds, rate)
            # The next batch's input must not have to lie beside this one.
            del calls, inputs
    return {**_conditions(settings, device), "matrix_tflops": rate, "rows": rows}


@contextmanager
def _all_compiled(settings: BenchSettings) -> Iterator[None]:
    """Room for every compiled network; what the compiler cannot do becomes a TrainError."""
    from torch._dynamo import config

    # All are compiled behind one function, which gives up after its eighth variant and runs the rest slowly.
    with config.patch(recompile_limit=8 + 2 * len(settings.models) * len(settings.batches)), compiling():
        yield


def _plan(name: str, seconds: float) -> tuple[Tagger, int, int]:
    """A network on the meta device, its parameters and multiply-adds: errors come before anything large is built."""
    flag = f"--model {name}"
    try:
        network = outline_model(name, CLASSES)
        flag += f" --seconds {seconds:g}"
        return network, count_parameters(network), multiply_adds(network, network.input_shape(seconds))
    except ModelError as error:
        raise ConfigError(f"{flag}: {error}") from error


def _subject(
    on_meta: Tagger, parameters: int, multiplies: int, settings: BenchSettings, device: torch.device
) -> _Subject:
    """A network of fresh weights in evaluation mode, channels last, behind its front end, on the device."""
    network = create_model(on_meta.name, CLASSES).to(memory_format=torch.channels_last)
    front_end = FrontEnd.of(network, RATE) if settings.frontend else nn.Identity()
    stack = nn.Sequential(front_end, network).eval()
    held = sum(tensor.nbytes for tensor in (*stack.parameters(), *stack.buffers()))
    if unless_out_of_memory(partial(stack.to, device), device) is None:
        return _Subject(on_meta, parameters, multiplies, None, held)
    called = torch.compile(stack, dynamic=False) if settings.compile else stack
    return _Subject(on_meta, parameters, multiplies, called, held)


def _inputs(
    subjects: Mapping[str, _Subject], batch: int, settings: BenchSettings, device: torch.device
) -> dict[str, Tensor]:
    """What each network hears, noise: one tensor for all that take the same shape; none where memory ran out."""
    shapes: dict[str, tuple[int, ...]] = {name: (round(settings.seconds * RATE),) for name in subjects}
    if not settings.frontend:
        shapes = {name: subject.network.input_shape(settings.seconds) for name, subject in subjects.items()}
    made = {
        shape: unless_out_of_memory(partial(_noise, (batch, *shape), device), device)
        for shape in dict.fromkeys(shapes.values())
    }
    return {name: noise for name, shape in shapes.items() if (noise := made[shape]) is not None}


def _noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Float32: sound `[B, samples]` at -20 dB, or features `[B, bins, frames]` in dB about as loud as log-mels."""
    noise = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))
    return noise.mul_(0.1) if len(shape) == 2 else noise.mul_(10.0).sub_(40.0)


def _infer(stack: Callable[[Tensor], Tensor], x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return stack(x)


def _rows(
    subjects: Mapping[str, _Subject],
    inputs: Mapping[str, Tensor],
    timed: Mapping[str, Timed],
    batch: int,
    seconds: float,
    rate: float,
) -> list[dict[str, Any]]:
    rows = []
    for name, subject in subjects.items():
        one = timed.get(name, Timed())
        printed = _printed(subject.network, batch, seconds)
        row: dict[str, Any] = {
            "model": name,
            "batch": batch,
            "parameters": subject.parameters,
            "multiply_adds": subject.multiply_adds,
            "out_of_memory": not one.seconds,
            **_measured(one, subject.multiply_adds * batch, batch, rate),
            "memory_bytes": None,
            "paper": printed and printed.source,
            "paper_audios_per_s": printed and float(printed.figure.replace(",", "")),
        }
        if one.peak_bytes is not None:
            row["memory_bytes"] = subject.weight_bytes + inputs[name].nbytes + one.peak_bytes
        known = one.seconds and printed is not None
        row["times_paper"] = row["audios_per_s"] / row["paper_audios_per_s"] if known else None
        for reference in REFERENCES:
            other = timed.get(reference, Timed()).seconds
            ratios = np.array(other) / np.array(one.seconds) if one.seconds and other else None
            row[f"times_{reference}"] = None if ratios is None else float(np.median(ratios))
        rows.append(row)
    return rows


def _measured(timed: Timed, multiplies: int, batch: int, rate: float) -> dict[str, float | None]:
    """What follows from the times of calls of so many multiply-adds; all None where there are no times."""
    names = ("audios_per_s", "median_ms", "p10_ms", "p90_ms", "tflops", "share_of_matrix_rate")
    if not timed.seconds:
        return dict.fromkeys(names)
    p10, median, p90 = (float(quantile) for quantile in np.percentile(timed.seconds, (10, 50, 90)))
    tflops = 2 * multiplies / median / 1e12
    figures = (batch / median, 1e3 * median, 1e3 * p10, 1e3 * p90, tflops, tflops / rate)
    return dict(zip(names, figures, strict=True))


def _printed(network: Tagger, batch: int, seconds: float) -> Printed | None:
    """What a paper prints of this network at this batch size and length of clips."""
    wanted = (network.name, f"audios/s, B={batch}", seconds)
    found = (one for one in network.PRINTED if (one.model, one.quantity, one.seconds) == wanted)
    return next(found, None)


def _conditions(settings: BenchSettings, device: torch.device) -> dict[str, Any]:
    """Everything that the figures depend on, and how they were made, in words."""
    size = MATRIX[device.type]
    words = [
        "fresh weights, evaluation mode, inference mode, channels last; noise made once on the device",
        f"each round calls each network once, in turn, alone on the device, after {WARM_UP[device.type]} calls or more",
        "audios/s is batch / median over the rounds; ratios between networks are the median of each round's",
        f"the matrix rate is that of a product of two {size} x {size} matrices in {settings.dtype}",
        "fp32 is true float32, without TF32; bf16 is autocast, with weights in float32",
        "the papers' figures are of one Tesla V100",
    ]
    if device.type == "cuda":
        words.insert(3, "memory is weights, input and the most that a call holds beyond them")
    return {
        **asdict(settings),
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "classes": CLASSES,
        "sample_rate": RATE if settings.frontend else None,
        "protocol": words,
    }
