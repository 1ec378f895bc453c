"""Features of whole clips, batch by batch, on a device: the same numbers whenever the same shard is computed there."""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipmill import __version__
from clipmill.augment import to_float
from clipmill.features import Feature
from clipmill.loader import Bad, Batch, WholeClips
from clipmill.shards.read import Shards

AT_ONCE_S = 160
"""Seconds of sound in a batch, or one clip, on every device: last bits may depend on how large a batch is."""


@dataclass(frozen=True)
class Computed:
    """The features of a batch of clips.

    Attributes:
        rows: int64 `[clips]`, in the shards they came from.
        values: `[clips, frames, bins]`, of the number type to be kept.
        held: `[clips]`, whether that holds all of a clip's values: it is else infinite somewhere.
        moments: of the clips whose values are held.
    """

    rows: NDArray[np.int64]
    values: NDArray[Any]
    held: NDArray[np.bool_]
    moments: Moments


@dataclass(frozen=True)
class Moments:
    """Frames, and for each bin float64 `[bins]` their mean and the sum of squares about it."""

    frames: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    def and_those(self, other: Moments) -> Moments:
        """Of both together (Chan, Golub and LeVeque 1979)."""
        frames = self.frames + other.frames
        if not frames:
            return self
        apart = other.mean - self.mean
        return Moments(
            frames,
            self.mean + apart * (other.frames / frames),
            self.squares + other.squares + apart**2 * (self.frames * other.frames / frames),
        )

    @classmethod
    def none(cls, bins: int) -> Moments:
        """Of no frames."""
        return cls(0, np.zeros(bins), np.zeros(bins))


def compute(
    feature: Feature,
    shards: Shards,
    dtype: str,
    device: torch.device,
    workers: int = 0,
    tell: Callable[[Bad], None] = lambda bad: None,
) -> Generator[Computed, None, None]:
    """Yield the features of all clips of the shards, as float16 or float32; each is read and checked by its sha256.

    Threads read ahead, and what was computed is on its way back from the device while the next batch is computed.
    Which clips make a batch depends on the shards alone: see `batch_mates`. `tell` hears of clips that cannot be read,
    which are left out. To be called within `exactly`.
    """
    feature = feature.to(device)
    clips = WholeClips(
        shards, AT_ONCE_S * shards.sample_rate, workers=workers, device=device, max_bad=1.0, check=True, tell=tell
    )  # fmt: skip
    before: _Launched | None = None
    with closing(clips.batches()) as batches:
        for batch in batches:
            launched = _Launched.of(feature, batch, getattr(torch, dtype))
            if before is not None:
                yield before.result()
            before = launched
    if before is not None:
        yield before.result()


def batch_mates(samples: NDArray[np.int64], row: int, rate: int) -> NDArray[np.int64]:
    """The rows that are computed in one batch with `row`, of shards whose clips have so many samples."""
    alike = np.flatnonzero(samples == samples[row])
    size = max(1, AT_ONCE_S * rate // int(samples[row]))
    place = int(np.searchsorted(alike, row)) // size
    return alike[place * size : (place + 1) * size]


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Full float32, whatever else the process does; on a CPU one thread, for sums depend on how they are shared out."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        if device.type == "cpu":
            torch.set_num_threads(1)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


def computed_by(device: torch.device) -> dict[str, Any]:
    """What the last bits of the numbers may depend on, beside the spec: the kind of device, and versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    versions = {"clipmill": __version__, "numpy": np.__version__, "torch": torch.__version__}
    return {"device": device.type, "kind": name, "versions": versions | {"torchaudio": version("torchaudio")}}


def silence_of(feature: Feature, dtype: str) -> list[float]:
    """What a feature makes of silence, as `dtype` holds it: `[bins]`, the middle frame of a second of zeros."""
    with torch.inference_mode():
        heard = feature(torch.zeros(1, feature.settings.sample_rate))[0]
    return heard[:, heard.shape[1] // 2].to(getattr(torch, dtype)).float().tolist()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class _Launched:
    """A batch on its way back from the device."""

    rows: Tensor
    values: Tensor
    held: Tensor
    moments: Tensor
    copied: torch.cuda.Event | None

    @classmethod
    @torch.inference_mode()
    def of(cls, feature: Feature, batch: Batch, dtype: torch.dtype) -> _Launched:
        """Compute a batch's features, without waiting for the device."""
        values = feature(to_float(batch.waves)).transpose(1, 2).to(dtype).contiguous()
        held = values.isfinite().flatten(1).all(1)
        wide = values.double().where(held[:, None, None], 0.0)
        frames = held.sum() * values.shape[1]
        mean = wide.sum((0, 1)) / frames.clamp(min=1)
        apart = (wide - mean).where(held[:, None, None], 0.0)
        moments = torch.stack([mean, apart.square().sum((0, 1))])
        back = [_to_cpu(part) for part in (values, held, moments)]
        copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None
        return cls(batch.rows, back[0], back[1], back[2], copied)

    def result(self) -> Computed:
        """What it came to, once it is there."""
        if self.copied is not None:
            self.copied.synchronize()
        held = self.held.numpy()
        mean, squares = self.moments.numpy()
        moments = Moments(int(held.sum()) * self.values.shape[1], mean, squares)
        return Computed(self.rows.numpy(), self.values.numpy(), held, moments)


def _to_cpu(part: Tensor) -> Tensor:
    if not part.is_cuda:
        return part
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
