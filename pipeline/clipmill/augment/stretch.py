"""Time stretching: clips played faster or slower at their own pitch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clipmill.augment.vocoder import frame_count, frames_of, overlap_add, retime, window_samples
from clipmill.errors import FeatureError


def time_stretch(wave: Tensor, rates: Tensor, slowest: float, samples: int, sample_rate: int) -> Tensor:
    """Each clip at its own pace: cut to `samples`, or with zeros after its end.

    The phase vocoder of `librosa.effects.time_stretch`. A clip comes to round(S / rate) samples; one of
    rate 1 stays as it is, to the bit.

    Args:
        wave: `[B, S]` floating point. All of it is stretched: zeros behind a clip too.
        rates: `[B]` floating point, finite; 2 is twice as fast, and half as long.
        slowest: the least that a rate may be, above 0; lower ones are taken for it. It bounds the work,
            which must not wait to see the rates.
        samples: length of the result.
        sample_rate: of the waveforms, in Hz; the windows are of about 46 ms.

    Returns:
        `[B, samples]` float32, under autocast too.

    Raises:
        FeatureError: `slowest` is not above 0.
    """
    if not slowest > 0:
        raise FeatureError(f"slowest is {slowest}: allowed is a rate above 0")
    n_fft = window_samples(sample_rate)
    with torch.autocast(wave.device.type, enabled=False):
        wave, rates = wave.float(), rates.double().clamp(min=slowest)
        longest = min(samples, round(wave.shape[1] / slowest))
        spectra, live = retime(frames_of(wave, n_fft), rates, frame_count(longest, n_fft))
        stretched = _fit(overlap_add(spectra, live)[:, n_fft // 2 :], samples)
        ends = (wave.shape[1] / rates).round()
        stretched = stretched.masked_fill(torch.arange(samples, device=wave.device) >= ends[:, None], 0)
        return torch.where(rates[:, None] == 1, _fit(wave, samples), stretched)


def _fit(wave: Tensor, samples: int) -> Tensor:
    """`[B, S] -> [B, samples]`, cut or with zeros behind."""
    return functional.pad(wave[:, :samples], (0, max(0, samples - wave.shape[1])))
