"""Windows of many files, scored together on the device, and handed back in the files' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill.augment import to_float
from clipmill.errors import DecodeError, TrainError
from clipmill.train.checkpoint import Run
from clipmill.train.device import SECONDS_AT_ONCE
from clipmill.train.evaluate import Fetched
from clipmill.train.objective import probabilities
from clipmill.train.timing import within_memory

WINDOWS_A_PART = 256
"""Windows in one `Prediction`: a file with more comes in several."""

_WAITING = 4
"""Batches' worth of sound that is taken while a window waits for others of its length."""

_ANSWERS = 1000
"""Files that may wait for one before them."""

_LENGTHS = 10
"""Lengths of which windows wait at a time: room for a whole batch is kept for each."""

Window = tuple[int, list[NDArray[np.int16]]]


@dataclass(frozen=True)
class Prediction:
    """What is heard in a file, or in a part of it, or why it could not be heard.

    Attributes:
        file: its name.
        seconds: its length; None on failure, and where `more` follows.
        scores: probabilities, float32 `[classes]`; where windows are told apart `[windows, classes]`. None on failure.
        starts_s, ends_s: of each window, in seconds; None where windows are not told apart.
        more: whether another `Prediction` of this file follows: it has more windows, or breaks off.
        reason: on failure, one of `clipmill.types.REASONS`.
        message: on failure, more about it.
    """

    file: str
    seconds: float | None = None
    scores: NDArray[np.float32] | None = None
    starts_s: list[float] | None = None
    ends_s: list[float] | None = None
    more: bool = False
    reason: str | None = None
    message: str | None = None

    def rows(self, labels: list[str], top: int | None = None, threshold: float = 0.0) -> list[dict[str, Any]]:
        """JSON-able: one row for each window, or one of the file; of a failure file, reason and message.

        A row has file, start_s and end_s where windows are told apart, seconds (of the file, or the window) and
        predictions: the `top` labels of at least the probability `threshold`, likeliest first.
        """
        if self.scores is None:
            return [{"file": self.file, "reason": self.reason, "message": self.message}]
        if self.starts_s is None or self.ends_s is None:
            heard = _likeliest(self.scores, labels, top, threshold)
            return [{"file": self.file, "seconds": self.seconds, "predictions": heard}]
        return [
            {
                "file": self.file,
                "start_s": start,
                "end_s": end,
                "seconds": round(end - start, 3),
                "predictions": _likeliest(scores, labels, top, threshold),
            }
            for start, end, scores in zip(self.starts_s, self.ends_s, self.scores, strict=True)
        ]


def _likeliest(
    scores: NDArray[np.float32], labels: list[str], top: int | None, threshold: float
) -> list[dict[str, Any]]:
    # Stable, so that ties keep the order of the classes.
    best = np.argsort(-scores, kind="stable")[:top]
    return [
        {"label": labels[c], "probability": round(float(scores[c]), 6)}
        for c in best
        if scores[c] >= threshold
    ]


@dataclass
class _Answer:
    """A `Prediction` in the making: `open` windows of it are still to be scored."""

    file: str
    scores: list[NDArray[np.float32] | None] = field(default_factory=list)
    total: NDArray[np.float64] | float = 0.0
    weight: float = 0.0
    starts_s: list[float] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    open: int = 0
    taken_s: float = 0.0  # sound that had been taken with its last window
    ended: bool = False
    seconds: float | None = None
    failure: tuple[str, str] | None = None

    def prediction(self, apart: bool) -> Prediction:
        if self.failure is not None:
            return Prediction(self.file, reason=self.failure[0], message=self.failure[1])
        if not apart:
            return Prediction(self.file, self.seconds, np.asarray(self.total / self.weight, np.float32))
        scores = np.stack([one for one in self.scores if one is not None])
        return Prediction(
            self.file, self.seconds, scores, self.starts_s, self.ends_s, more=self.seconds is None
        )


class _Place(NamedTuple):
    """Whose it is, which of its windows, how many samples it has, and how many of them no other window had before."""

    answer: _Answer
    place: int
    samples: int
    fresh: int


class _Batch:
    """Windows of one padded length, copied to where the device takes them from as they come."""

    def __init__(self, windows: int, padded: int, device: torch.device) -> None:
        # [B, samples]; pinned, so that the copy to a GPU need not be waited for.
        self._waves = torch.empty((windows, padded), dtype=torch.int16, pin_memory=device.type == "cuda")
        self.windows: list[_Place] = []

    def add(self, window: _Place, pieces: list[NDArray[np.int16]]) -> None:
        row = self._waves[len(self.windows)].numpy()
        np.concatenate(pieces, out=row[: window.samples])
        row[window.samples :] = 0
        self.windows.append(window)

    @property
    def full(self) -> bool:
        return len(self.windows) == len(self._waves)

    @property
    def waves(self) -> torch.Tensor:
        return self._waves[: len(self.windows)]


