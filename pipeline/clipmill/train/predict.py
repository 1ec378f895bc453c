"""Say what is heard in sound files of any format and length."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill.audio.stream import ClipStream
from clipmill.datasets.folder import is_text
from clipmill.errors import ConfigError, DecodeError
from clipmill.loader.ahead import in_order
from clipmill.train.checkpoint import Run
from clipmill.train.inputs import Source
from clipmill.train.lengths import longest_s
from clipmill.train.listen import Listener, Prediction, Window
from clipmill.types import SOUND_SUFFIXES

__all__ = ["WINDOW_S", "Prediction", "predict_files"]

WINDOW_S = 10
"""Seconds heard at a time, unless told otherwise or the network takes less."""

LEAST_S = 0.01
"""Seconds: the shortest window told, and the shortest way from one to the next."""

_HEAD_S = 120.0
"""Seconds of each file that are decoded ahead of its turn."""


Blocks = Iterable[NDArray[np.int16]]
Cut = Callable[[Blocks], Iterator[Window]]


def predict_files(
    run: Run,
    files: Iterable[Path | str | Source],
    device: torch.device,
    *,
    window_s: float | None = None,
    hop_s: float | None = None,
    workers: int = 1,
    heard: Callable[[float], None] = lambda seconds: None,
) -> Generator[Prediction, None, None]:
    """Yield what is heard in each file, in order; a file that cannot be heard is a `Prediction` that says why.

    Without `window_s`, a file's scores are the mean of windows of 10 s, or of what the network takes, each by
    its length. With it, each window is told, `hop_s` (by default `window_s`) after the one before; a file of
    more than 256 windows comes in several predictions. Windows are padded with zeros to whole seconds, as the
    shards' clips are, and scored together with those of other files: a prediction comes when a batch of such
    windows is full, when much was heard after it, or at the end. `workers` threads decode ahead, and ask for a
    few files more; files may be of any length. `heard` is told the seconds of new sound in each batch.

    Raises:
        ConfigError: a window or hop that cannot be.
        TrainError: the network's answers are not finite, or memory runs out.
    """
    apart = window_s is not None
    window_s, hop_s = _windows(run, window_s, hop_s)
    least = round(LEAST_S * run.sample_rate) if apart else 1
    cut = partial(cut_windows, rate=run.sample_rate, window_s=window_s, hop_s=hop_s, least=least)
    listener = Listener(run, device, apart=apart, heard=heard)
    sources = (file if isinstance(file, Source) else Source(str(file), Path(file)) for file in files)
    return _predictions(listener, sources, cut, workers)


def _predictions(
    listener: Listener, sources: Iterable[Source], cut: Cut, workers: int
) -> Generator[Prediction, None, None]:
    opened = partial(_open, rate=listener.run.sample_rate)
    with closing(in_order(opened, sources, workers)) as sounds:
        for sound in sounds:
            yield from _hear(listener, sound, cut, workers)
    yield from listener.flush()


def _hear(listener: Listener, sound: _Sound, cut: Cut, workers: int) -> Iterator[Prediction]:
    if sound.failure is not None:
        yield from listener.fail(sound.name, sound.failure.reason, str(sound.failure))
        return
    with closing(_all(sound, workers)) as blocks:
        yield from listener.hear(sound.name, cut(blocks), lambda: sound.stream.duration_s)


def _windows(run: Run, window_s: float | None, hop_s: float | None) -> tuple[float, float]:
    """Seconds in a window, and from one to the next; raises ConfigError where they cannot be."""
    most = longest_s(run.model, run.features)
    if window_s is None:
        if hop_s is not None:
            raise ConfigError("--hop: is the way from one --window to the next; give that too")
        window = int(min(WINDOW_S, most))
        return window, window
    if not LEAST_S <= window_s <= most or window_s == math.inf:
        allowed = "up" if most == math.inf else f"to {most}, the most that {run.model.name} takes"
        raise ConfigError(f"--window {window_s:g}: allowed are {LEAST_S:g} s {allowed}")
    hop_s = window_s if hop_s is None else hop_s
    if not LEAST_S <= hop_s < math.inf:
        raise ConfigError(f"--hop {hop_s:g}: allowed are {LEAST_S:g} s up")
    return window_s, hop_s


@dataclass
class _Sound:
    """A file's first blocks, and those that follow where it is longer; or why it cannot be heard."""

    name: str
    stream: ClipStream
    head: list[NDArray[np.int16]]
    rest: Generator[NDArray[np.int16], None, None] | None = None
    failure: DecodeError | None = None


