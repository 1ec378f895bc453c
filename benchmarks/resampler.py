"""What resampling does to a sound, as `clipmill.audio.resample` does it.

    python benchmarks/resampler.py        15 seconds; prints a Markdown table

The response is that to a click, by Fourier transform. Passband: up to where it is within 0.1 dB, in Hz and as a share
of the lower of the two Nyquist frequencies; ripple: the largest deviation up to 99 % of that edge. Stopband: the most
that a full-scale sine leaves where nothing must be, an alias or an image, over sines up to 90 % of the lower Nyquist
frequency and, where the rate falls, from 105 % on. SNR: a 997 Hz sine of -1 dB through resample(), and through
to_int16() too. Delay: of a click, in samples of the result.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clipmill.audio import resample, to_int16

PAIRS = [(rate, 44100) for rate in (48000, 22050, 16000, 8000, 32000, 96000, 192000)] + [(44100, 32000)]


def response(rate_from: int, rate_to: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Frequencies in Hz, and the gain in dB at each, up to the lower Nyquist frequency and 30 % over it.

    One click gives the filter at the new rate's instants only, folded; clicks at each phase between the two grids
    of instants, put together, give the filter itself, at `rate_from * up`.
    """
    common = int(np.gcd(rate_from, rate_to))
    down, up = rate_from // common, rate_to // common
    length = rate_from
    fine = np.zeros(up * length)  # the filter at rate_from * up
    for phase in range(down):
        click = np.zeros(length, np.float32)
        at = length // 2 // down * down + phase
        click[at] = 1.0
        result = resample(click, rate_from, rate_to)
        places = np.arange(len(result)) * down - at * up + up * length // 2
        keep = (places >= 0) & (places < len(fine))
        fine[places[keep]] += result[keep]
    gain = np.abs(np.fft.rfft(fine))
    hz = np.fft.rfftfreq(len(fine), 1 / (rate_from * up))
    keep = hz <= 0.65 * min(rate_from, rate_to)
    return hz[keep], 20 * np.log10(np.maximum(gain[keep] / gain[1], 1e-12))


def sine(hz: float, rate: int, seconds: float, level_db: float = 0.0) -> NDArray[np.float64]:
    return 10 ** (level_db / 20) * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)


def residue_db(hz: float, rate_from: int, rate_to: int, level_db: float, *, whole: bool = False) -> float:
    """What is left of a sine once it is taken away by least squares, in dB below the sine put in."""
    result = resample(sine(hz, rate_from, 2.0, level_db).astype(np.float32), rate_from, rate_to)
    heard = (to_int16(result) / 32768 if whole else result.astype(np.float64))[rate_to // 2 : -rate_to // 2]
    time = np.arange(len(heard)) / rate_to
    if hz < rate_to / 2:
        basis = np.stack([np.sin(2 * np.pi * hz * time), np.cos(2 * np.pi * hz * time)], axis=1)
        heard = heard - basis @ np.linalg.lstsq(basis, heard, rcond=None)[0]
    put_in = 10 ** (level_db / 10) / 2
    return float(10 * np.log10(max(np.mean(heard**2), 1e-30) / put_in))


def measured(rate_from: int, rate_to: int) -> dict[str, float]:
    lower = min(rate_from, rate_to) / 2
    hz, gain = response(rate_from, rate_to)
    edge = float(hz[np.argmax(np.abs(gain) > 0.1)])
    tones = np.linspace(0.02, 0.90, 12) * lower
    if rate_from > rate_to:
        tones = np.concatenate([tones, np.linspace(1.05 * lower, 0.49 * rate_from, 12)])
    click = np.zeros(rate_from, np.float32)
    click[rate_from // 2] = 1.0
    heard = resample(click, rate_from, rate_to)
    centre = np.average(np.arange(len(heard)), weights=heard.astype(np.float64) ** 2)
    return {
        "passband_hz": edge,
        "share": edge / lower,
        "ripple_db": float(np.abs(gain[hz <= 0.99 * edge]).max()),
        "minus_3_hz": float(hz[np.argmax(gain < -3)]),
        "minus_100_hz": float(hz[np.argmax(gain < -100)]),
        "stopband_db": max(residue_db(float(tone), rate_from, rate_to, 0.0) for tone in tones),
        "snr_db": -residue_db(997.0, rate_from, rate_to, -1.0),
        "snr_16_db": -residue_db(997.0, rate_from, rate_to, -1.0, whole=True),
        "delay": float(centre) - rate_to * (rate_from // 2) / rate_from,
    }


def main() -> None:
    print(
        "| Hz | to 0.1 dB | of the lower Nyquist | ripple dB | -3 dB | -100 dB "
        "| stopband dB | SNR dB | SNR dB in 16 bits | delay |"
    )
    print("|" + "---|" * 10)
    for rate_from, rate_to in PAIRS:
        m = measured(rate_from, rate_to)
        print(
            f"| {rate_from} to {rate_to} | {m['passband_hz']:.0f} Hz | {m['share']:.1%} | {m['ripple_db']:.4f} "
            f"| {m['minus_3_hz']:.0f} Hz | {m['minus_100_hz']:.0f} Hz | {m['stopband_db']:.0f} | {m['snr_db']:.0f} "
            f"| {m['snr_16_db']:.1f} | {abs(m['delay']):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
