"""A log-mel spectrogram out of plain matrix products, for networks that carry their own and for export.

The Fourier transform is a product with cosines and sines, so that there is no complex
number in it: ONNX, which has none, and compilers take it as it is. It costs more than a
fast transform, and nothing beside the networks that read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill_models.base import ModelError, check_positive, without_autocast

_HZ_PER_MEL = 200 / 3
_LOG_FROM_HZ = 1000.0
_LOG_STEP = math.log(6.4) / 27
"""Slaney's scale (Auditory Toolbox, 1998): even steps up to 1 kHz, above it 27 to a factor of 6.4."""


def mel_filterbank(
    *,
    sample_rate: int,
    n_fft: int,
    f_min: float,
    f_max: float,
    n_mels: int,
    mel_scale: str = "slaney",
    mel_norm: str | None = "slaney",
) -> Tensor:
    """Triangular mel filters as a matrix `[n_fft // 2 + 1, n_mels]`, float64 on the CPU.

    The numbers are those of `torchaudio.functional.melscale_fbanks` (and of librosa). As
    there, the bins are spread evenly over 0 to `sample_rate // 2` Hz, which for an odd rate
    or an odd `n_fft` is a hair off the transform's own frequencies.

    Args:
        sample_rate: of the waveform, in Hz.
        n_fft: samples of the Fourier transform.
        f_min: lower edge of the lowest filter, in Hz.
        f_max: upper edge of the highest filter, in Hz.
        n_mels: number of filters.
        mel_scale: "slaney" or "htk".
        mel_norm: "slaney" for filters of equal area, None for filters of equal height.

    Raises:
        ModelError: another `mel_scale` or `mel_norm`.
    """
    if mel_scale not in ("slaney", "htk") or mel_norm not in ("slaney", None):
        raise ModelError(
            f"mel_scale is {mel_scale!r} and mel_norm {mel_norm!r}: "
            "allowed are 'slaney' or 'htk', and 'slaney' or None"
        )
    to_mel, to_hz = (_slaney_mel, _slaney_hz) if mel_scale == "slaney" else (_htk_mel, _htk_hz)
    first, last = to_mel(f_min), to_mel(f_max)
    steps = [first + (last - first) * step / (n_mels + 1) for step in range(n_mels + 2)]
    edges = torch.tensor([to_hz(mel) for mel in steps], dtype=torch.float64, device="cpu")
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    hz = torch.linspace(0, sample_rate // 2, n_fft // 2 + 1, dtype=torch.float64, device="cpu")[:, None]
    filters = torch.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clamp(min=0)
    return filters * (2 / (high - low)) if mel_norm == "slaney" else filters


def _slaney_mel(hz: float) -> float:
    if hz < _LOG_FROM_HZ:
        return hz / _HZ_PER_MEL
    return _LOG_FROM_HZ / _HZ_PER_MEL + math.log(hz / _LOG_FROM_HZ) / _LOG_STEP


def _slaney_hz(mel: float) -> float:
    linear = mel * _HZ_PER_MEL
    if linear < _LOG_FROM_HZ:
        return linear
    return _LOG_FROM_HZ * math.exp(_LOG_STEP * (mel - _LOG_FROM_HZ / _HZ_PER_MEL))


def _htk_mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)


def _htk_hz(mel: float) -> float:
    return 700 * (10 ** (mel / 2595) - 1)


