"""A trained run as one of torch's exported programs: front end, network and probabilities, without complex numbers."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config

from clipmill.errors import TrainError
from clipmill.features import FrontEnd
from clipmill.train.checkpoint import Run
from clipmill.train.lengths import hears
from clipmill.train.objective import probabilities
from clipmill_models import Tagger

EXAMPLE_S = 2.317
"""Seconds that a network is traced with; no round number, so that nothing that is special to one is built in."""


@dataclass(frozen=True)
class Traced:
    """A run as a program of torch's.

    Attributes:
        program: takes `input`, gives logits and probabilities `[batch, classes]`.
        input: "waveform" or "features".
        input_shape: ("batch", "samples") or ("batch", bins, "frames"): what has a name is open.
        sample_rate: Hz of the waveform, or of the sound that the features are made of.
    """

    program: torch.export.ExportedProgram
    input: str
    input_shape: tuple[int | str, ...]
    sample_rate: int


class RealFrontEnd(nn.Module):
    """The same numbers as a `FrontEnd`, up to rounding, from real convolutions and products alone.

    `[B, samples]`, float32 in -1..1 -> `[B, bins, frames]`, or `[B, samples]` at the network's rate.
    """

    kernel: Tensor | None

    def __init__(self, front_end: FrontEnd) -> None:
        super().__init__()
        self.register_buffer("kernel", None)
        self.padded_to = front_end.least
        if (resample := front_end.resample) is not None:
            self.width = resample.width
            self.step = resample.orig_freq // resample.gcd
            self.phases = resample.new_freq // resample.gcd
            self.register_buffer("kernel", resample.kernel, persistent=False)
        self.feature: nn.Module | None = None
        if (feature := front_end.feature) is not None:
            self.feature = feature.real()
            self.frames = feature.frames
            # Sound that is not padded to whole seconds must be long enough to be mirrored at its ends.
            self.least = None if feature.frames_per_s else feature.config["n_fft"] // 2 + 1

    def forward(self, wave: Tensor) -> Tensor:
        """See the class."""
        if self.padded_to:
            lacking: Any = torch.sym_max(self.padded_to - wave.shape[1], 0)
            wave = F.pad(wave, (0, lacking))
        if self.kernel is not None:
            # Upwards in whole numbers: ONNX's division would round a negative one the other way.
            samples = (wave.shape[1] * self.phases + self.step - 1) // self.step
            # Two steps behind the end, one more than is needed: no length then comes out uncut, which would
            # be another program to the exporter.
            padded = F.pad(wave, (self.width, self.width + 2 * self.step))
            phases = F.conv1d(padded[:, None], self.kernel, stride=self.step)
            wave = phases.transpose(1, 2).flatten(1)[:, :samples]
        if self.feature is None:
            return wave
        if self.least is None:
            return self.feature(wave)
        missing: Any = torch.sym_max(self.least - wave.shape[1], 0)
        return self.feature(F.pad(wave, (0, missing)))[..., : self.frames(wave.shape[1])]


class _Whole(nn.Module):
    """What is exported: `[B, ...] -> (logits [B, classes], probabilities [B, classes])`."""

    def __init__(self, front_end: RealFrontEnd | None, model: Tagger, loss: str) -> None:
        super().__init__()
        self.front_end, self.model, self.loss = front_end, model, loss

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(x if self.front_end is None else self.front_end(x))
        return logits, probabilities(logits, self.loss)


def trace_run(run: Run, *, inside: bool) -> Traced:
    """Trace a run on the CPU; with the front end `inside` it takes sound at the run's rate.

    Raises:
        TrainError: the network cannot be exported with batch and length left open.
    """
    front_end = run.features
    rate = front_end.sample_rate if inside else front_end.resample_to or front_end.sample_rate
    sizes: tuple[int | str, ...] = ("batch", "samples")
    if front_end.bins is not None and not inside:
        sizes = ("batch", front_end.bins, "frames")
    example = _example(run, inside)
    whole = _Whole(RealFrontEnd(front_end) if inside else None, run.model, run.loss).eval()
    open_places = [place for place, size in enumerate(sizes) if isinstance(size, str)]
    try:
        program = program_of(whole, example, open_places)
    except Exception as error:  # the exporter raises whatever it meets
        raise TrainError(f"{run.folder}: {run.model.name} cannot be exported: {first_line(error)}") from error
    for graph in (
        part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)
    ):
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)  # says where the code lies on this machine
    name = "features" if len(sizes) == 3 else "waveform"
    return Traced(program, name, sizes, rate)


def program_of(
    module: nn.Module, example: Tensor, open_places: Sequence[int]
) -> torch.export.ExportedProgram:
    """A module of one input as a program, with these axes of the input left open; raises whatever torch does."""
    settings: Any = _config
    # Or else the program would refuse what comes to 1 place anywhere: a clip of a second, in a network's last stage.
    with quiet(), torch.no_grad(), settings.patch(backed_size_oblivious=True):
        return torch.export.export(
            module, (example,), dynamic_shapes=(dict.fromkeys(open_places, torch.export.Dim.DYNAMIC),)
        )


def crop_s(run: Run) -> float:
    """Seconds that the run was trained on; 10 where it took clips whole."""
    return float(run.config["recipe"]["crop_s"] or 10.0)


def takes(run: Run, seconds: float) -> bool:
    """Whether the network takes clips of so many seconds."""
    return hears(run.model, run.features, round(seconds * run.sample_rate))


def _example(run: Run, inside: bool) -> Tensor:
    """Two clips to trace with; as long as the run's own crop where the network takes no longer ones."""
    seconds = EXAMPLE_S if takes(run, EXAMPLE_S) else crop_s(run)
    sound = torch.zeros(2, round(seconds * run.sample_rate))
    # A copy: the exporter stumbles over examples that are views.
    return sound if inside else run.features(sound).clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporter, which tells of every step, off the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """What went wrong at the bottom of it, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__
