"""What a run says of itself while it runs: metrics.jsonl, and the same for TensorBoard and others."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from clipmill.errors import ConfigError, TrainError
from clipmill.loader import Bad, Digest
from clipmill.train import checkpoint
from clipmill.train.held_out import main_value
from clipmill.train.ranks import Ranks

LOG_EVERY = 10
"""Steps between two looks at the loss: each look makes the device finish its work."""

WANDB_ID = "wandb.id"

TOLD = 5
"""Unreadable clips that are told on the terminal."""


class Sink(Protocol):
    """Who is told of a run's figures."""

    def scalars(self, figures: dict[str, float], step: int) -> None:
        """Take in figures by name."""

    def close(self) -> None:
        """Nothing more comes."""


MakeSink = Callable[[Path, int], Sink]
"""Makes one for a run's folder and the step that it begins or goes on at."""


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, out: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(out), purge_step=start + 1 if start else None)

    def scalars(self, figures: dict[str, float], step: int) -> None:
        """See `Sink`."""
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._board.close()


class WandB:
    """Weights & Biases, where it is installed: one run there for a run's folder, which a resumed one goes on with.

    Args:
        project: its name there.
        config: what config.json says.
        out: the run's folder, which keeps the id there.
        start: the step that it goes on at; 0: a new one.

    Raises:
        ConfigError: it is not installed, or it cannot start.
    """

    def __init__(self, project: str, config: dict[str, Any], out: Path, start: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--wandb needs the wandb library: pip install 'clipmill[wandb]'") from error
        try:
            if not start or not (out / WANDB_ID).exists():
                (out / WANDB_ID).write_text(uuid.uuid4().hex)
            self._run = wandb.init(
                project=project,
                name="-".join(out.resolve().parts[-2:]),
                id=(out / WANDB_ID).read_text(),
                resume="allow",
                reinit="finish_previous",
                dir=str(out),
                config=config,
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"--wandb {project}: {error}; WANDB_MODE=offline writes to {out} alone"
            ) from error

    def scalars(self, figures: dict[str, float], step: int) -> None:
        """See `Sink`."""
        self._run.log(figures, step=step)

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


class Meter:
    """Losses and times between two looks, on every rank: what is the same for all is worked out by all.

    Args:
        out: the run's folder, for messages.
        batch_size: clips in a step, of all ranks together.
        ranks: whose losses are averaged.
    """

    def __init__(self, out: Path, batch_size: int, ranks: Ranks) -> None:
        self._out, self._batch_size, self._ranks = out, batch_size, ranks
        self._losses: list[Tensor] = []
        self._waited_s = 0.0
        self._since = time.monotonic()
        self._loss, self._wait = math.nan, math.nan

    def step(
        self, done: int, loss: Tensor, learning_rate: float, waited_s: float, *, look: bool
    ) -> dict[str, float] | None:
        """Take in a step; every `LOG_EVERY` steps, or told to `look`, the figures since the last look.

        Returns:
            loss, the mean; learning_rate; clips_per_s; data_wait, the share of the time that went into waiting
            for batches.

        Raises:
            TrainError: a loss is not finite; names the step.
        """
        self._losses.append(loss)
        self._waited_s += waited_s
        if not look and done % LOG_EVERY:
            return None
        values = self._ranks.mean(torch.stack(self._losses)).tolist()
        self._losses.clear()
        for step, value in enumerate(values, done - len(values) + 1):
            if not math.isfinite(value):
                raise TrainError(
                    f"the loss is {value} at step {step} (learning rate {learning_rate:.3g}): begin again with a lower "
                    f"--learning-rate, with --clip-norm 1 or --precision fp32, and another --out; {self._out} keeps "
                    "what was saved before"
                )
        took = max(time.monotonic() - self._since, 1e-9)
        self._loss, self._wait = sum(values) / len(values), min(self._waited_s / took, 1.0)
        self.rest()
        return {
            "loss": self._loss,
            "learning_rate": learning_rate,
            "clips_per_s": round(len(values) * self._batch_size / took, 2),
            "data_wait": round(self._wait, 4),
        }

    def rest(self) -> None:
        """What the time since the last look went into is not training."""
        self._since, self._waited_s = time.monotonic(), 0.0

    def facts(self, last: dict[str, Any] | None) -> str:
        """What stands beside the progress bar; `last` are the figures of the last evaluation."""
        facts = []
        if not math.isnan(self._loss):  # else not measured yet
            facts = [f"loss {self._loss:.3f}", f"waiting for data {self._wait:.0%}"]
        return ", ".join(facts + ([f"{last['main_figure']} {main_value(last):.3f}"] if last else []))


class Log:
    """Appends to a run's metrics, from `start` steps on; lines of later steps, left by a killed run, go.

    On other ranks than the first nothing is written, but which clips they saw, where that is asked for.
    """

    def __init__(
        self,
        out: Path,
        start: int,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
        sinks: Sequence[MakeSink] = (),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._out, self._say, self._step, self._told = out, say, start, 0
        self._file: IO[str] | None = None
        self._batches: IO[str] | None = None
        self._batches_path = out / checkpoint.batches_file(ranks.rank)
        checkpoint.keep_lines_until(self._batches_path, start)
        self._sinks: list[Sink] = []
        if ranks.first:
            checkpoint.keep_lines_until(out / checkpoint.METRICS, start)
            self._file = open(out / checkpoint.METRICS, "a", encoding="utf-8")  # noqa: SIM115
            self._sinks = [make(out, start) for make in (TensorBoard, *sinks)]

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._batches):
            if file is not None:
                file.close()
        for sink in self._sinks:
            sink.close()

    def train(self, step: int, figures: dict[str, float]) -> None:
        """One line of kind `train`: what `Meter.step` gives."""
        self._write("train", step, figures)

    def evaluation(self, figures: dict[str, Any], unread: Sequence[Bad]) -> None:
        """One line of kind `eval`: the figures on the clips held out; and those of them that could not be read."""
        self._step = figures["step"]
        self.bad(unread)
        self._write("eval", figures["step"], figures)

    def bad(self, bads: Sequence[Bad]) -> None:
        """One line of kind `bad` for each clip that cannot be read; the first few are said aloud too."""
        if self._file is None:
            return
        for bad in bads:
            row = {"kind": "bad", **asdict(bad), "step": bad.step or self._step}
            self._file.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")
            self._file.flush()
            self._told += 1
            if self._told <= TOLD:
                self._say(str(bad))
            if self._told == TOLD:
                self._say(
                    f"more clips that cannot be read are told in {self._out / checkpoint.METRICS} alone, as kind bad"
                )

    def batch(self, step: int, digest: Digest) -> None:
        """One line of batches.jsonl: what step `step` (from 0) is made of."""
        if self._batches is None:
            self._batches = open(self._batches_path, "a", encoding="utf-8")  # noqa: SIM115
        self._batches.write(json.dumps({"step": step + 1, **asdict(digest)}, sort_keys=True) + "\n")
        self._batches.flush()

    def _write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        self._step = step
        if self._file is None:
            return
        row = {"kind": kind, **figures, "step": step}
        self._file.write(json.dumps(row, sort_keys=True) + "\n")
        self._file.flush()
        numbers = {f"{kind}/{name}": value for name, value in figures.items() if isinstance(value, float)}
        for sink in self._sinks:
            sink.scalars(numbers, step)
