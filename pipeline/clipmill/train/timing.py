"""How long calls take side by side, how fast the device could be, and what it is to run out of memory."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from clipmill.errors import TrainError

T = TypeVar("T")
Update = Callable[[int, str], None]

WARM_UP = {"cpu": 2, "cuda": 10}
"""Calls before the first that counts: the first compiles, allocates and chooses algorithms."""

MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the square matrices whose product is the device's rate."""


@dataclass(frozen=True)
class Timed:
    """What one call took.

    Attributes:
        seconds: of each round, in order; empty where memory ran out.
        peak_bytes: the most that a call held at once on a CUDA device, beyond what was there
            before it; None on a CPU, which does not tell.
    """

    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    update: Update = lambda done, facts: None,
    done_before: int = 0,
) -> dict[str, Timed]:
    """Warm each call up, then time all of them once a round, in the order given.

    A call that runs out of memory, at whatever point, is left out from there on and comes back
    as an empty `Timed`. Every call is timed alone: the device is idle before it and waited for
    after it. `update(done, facts)` hears of rounds, the `done_before` among them.
    """
    peaks: dict[str, int] = {}
    for name, call in calls.items():
        update(done_before, f"warming up {name}")
        peak = unless_out_of_memory(partial(_warm_up, call, device), device)
        if peak is not None:
            peaks[name] = peak
    took: dict[str, list[float]] = {name: [] for name in peaks}
    for done in range(rounds):
        for name in list(took):
            seconds = unless_out_of_memory(partial(seconds_of, calls[name], device), device)
            if seconds is None:
                del took[name]
            else:
                took[name].append(seconds)
        update(done_before + done + 1, "")
    on_cuda = device.type == "cuda"
    return {
        name: Timed(tuple(took[name]), peaks[name] if on_cuda else None) if name in took else Timed()
        for name in calls
    }


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: between two CUDA events around it, or by the clock on a CPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a product of two square matrices of `dtype`: what the device can do at best (median of 10)."""
    size = MATRIX[device.type]
    a = torch.randn(size, size, device=device).to(dtype)
    product = partial(torch.matmul, a, a, out=torch.empty_like(a))
    _warm_up(product, device)
    return 2 * size**3 / float(np.median([seconds_of(product, device) for _ in range(10)])) / 1e12


def _warm_up(call: Callable[[], object], device: torch.device) -> int:
    """Call until it runs as it will; the bytes that a call takes at most on CUDA, 0 on a CPU."""
    for _ in range(WARM_UP[device.type]):
        call()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """On `device`: float32 without TF32, and cuDNN's fastest algorithm for each shape."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False),
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def unless_out_of_memory(make: Callable[[], T], device: torch.device) -> T | None:
    """What `make` returns, or None where memory ran out, with what it had held given back."""
    try:
        return make()
    except (RuntimeError, MemoryError) as error:
        if not says_out_of_memory(error):
            raise
    # Only here are the error's frames gone, and with them the tensors that they held.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Where memory runs out, a TrainError that says what was too much, and what to do, in the words of `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not says_out_of_memory(error):
            raise
        raise TrainError(f"memory runs out with {what}") from error


def says_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is of memory that ran out."""
    if error is None:
        return False
    # On a CPU, and from cuBLAS, it is a plain RuntimeError; a compiled network wraps the error in its own.
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "bad_alloc")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(w in str(error).lower() for w in words) or says_out_of_memory(error.__cause__)