class RealLogMel(nn.Module):
    """Log-mel spectrogram in dB, without complex numbers: `[B, samples] -> [B, n_mels, frames]`, float32.

    Every frame is centred on its sample; past the ends the waveform is mirrored, as
    `torch.stft(center=True)` does it. The window is Hann's, periodic, in the middle of
    `n_fft`. 10 log10(max(power, floor)).

    Computes in float32 under autocast, and in a network turned to bfloat16 or half too: its
    constants have no parameters to share a type with, and rounded ones would drown quiet
    bins. They are no part of the state dict; moving a network off the meta device makes
    them anew, and so does the first waveform where weights were assigned to one on it.

    A GPU told to (`torch.set_float32_matmul_precision("high")`) rounds what it multiplies to
    10 bits, which moves what lies more than 70 dB under a loud tone by some 2 dB.

    Args:
        sample_rate: of the waveform, in Hz.
        n_fft: samples of the Fourier transform.
        win_length: samples of the window, up to `n_fft`.
        hop: samples from frame to frame.
        f_min: lower edge of the lowest mel filter, in Hz.
        f_max: upper edge of the highest one, in Hz.
        n_mels: number of mel filters.
        mel_scale: "slaney" or "htk".
        mel_norm: "slaney" for filters of equal area, None for filters of equal height.
        floor: power below which values are cut off, so that silence is finite.
        frames_per_s: frames that every second gives. The waveform's end is then padded with
            zeros to whole seconds, and by the hops that are missing where the hop is rounded
            up; this is `clipmill.features.LogMel`. None: `samples // hop + 1` frames.

    Raises:
        ModelError: settings that cannot be.
    """

    _fourier: Tensor
    _mel: Tensor

    def __init__(
        self,
        *,
        sample_rate: int,
        n_fft: int,
        win_length: int,
        hop: int,
        f_min: float,
        f_max: float,
        n_mels: int,
        mel_scale: str = "slaney",
        mel_norm: str | None = "slaney",
        floor: float = 1e-10,
        frames_per_s: int | None = None,
    ) -> None:
        super().__init__()
        for what, value in (("sample_rate", sample_rate), ("hop", hop), ("n_mels", n_mels)):
            check_positive(what, value)
        if not 2 <= win_length <= n_fft:
            raise ModelError(
                f"win_length is {win_length} and n_fft {n_fft}: allowed is 2 <= win_length <= n_fft"
            )
        if not 0 <= f_min < f_max <= sample_rate / 2 or not floor > 0:
            raise ModelError(
                f"f_min is {f_min} Hz, f_max {f_max} Hz and floor {floor}: "
                f"allowed is 0 <= f_min < f_max <= {sample_rate / 2} and a floor above 0"
            )
        if frames_per_s is not None and frames_per_s * hop < sample_rate:
            raise ModelError(
                f"frames_per_s is {frames_per_s} with a hop of {hop} at {sample_rate} Hz: "
                f"allowed is {-(-sample_rate // hop)} and more, or None"
            )
        self.sample_rate, self.hop, self.n_mels = sample_rate, hop, n_mels
        self.n_fft, self.win_length = n_fft, win_length
        self.floor, self.frames_per_s = floor, frames_per_s
        self._filters: dict[str, Any] = {
            "sample_rate": sample_rate, "n_fft": n_fft, "f_min": f_min, "f_max": f_max,
            "n_mels": n_mels, "mel_scale": mel_scale, "mel_norm": mel_norm,
        }  # fmt: skip
        self._set_constants(torch.get_default_device())

    def _set_constants(self, device: torch.device) -> None:
        """Fourier kernels `[blocks * hop, 2 * bins]` and mel filters `[bins, n_mels]`, for the bins that are heard."""
        filters = mel_filterbank(**self._filters)
        heard = filters.any(1).nonzero().flatten().tolist() or [0]
        bins = torch.arange(heard[0], heard[-1] + 1, device="cpu")
        left = (self.n_fft - self.win_length) // 2
        samples = torch.arange(left, left + self.win_length, device="cpu")
        # Whole turns are dropped before the cosine is taken, where they would cost digits.
        turns = (samples[:, None] * bins % self.n_fft).double() / self.n_fft
        window = torch.hann_window(self.win_length, dtype=torch.float64, device="cpu")[:, None]
        angles = 2 * math.pi * turns
        fourier = torch.cat([angles.cos() * window, angles.sin() * window], 1)
        fourier = F.pad(fourier, (0, 0, 0, -self.win_length % self.hop))
        self.register_buffer("_fourier", fourier.float().to(device), persistent=False)
        self.register_buffer("_mel", filters[bins].float().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RealLogMel:
        super()._apply(fn, recurse)
        # `fn` may have rounded them to another type, or only made room for them (`to_empty`).
        self._set_constants(self._fourier.device)
        return self

    def frames(self, samples: int) -> int:
        """Frames that a waveform of `samples` gives."""
        if self.frames_per_s is None:
            return samples // self.hop + 1
        return self.frames_per_s * _ceil_div(samples, self.sample_rate)

    def forward(self, wave: Tensor) -> Tensor:
        """Log-mel of `wave` `[B, samples]` (floating point, -1..1): float32 dB `[B, n_mels, frames]`.

        Raises:
            ModelError: another shape, integer samples, or too few for the mirror at the ends.
        """
        before = self.n_fft // 2 - (self.n_fft - self.win_length) // 2
        after = self.win_length - before
        least = 1 if self.frames_per_s is not None else max(before, after) + 1
        if wave.ndim != 2 or wave.shape[1] < least or not wave.is_floating_point():
            raise ModelError(
                f"a waveform is {wave.dtype} of shape {tuple(wave.shape)}: "
                f"allowed is floating point of shape [batch, samples] with at least {least} samples"
            )
        if self._fourier.is_meta and not wave.is_meta:
            # Weights were assigned to an outline (`load_state_dict(assign=True)`), which makes no constants.
            self._set_constants(wave.device)
        frames = self.frames(wave.shape[1])
        with without_autocast(wave):
            x = wave.float()
            if self.frames_per_s is not None:
                x = F.pad(x, (0, self._missing(wave.shape[1])))
            x = F.pad(x[:, None], (before, after), mode="reflect")[:, 0]
            blocks = self._fourier.shape[0] // self.hop
            x = F.pad(x, (0, blocks * self.hop - self.win_length)).unfold(1, self.hop, self.hop)
            # A frame is `blocks` hops in a row: neighbours overlap by all but one.
            x = torch.cat([x[:, block : block + frames] for block in range(blocks)], 2)
            # As one matrix: with the batch apart, an exported program would refuse a batch of one.
            cosines, sines = (x.flatten(0, 1) @ self._fourier).chunk(2, 1)
            power = ((cosines.square() + sines.square()) @ self._mel).unflatten(
                0, (-1, frames)
            )  # [B, frames, n_mels]
            return 10 * power.transpose(1, 2).clamp(min=self.floor).log10().contiguous()

    def _missing(self, samples: int) -> int:
        """Zeros that a waveform lacks to whole seconds, or to its last frame's centre where that lies behind them."""
        seconds = _ceil_div(samples, self.sample_rate)
        last_centre = (self.frames(samples) - 1) * self.hop
        whole: Any = torch.sym_max(seconds * self.sample_rate, last_centre)
        return whole - samples


def mirror_ends(wave: Tensor, lengths: Tensor, beyond: int) -> Tensor:
    """Waveforms `[B, samples]`, each running backwards from its own end: `[B, samples + beyond]`.

    Frames of a padded batch that look past a clip's end then see what they see where the
    clip is alone, if they look no further than `beyond` samples and the clip's length.

    Args:
        wave: floating point waveforms.
        lengths: int64 `[B]`, samples that are each clip's own, from 1 up to `samples`.
        beyond: samples to make room for.
    """
    place = torch.arange(wave.shape[1] + beyond, device=wave.device)
    last = lengths[:, None] - 1
    return wave.gather(1, torch.minimum(place, 2 * last - place).clamp(min=0))


def _ceil_div(numerator: int, denominator: int) -> int:
    # Of what is positive: ONNX divides whole numbers towards zero, not down.
    return (numerator + denominator - 1) // denominator
