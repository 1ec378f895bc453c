"""Power spectra of centred frames, and what features have in common; and the same from real products, for export."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipmill.features.feature import FRAMES_PER_S
from clipmill_models.base import without_autocast

ROWS = 32
"""Rows of one product of matrices: larger ones are shared out among threads along the sum, which rounds otherwise."""

AT_ONCE, AT_ONCE_ON_CPU = 2**27, 2**20
"""Numbers in a part of a batch; on a CPU, for each thread. There larger parts leave the cache, and need memory that the
system has to clear each time: whole batches take twice the time."""


class PowerSpectrum(nn.Module):
    """Power of the short-time Fourier transform with a Hann window, and what is made of it.

    Frame `t` is centred on sample `t * hop`, as `torch.stft(center=True)` has it: past its ends the waveform is
    mirrored, and the window stands in the middle of the transform. Computed with `first:last` of its bins only.

    Args:
        n_fft: samples of the Fourier transform.
        win_length: samples of the window, up to `n_fft`; behind them come zeros.
        hop: samples from frame to frame.
        first: the first bin that is wanted.
        last: the bin behind the last one; by default all up to the Nyquist frequency.
    """

    window: Tensor

    def __init__(
        self, n_fft: int, win_length: int, hop: int, first: int = 0, last: int | None = None
    ) -> None:
        super().__init__()
        self.n_fft, self.win_length, self.hop = n_fft, win_length, hop
        self.first, self.last = first, n_fft // 2 + 1 if last is None else last
        self.register_buffer("window", hann(win_length), persistent=False)

    def forward(self, wave: Tensor, samples: int, frames: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """`reduce` of the power, `[rows, some, bins] -> [rows, some, values]`, of all frames: `[B, values, frames]`.

        Args:
            wave: float32 `[B, any]`; what lacks to `samples` is silence.
            samples: more than half of `n_fft`, and at least to the last frame's centre; behind them is the mirror.
            frames: as many as are wanted.
            reduce: is given multiples of `ROWS` frames.
        """
        before = self.n_fft // 2 - (self.n_fft - self.win_length) // 2
        after = max(0, (frames - 1) * self.hop - before + self.win_length - samples)
        whole = -(-frames // ROWS) * ROWS
        end, length = before + samples, (whole - 1) * self.hop + self.win_length

        def windows(wave: Tensor) -> Tensor:
            # In one go: torch's own padding by zeros and by mirrors takes five times as long.
            mirrored = wave.new_empty(len(wave), max(end + after, length))
            mirrored[:, before : before + wave.shape[1]] = wave
            mirrored[:, before + wave.shape[1] :] = 0
            mirrored[:, :before] = mirrored[:, before + 1 : 2 * before + 1].flip(1)
            mirrored[:, end : end + after] = mirrored[:, end - 1 - after : end - 1].flip(1)
            return mirrored.unfold(1, self.win_length, self.hop)[:, :whole]

        values = in_parts(
            wave, windows, whole, self.n_fft, lambda some: reduce(self._power(some)).transpose(1, 2)
        )
        return values[..., :frames].contiguous()

    def _power(self, windows: Tensor) -> Tensor:
        """`[rows, frames, win_length] -> [rows, frames, bins]`."""
        spectrum = torch.fft.rfft(windows * self.window, self.n_fft)
        # Not `abs().square()`, which takes a careful root first: three times the time.
        squares = torch.view_as_real(spectrum[..., self.first : self.last]).square()
        return squares[..., 0] + squares[..., 1]


def hann(length: int) -> Tensor:
    """A periodic Hann window, float32 on the CPU."""
    return torch.hann_window(length, dtype=torch.float64, device="cpu").float()


def in_parts(
    waves: Tensor,
    windows: Callable[[Tensor], Tensor],
    count: int,
    size: int,
    function: Callable[[Tensor], Tensor],
    multiple: int = ROWS,
) -> Tensor:
    """A function of windows, computed in parts that suit the device: `[B, values, frames]`, as many from each window.

    Args:
        waves: `[B, any]`.
        windows: `[rows, any] -> [rows, count, n]`, of some of the waves.
        count: windows of each wave, a multiple of `multiple`.
        size: numbers that one window makes.
        function: `[rows, some, n] -> [rows, values, frames]`, of some windows of some of the waves.
        multiple: the function is given multiples of so many windows.
    """
    on_cpu = waves.device.type == "cpu"
    at_once = (AT_ONCE_ON_CPU * torch.get_num_threads() if on_cpu else AT_ONCE) // size
    rows, step = max(1, at_once // count), min(count, max(1, at_once // multiple) * multiple)
    out = None
    for row in range(0, len(waves), rows):
        of_rows = windows(waves[row : row + rows])
        for first in range(0, count, step):
            some = of_rows[:, first : first + step]
            part = function(some)
            each = part.shape[2] // some.shape[1]
            if out is None:
                out = part.new_empty(len(waves), part.shape[1], count * each)
            out[row : row + rows, :, first * each : (first + step) * each] = part
    assert out is not None
    return out


def product(values: Tensor, matrix: Tensor) -> Tensor:
    """`[rows, frames, n] @ [n, m] -> [rows, frames, m]`, rounded alike for any number of rows and threads."""
    few = values.unflatten(1, (-1, ROWS)).flatten(0, 1)
    return torch.bmm(few, matrix.expand(len(few), -1, -1)).view(*values.shape[:2], matrix.shape[1])


class Filters(nn.Module):
    """`[rows, some, bins] -> [rows, some, filters]`: a product with narrow filters, over the bins that they hear.

    Args:
        matrix: `[bins, filters]`, the filters in the order of their frequencies.

    Attributes:
        first: the first bin that any filter hears.
        last: the bin behind the last one; what is filtered are those between.
    """

    _TOGETHER = 32

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.first, self.last = _heard(matrix)
        self._bands = []
        for place, filters in enumerate(matrix.split(self._TOGETHER, 1)):
            first, last = _heard(filters)
            self._bands.append((f"_filters{place}", first - self.first, last - self.first))
            self.register_buffer(f"_filters{place}", filters[first:last].contiguous(), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """See the class."""
        return torch.cat(
            [product(values[..., first:last], getattr(self, name)) for name, first, last in self._bands], 2
        )


def _heard(filters: Tensor) -> tuple[int, int]:
    """The first bin in which any filter is not 0, and the bin behind the last one."""
    bins = filters.any(1).nonzero()
    return int(bins[0]), int(bins[-1]) + 1


class RealPowerSpectrum(nn.Module):
    """`PowerSpectrum` without complex numbers, of all bins.

    The transform is done in two steps (Cooley and Tukey 1965): with `n = b n1 + n2` and `k = k1 + a k2`, where `a b` is
    `n_fft`, a product of `a x a` matrices, a turn of each number, and a product of `b x b` ones.

    Args:
        sample_rate: of the waveform, in Hz, whose end is padded as `Framing.padded` does it.
        n_fft: samples of the Fourier transform.
        win_length: samples of the Hann window, up to `n_fft`.
    """

    window: Tensor
    first: Tensor
    turns: Tensor
    second: Tensor
    order: Tensor

    def __init__(self, sample_rate: int, n_fft: int, win_length: int) -> None:
        super().__init__()
        self.sample_rate, self.n_fft, self.win_length = sample_rate, n_fft, win_length
        self.hop = -(-sample_rate // FRAMES_PER_S)
        a = max(d for d in range(1, math.isqrt(n_fft) + 1) if n_fft % d == 0)
        b = n_fft // a
        self.steps = -(-win_length // b)  # of n1 that the window reaches
        half = a // 2 + 1  # of k1: the others are conjugates of these
        self.register_buffer("window", hann(win_length), persistent=False)
        first = turned(half, self.steps, a)  # cosines and sines [half, steps, 2]
        self.register_buffer("first", first.permute(2, 0, 1).flatten(0, 1), persistent=False)
        self.register_buffer("turns", turned(half, b, n_fft), persistent=False)
        cosines, sines = turned(b, b, b).unbind(2)
        second = torch.cat([torch.cat([cosines, -sines]), torch.cat([sines, cosines])], 1)
        self.register_buffer("second", second, persistent=False)
        k = torch.arange(n_fft // 2 + 1, device="cpu")
        k = torch.where(k % a < half, k, n_fft - k)
        self.register_buffer("order", k % a * b + k // a, persistent=False)

    def forward(self, wave: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """`reduce` of the power, `[rows, bins] -> [rows, values]`, of all frames: float32 `[B, values, frames]`.

        `wave` is floating point `[B, samples]`.
        """
        with without_autocast(wave):
            windows = self._frames(wave.float()) * self.window
            frames, b = windows.shape[1], self.second.shape[0] // 2
            x = functional.pad(windows, (0, self.steps * b - self.win_length))
            # As one batch: with clips apart, an exported program would refuse a single one.
            x = self.first @ x.flatten(0, 1).unflatten(1, (self.steps, b))  # [B * frames, 2 * half, b]
            real, imaginary = x.chunk(2, 1)
            cosines, sines = self.turns.unbind(2)
            x = torch.cat([real * cosines - imaginary * sines, real * sines + imaginary * cosines], 2)
            real, imaginary = (x.flatten(0, 1) @ self.second).chunk(2, 1)
            power = (real.square() + imaginary.square()).unflatten(0, (-1, self.turns.shape[0])).flatten(1)
            values = reduce(power[:, self.order])
            return values.unflatten(0, (-1, frames)).transpose(1, 2).contiguous()

    def _frames(self, wave: Tensor) -> Tensor:
        """`[B, samples] -> [B, frames, win_length]`."""
        wave, frames = real_padded(wave, self.sample_rate)
        before = self.n_fft // 2 - (self.n_fft - self.win_length) // 2
        after = self.win_length - before
        wave = functional.pad(wave[:, None], (before, after), mode="reflect")[:, 0]
        hops = -(-self.win_length // self.hop)
        x = functional.pad(wave, (0, hops * self.hop - self.win_length)).unfold(1, self.hop, self.hop)
        # A frame is some hops in a row: neighbours share all but one.
        rows = torch.arange(frames, device=x.device)[:, None] + torch.arange(hops, device=x.device)
        return x[:, rows].flatten(2)[..., : self.win_length]


def turned(rows: int, columns: int, circle: int) -> Tensor:
    """Cosines, and sines with a minus, of `row * column` of `circle` parts of a turn: float32 `[rows, columns, 2]`."""
    # Whole turns are dropped before the cosine is taken, where they would cost digits.
    parts = torch.outer(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")) % circle
    angles = parts.double() * (2 * math.pi / circle)
    return torch.stack([angles.cos(), -angles.sin()], 2).float()


def real_padded(wave: Tensor, sample_rate: int) -> tuple[Tensor, int]:
    """What `Framing.padded` and `Framing.frames` give, for sizes that an exported program leaves open."""
    # Upwards in whole numbers: ONNX divides them towards zero, not down.
    seconds = (wave.shape[1] + sample_rate - 1) // sample_rate
    frames = FRAMES_PER_S * seconds
    last_centre = (frames - 1) * (-(-sample_rate // FRAMES_PER_S))
    whole: Any = torch.sym_max(seconds * sample_rate, last_centre)
    return functional.pad(wave, (0, whole - wave.shape[1])), frames