def _open(source: Source, rate: int) -> _Sound:
    """Decode a file's first two minutes: in a worker, so that the network need not wait for them."""
    stream = ClipStream(source.path, rate)
    if source.reason is not None:
        return _Sound(source.name, stream, [], failure=DecodeError(source.reason, source.message or ""))
    blocks = _guarded(stream)
    head: list[NDArray[np.int16]] = []
    try:
        for block in blocks:
            head.append(block)
            if sum(map(len, head)) > _HEAD_S * rate:
                return _Sound(source.name, stream, head, blocks)
    except DecodeError as failure:
        named = source.path.suffix.lower() in SOUND_SUFFIXES
        if failure.reason == "corrupt" and not named and is_text(source.path):
            failure = DecodeError("not-audio", "is plain text")
        return _Sound(source.name, stream, [], failure=failure)
    return _Sound(source.name, stream, head)


def _guarded(stream: ClipStream) -> Generator[NDArray[np.int16], None, None]:
    """The stream's blocks; whatever goes wrong is a DecodeError: one bad file must not end the job."""
    try:
        yield from stream
    except DecodeError:
        raise
    except OSError as error:
        raise DecodeError("unreadable", error.strerror or str(error)) from error
    except MemoryError as error:
        raise DecodeError("memory", "needs more memory than there is") from error
    except Exception as error:  # of a library, at what nobody has fed it yet
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DecodeError("tool-error", said) from error


def _all(sound: _Sound, workers: int) -> Generator[NDArray[np.int16], None, None]:
    """Every block of a file; those after the first two minutes come from a thread of their own."""
    yield from sound.head
    rest = sound.rest
    if rest is None:
        return
    with closing(rest), closing(in_order(lambda _: next(rest, None), repeat(None), min(workers, 1))) as ahead:
        for block in ahead:
            if block is None:
                return
            yield block


def cut_windows(
    blocks: Iterable[NDArray[np.int16]], rate: int, window_s: float, hop_s: float, least: int = 1
) -> Iterator[Window]:
    """Each window's first sample and, in pieces that follow each other, its samples; of int16 blocks that do.

    A window begins every `hop_s` seconds until one reaches the end; the last may be shorter,
    and is left out where it has fewer than `least` samples, unless it is the only one.
    """
    window = max(round(window_s * rate), 1)
    held: deque[NDArray[np.int16]] = deque()
    at = end = number = start = (
        0  # what is held is from sample `at` to `end`; the next window is `number`, from `start`
    )
    reached = -1  # where the last window ended
    for block in blocks:
        held.append(block)
        end += len(block)
        while start + window <= end:
            yield start, _stretch(held, start - at, window)
            reached = start + window
            number += 1
            start = round(number * hop_s * rate)
        while held and at + len(held[0]) <= start:
            at += len(held.popleft())
    while reached < end and (start + least <= end or not number):
        yield start, _stretch(held, start - at, window)
        reached = start + window
        number += 1
        start = round(number * hop_s * rate)


def _stretch(blocks: Iterable[NDArray[np.int16]], first: int, samples: int) -> list[NDArray[np.int16]]:
    """So many samples from the `first` on, or as many as there are."""
    pieces = []
    for block in blocks:
        if first < len(block):
            pieces.append(block[first : first + samples])
            samples -= len(pieces[-1])
            if not samples:
                break
        first = max(first - len(block), 0)
    return pieces
