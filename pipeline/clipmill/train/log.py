"""What a run says of itself while it runs: metrics.jsonl, and the same for TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from clipmill.errors import TrainError
from clipmill.loader import Bad, Digest
from clipmill.train import checkpoint

LOG_EVERY = 10
"""Steps between two looks at the loss: each look makes the device finish its work."""

TOLD = 5
"""Unreadable clips that are told on the terminal."""


class Log:
    """Appends to a run's metrics, from `start` steps on; lines of later steps, left by a killed run, go."""

    def __init__(
        self, out: Path, start: int, batch_size: int, say: Callable[[str], None] = lambda text: None
    ) -> None:
        for name in (checkpoint.METRICS, checkpoint.BATCHES):
            checkpoint.keep_lines_until(out / name, start)
        self._out, self._batch_size, self._say = out, batch_size, say
        self._file = open(out / checkpoint.METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(out), purge_step=start + 1 if start else None)
        self._batches: IO[str] | None = None
        self._step, self._told = start, 0
        self._losses: list[Tensor] = []
        self._since = time.monotonic()
        self.loss = math.nan

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._batches is not None:
            self._batches.close()
        self._board.close()

    def train(self, done: int, loss: Tensor, learning_rate: float, *, look: bool) -> None:
        """Take in a step's loss; every `LOG_EVERY` steps, or told to `look`, write their mean and clips a second.

        Raises:
            TrainError: a loss is not finite; names the step.
        """
        self._step = done
        self._losses.append(loss.detach())
        if not look and done % LOG_EVERY:
            return
        values = torch.stack(self._losses).tolist()
        self._losses.clear()
        for step, value in enumerate(values, done - len(values) + 1):
            if not math.isfinite(value):
                raise TrainError(
                    f"the loss is {value} at step {step} (learning rate {learning_rate:.3g}): begin again with a "
                    f"lower --learning-rate and another --out; {self._out} keeps what was saved before"
                )
        now = time.monotonic()
        speed = len(values) * self._batch_size / max(now - self._since, 1e-9)
        self._since = now
        self.loss = sum(values) / len(values)
        figures = {"loss": self.loss, "learning_rate": learning_rate, "clips_per_s": round(speed, 2)}
        self._write("train", done, figures)

    def evaluation(self, figures: dict[str, Any]) -> None:
        """One line: the figures on the clips held out."""
        self._write("eval", figures["step"], figures)
        self._since = time.monotonic()  # the time since the last look went into evaluating

    def bad(self, bad: Bad) -> None:
        """One line of kind `bad` for a clip that cannot be read; the first few are said aloud too."""
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
            self._batches = open(self._out / checkpoint.BATCHES, "a", encoding="utf-8")  # noqa: SIM115
        self._batches.write(json.dumps({"step": step + 1, **asdict(digest)}, sort_keys=True) + "\n")
        self._batches.flush()

    def _write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        row = {"kind": kind, **figures, "step": step}
        self._file.write(json.dumps(row, sort_keys=True) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        self._board.flush()
