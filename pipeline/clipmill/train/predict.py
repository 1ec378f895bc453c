"""Say what is heard in sound files of any format and length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill.audio import prepare_clip
from clipmill.augment import to_float
from clipmill.errors import ConfigError, DecodeError
from clipmill.train.checkpoint import Run
from clipmill.train.device import SECONDS_AT_ONCE
from clipmill.train.lengths import longest_s
from clipmill.train.objective import probabilities

WINDOW_S = 10
"""Seconds heard at a time, unless told otherwise or the network takes less."""


@dataclass(frozen=True)
class Prediction:
    """What is heard in one file: float32 `[classes]` probabilities, or why it could not be heard.

    `seconds` is the file's length. On failure `scores` is None, `reason` is one of
    `clipmill.types.REASONS` and `message` says more.
    """

    file: str
    seconds: float | None = None
    scores: NDArray[np.float32] | None = None
    reason: str | None = None
    message: str | None = None

    def row(self, labels: list[str], top: int) -> dict[str, Any]:
        """JSON-able: file, seconds and the `top` predictions, likeliest first; or file, reason and message."""
        if self.scores is None:
            return {"file": self.file, "reason": self.reason, "message": self.message}
        # Stable, so that ties keep the order of the classes.
        best = np.argsort(-self.scores, kind="stable")[:top]
        predictions = [{"label": labels[c], "probability": round(float(self.scores[c]), 6)} for c in best]
        return {"file": self.file, "seconds": self.seconds, "predictions": predictions}


def predict_files(
    run: Run, files: Iterable[Path | str], device: torch.device, *, window_s: int | None = None
) -> Iterator[Prediction]:
    """Yield what is heard in each file, one after the other; a bad file is a row too.

    `window_s` is how many seconds are heard at a time; by default 10, or as many as the network takes.

    Raises:
        ConfigError: `window_s` is below 1, or more than the network takes.
    """
    most = longest_s(run.model, run.features)
    window_s = int(min(WINDOW_S, most)) if window_s is None else window_s
    if not 1 <= window_s <= most:
        allowed = (
            "from 1 up" if most == math.inf else f"from 1 to {most}, the most that {run.model.name} takes"
        )
        raise ConfigError(f"--window {window_s}: allowed is any whole number of seconds {allowed}")
    for file in files:
        try:
            ready = prepare_clip(Path(file), run.sample_rate)
        except DecodeError as error:
            yield Prediction(str(file), reason=error.reason, message=str(error))
            continue
        yield Prediction(
            str(file), round(ready.duration_s, 3), score_samples(run, ready.samples, device, window_s)
        )


@torch.inference_mode()
def score_samples(
    run: Run, samples: NDArray[np.int16], device: torch.device, window_s: int
) -> NDArray[np.float32]:
    """Probabilities `[classes]` of int16 `[samples]`, a whole number of seconds at the run's rate.

    Sound longer than `window_s` seconds is cut into windows; the last may be shorter, and each
    counts by its length.
    """
    window = window_s * run.sample_rate
    whole = len(samples) // window
    cuts = [samples[: whole * window].reshape(whole, window)] if whole else []
    if whole * window < len(samples):
        cuts.append(samples[None, whole * window :])
    at_once = max(1, SECONDS_AT_ONCE[device.type] // window_s)
    total = torch.zeros(len(run.labels), dtype=torch.float64, device=device)
    for cut in cuts:
        for start in range(0, len(cut), at_once):
            waves = torch.from_numpy(cut[start : start + at_once]).to(device)
            logits = run.model(run.features(to_float(waves))).float()
            total += probabilities(logits, run.loss).double().sum(0) * cut.shape[1]
    return (total / len(samples)).float().cpu().numpy()