class Listener:
    """Takes the sound of file after file; windows of equal length go through the network together.

    A GPU works on a batch while the next one is gathered, and that one's answers are read when it is done.

    Args:
        run: the network; its front end pads nothing, so that windows are padded to whole seconds here.
        device: where it is.
        apart: whether each window is told; else their mean, weighted by length (before the padding).
        heard: is told, of each batch scored, the seconds of sound in it that were in no window before.
    """

    def __init__(
        self,
        run: Run,
        device: torch.device,
        *,
        apart: bool,
        heard: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.run, self.device, self.apart, self.heard = run, device, apart, heard
        self._most_s = SECONDS_AT_ONCE[device.type]
        self._answers: deque[_Answer] = deque()
        self._waiting: dict[int, _Batch] = {}  # by padded samples; the one that waits longest first
        self._under_way: tuple[list[_Place], Fetched] | None = None
        self._taken_s = 0.0

    def hear(
        self, file: str, windows: Iterable[Window], length_s: Callable[[], float]
    ) -> Iterator[Prediction]:
        """Take a file's windows, in order; yield what has become known meanwhile, of it or of files before.

        A window is its first sample's place in the file, and pieces of int16 mono at the run's rate. To come to
        the next may raise DecodeError; `length_s` tells the file's length when they have ended.

        Raises:
            TrainError: the network's answers are not finite, or memory runs out.
        """
        answer = self._begin(file)
        taken = reached = 0
        try:
            for start, pieces in windows:
                if self.apart and len(answer.scores) == WINDOWS_A_PART:
                    answer.ended, answer = True, self._begin(file)
                end = start + sum(map(len, pieces))
                self._queue(answer, start, pieces, end - max(start, reached))
                taken, reached = taken + 1, end
                yield from self._ready()
        except DecodeError as error:
            self._fail(answer, error, taken)
        else:
            answer.seconds, answer.ended = round(length_s(), 3), True
            if answer.ends_s:  # resampling rounds up to a whole sample
                answer.ends_s[-1] = min(answer.ends_s[-1], answer.seconds)
        yield from self._ready()

    def fail(self, file: str, reason: str, message: str) -> Iterator[Prediction]:
        """Take note that a file cannot be heard, in its turn."""
        self._fail(self._begin(file), DecodeError(reason, message), 0)
        yield from self._ready()

    def flush(self) -> Iterator[Prediction]:
        """Score what waits, and yield what is left."""
        for padded in list(self._waiting):
            self._score(padded)
        self._settle()
        yield from self._ready()

    def _begin(self, file: str) -> _Answer:
        answer = _Answer(file)
        self._answers.append(answer)
        return answer

    def _fail(self, answer: _Answer, error: DecodeError, windows: int) -> None:
        if self.apart and answer.scores:
            answer.ended, answer = True, self._begin(answer.file)
        some = f"; what was heard in the {windows} windows before stands" if self.apart and windows else ""
        answer.failure, answer.open, answer.ended = (error.reason, f"{error}{some}"), 0, True

    def _queue(self, answer: _Answer, start: int, pieces: list[NDArray[np.int16]], fresh: int) -> None:
        rate, samples = self.run.sample_rate, sum(map(len, pieces))
        padded_s = -(-samples // rate)
        padded = padded_s * rate
        if padded not in self._waiting:
            if len(self._waiting) == _LENGTHS:
                self._score(next(iter(self._waiting)))
            with within_memory(self._too_much(padded)):
                self._waiting[padded] = _Batch(max(1, self._most_s // padded_s), padded, self.device)
        self._waiting[padded].add(_Place(answer, len(answer.scores), samples, fresh), pieces)
        self._taken_s += padded_s
        answer.taken_s = self._taken_s
        answer.open += 1
        if self.apart:
            answer.scores.append(None)
            answer.starts_s.append(round(start / rate, 3))
            answer.ends_s.append(round((start + samples) / rate, 3))
        if self._waiting[padded].full:
            self._score(padded)

    def _ready(self) -> Iterator[Prediction]:
        """What is known, in order; where much came after the first, what it waits for is scored."""
        if self._under_way is not None and self._under_way[1].there:
            self._settle()
        while self._answers:
            first = self._answers[0]
            if first.ended and not first.open:
                yield self._answers.popleft().prediction(self.apart)
            elif first.open and (
                self._taken_s - first.taken_s > _WAITING * self._most_s or len(self._answers) > _ANSWERS
            ):
                self._hurry(first)
            else:
                return

    def _hurry(self, answer: _Answer) -> None:
        """Score some of the windows that an answer waits for, or wait for those that are on the device."""
        for padded, batch in self._waiting.items():
            if any(window.answer is answer for window in batch.windows):
                self._score(padded)
                return
        self._settle()

    @torch.inference_mode()
    def _score(self, padded: int) -> None:
        """Send the waiting windows of `padded` samples to the device, and read the answers to those before them."""
        batch = self._waiting.pop(padded)
        with within_memory(self._too_much(padded)):
            waves = to_float(batch.waves.to(self.device, non_blocking=True))
            logits = self.run.model(self.run.features(waves)).float()
            scores = Fetched(probabilities(logits, self.run.loss))  # [B, classes]
        self._settle()
        self._under_way = batch.windows, scores
        if scores.there:  # as on a CPU
            self._settle()

    def _too_much(self, padded: int) -> str:
        on_gpu = ", and --device cpu uses the machine's own memory" if self.device.type == "cuda" else ""
        return (
            f"{padded // self.run.sample_rate} s of sound in a window; a shorter --window takes less{on_gpu}"
        )

    def _settle(self) -> None:
        """Take the answers of the device to what it was sent last."""
        if self._under_way is None:
            return
        (windows, fetched), self._under_way = self._under_way, None
        scores = fetched.numpy()
        if not np.isfinite(scores).all():
            raise TrainError(
                f"{self.run.folder}: the network answers NaN: its training has diverged; "
                "train again with a lower --learning-rate"
            )
        for (answer, place, samples, _), score in zip(windows, scores, strict=True):
            if answer.failure is not None:
                continue
            answer.open -= 1
            if self.apart:
                answer.scores[place] = score
            else:
                answer.total = answer.total + np.float64(score) * samples
                answer.weight += samples
        self.heard(sum(window.fresh for window in windows) / self.run.sample_rate)
