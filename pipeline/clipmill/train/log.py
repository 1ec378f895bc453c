"""What a run says of itself while it runs: metrics.jsonl, and the same for TensorBoard."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from clipmill.errors import TrainError
from clipmill.train import checkpoint

LOG_EVERY = 10
"""Steps between two looks at the loss: each look makes the device finish its work."""


class Log:
    """Appends to a run's metrics, from `start` steps on; lines of later steps, left by a killed run, go."""

    def __init__(self, out: Path, start: int, batch_size: int) -> None:
        checkpoint.keep_metrics_until(out, start)
        self._out, self._batch_size = out, batch_size
        self._file = open(out / checkpoint.METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(out), purge_step=start + 1 if start else None)
        self._losses: list[Tensor] = []
        self._since = time.monotonic()
        self.loss = math.nan

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def train(self, done: int, loss: Tensor, learning_rate: float, *, look: bool) -> None:
        """Take in a step's loss; every `LOG_EVERY` steps, or told to `look`, write their mean and clips a second.

        Raises:
            TrainError: a loss is not finite; names the step.
        """
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

    def _write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        row = {"kind": kind, **figures, "step": step}
        self._file.write(json.dumps(row, sort_keys=True) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        self._board.flush()
