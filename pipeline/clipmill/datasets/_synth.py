"""The ten sounds of `tones`: what tells them apart, and all that varies besides.

Each class is known by its timbre or by how it moves, never by its pitch or level, and
can be told from any 0.3 s of it below 3.5 kHz: that is what an 8 kHz telephone file
and a random crop leave of a clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float64]
Sound = Callable[["Voice", Wave, int, np.random.Generator], Wave]

TOP_HZ = 12_000.0
"""No harmonic is made above this (or above 0.45 of the sample rate), so that nothing folds back."""


@dataclass(frozen=True, slots=True)
class Voice:
    """What the clips of one group share, drawn from the ranges of the class.

    `pitch_hz` is the fundamental, the lowest note, or the lower edge of a sweep;
    `motion_hz` counts sweeps, clicks, beats or swings a second; `character` in 0..1
    is brightness, width or depth, as the class reads it.
    """

    label: str
    pitch_hz: float
    motion_hz: float
    character: float


def _cycle(partials: NDArray[np.float64], pitch_hz: float, time_s: Wave, rng: np.random.Generator) -> Wave:
    """Play one cycle of a periodic wave, given the amplitudes of its partials 1, 2, ...; shape of `time_s`."""
    spectrum = np.zeros(2049, complex)
    spectrum[1 : 1 + len(partials)] = -1j * partials
    table = np.fft.irfft(spectrum)
    turns = (time_s * pitch_hz + rng.random()) % 1.0
    return np.interp(turns, np.linspace(0.0, 1.0, len(table) + 1), np.append(table, table[0]))


def _partials(pitch_hz: float, rate: int) -> NDArray[np.float64]:
    """The numbers of the harmonics that fit under the top, as floats: 1, 2, ..."""
    return np.arange(1.0, max(2.0, min(TOP_HZ, 0.45 * rate) / pitch_hz))


def _coloured(samples: int, rate: int, slope_db: float, rng: np.random.Generator) -> Wave:
    """Noise of RMS 1 whose spectrum falls by `slope_db` an octave above 100 Hz; float64 `[samples]`."""
    # Whole kilo-samples: the FFT of a length that happens to be prime is several times slower.
    size = -(-samples // 1024) * 1024
    spectrum = np.fft.rfft(rng.standard_normal(size, np.float32))
    tilt = np.maximum(np.fft.rfftfreq(size, 1 / rate), 100.0) ** (-slope_db / 6.02)
    noise = np.fft.irfft(spectrum * tilt, size)[:samples]
    return np.asarray(noise / max(1e-12, np.sqrt(np.mean(noise**2))), np.float64)


def _sine(voice: Voice, time_s: Wave, rate: int, rng: np.random.Generator) -> Wave:
    return np.sin(2 * np.pi * (voice.pitch_hz * time_s + rng.random()))


def _square(voice: Voice, time_s: Wave, rate: int, rng: np.random.Generator) -> Wave:
    number = _partials(voice.pitch_hz, rate)
    return _cycle(np.where(number % 2 == 1, 1 / number, 0.0), voice.pitch_hz, time_s, rng)


def _saw(voice: Voice, time_s: Wave, rate: int, rng: np.random.Generator) -> Wave:
    number = _partials(voice.pitch_hz, rate)
    return _cycle(number ** -(0.7 + 0.5 * voice.character), voice.pitch_hz, time_s, rng)


def _chord(voice: Voice, time_s: Wave, rate: int, rng: np.random.Generator) -> Wave:
    third = 16 if voice.character > 0.5 else 15
    # An open chord: notes a third apart would be one line to a window of 31 ms.
    notes_hz = voice.pitch_hz * 2 ** (np.array([0, 7, third, 24, 31]) / 12)
    notes = [np.sin(2 * np.pi * (hz * time_s + rng.random())) for hz in notes_hz]
    return np.asarray(rng.uniform(0.6, 1.0, len(notes)) @ np.stack(notes))


def _noise(voice: Voice, time_s: Wave, rate: int, rng: np.random.Generator) -> Wave:
    return _coloured(len(time_s), rate, 1.5 * voice.character, rng)


def _clicks(voice: Voice, time_s: Wave, rate: int, rng: np.random.Generator) -> Wave:
    beats = np.arange(-2.0, time_s[-1] * voice.motion_hz + 2.0) + rng.random()
    onsets_s = (beats + rng.uniform(-0.08, 0.08, len(beats))) / voice.motion_hz
    age_s = time_s - onsets_s[np.searchsorted(onsets_s, time_s, side="right") - 1]
    return _coloured(len(time_s), rate, 0.0, rng) * np.exp(-age_s / (0.003 + 0.006 * voice.character))


def _sweep(voice: Voice, time_s: Wave, rate: int, rng: np.random.Generator) -> Wave:
    height = (time_s * voice.motion_hz + rng.random()) % 1.0
    if voice.label == "sweep-down":
        height = 1.0 - height
    hz = voice.pitch_hz * 2 ** (height * (1.5 + 0.7 * voice.character))
    turns = np.cumsum(hz) / rate + rng.random()
    # The second harmonic falls silent where a low sample rate would fold it back.
    return np.sin(2 * np.pi * turns) + 0.6 * np.sin(4 * np.pi * turns) * (2 * hz < 0.45 * rate)


def _tremolo(voice: Voice, time_s: Wave, rate: int, rng: np.random.Generator) -> Wave:
    swing = np.cos(2 * np.pi * (voice.motion_hz * time_s + rng.random()))
    # Clipped, so that it is fully off and fully on for a while in each turn, whatever the analysis window.
    gain = np.clip(0.5 + (1.0 + voice.character) * swing, 0.0, 1.0)
    return _cycle(_partials(voice.pitch_hz, rate) ** -0.6, voice.pitch_hz, time_s, rng) * gain


def _vibrato(voice: Voice, time_s: Wave, rate: int, rng: np.random.Generator) -> Wave:
    swing = np.sin(2 * np.pi * (voice.motion_hz * time_s + rng.random()))
    hz = voice.pitch_hz * 2 ** (swing * (2.0 + 1.5 * voice.character) / 12)
    return np.sin(2 * np.pi * (np.cumsum(hz) / rate + rng.random()))


# Label -> the maker, the range of pitches in Hz, the range of motions in Hz. The ranges overlap on purpose.
_SOUNDS: dict[str, tuple[Sound, tuple[float, float], tuple[float, float]]] = {
    "chord": (_chord, (280, 440), (1, 1)),
    "clicks": (_clicks, (1, 1), (8, 16)),
    "noise": (_noise, (1, 1), (1, 1)),
    "saw": (_saw, (130, 200), (1, 1)),
    "sine": (_sine, (500, 1000), (1, 1)),
    "square": (_square, (220, 400), (1, 1)),
    "sweep-down": (_sweep, (280, 460), (3, 6)),
    "sweep-up": (_sweep, (280, 460), (3, 6)),
    "tremolo": (_tremolo, (250, 450), (5, 9)),
    "vibrato": (_vibrato, (600, 1200), (6, 10)),
}

LABELS = tuple(_SOUNDS)
"""The ten classes, in alphabetical order."""


def draw_voice(label: str, rng: np.random.Generator) -> Voice:
    """Draw a voice of the class `label` (one of `LABELS`): pitch and motion evenly on a log scale."""
    _, pitches, motions = _SOUNDS[label]
    pitch_hz, motion_hz = (float(np.exp(rng.uniform(*np.log(span)))) for span in (pitches, motions))
    return Voice(label, pitch_hz, motion_hz, float(rng.random()))


def _envelope(time_s: Wave, rng: np.random.Generator) -> Wave:
    """Attack, slow decline and release as a gain; never so deep that a crop could miss the sound."""
    attack_s, release_s = rng.uniform(0.002, 0.06), rng.uniform(0.005, 0.06)
    decline_db = rng.uniform(0.0, 6.0)
    until_end_s = time_s[-1] - time_s
    ramps = np.minimum(1.0, np.minimum(time_s / attack_s, until_end_s / release_s))
    return np.asarray(ramps * 10 ** (-decline_db * time_s / max(time_s[-1], 1e-9) / 20))


def render(voice: Voice, seconds: float, rate: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Play one clip of a voice, moved by up to three semitones, over background noise.

    Returns:
        float32 `[round(seconds * rate)]`, its peak between -30 and -3 dBFS, the signal
        25 to 45 dB above the noise.
    """
    voice = replace(
        voice,
        pitch_hz=voice.pitch_hz * 2 ** (rng.uniform(-0.25, 0.25)),
        motion_hz=voice.motion_hz * rng.uniform(0.93, 1.07),
    )
    time_s = np.arange(round(seconds * rate)) / rate
    signal = _SOUNDS[voice.label][0](voice, time_s, rate, rng)
    signal *= _envelope(time_s, rng) / np.sqrt(np.mean(signal**2))
    signal += _coloured(len(time_s), rate, rng.uniform(0.0, 6.0), rng) * 10 ** (-rng.uniform(25.0, 45.0) / 20)
    level = 10 ** (rng.uniform(-30.0, -3.0) / 20)
    return (signal * (level / np.max(np.abs(signal)))).astype(np.float32)


def synthesize(label: str, seconds: float, rate: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Make one new clip of a class with a voice of its own.

    Args:
        label: one of `LABELS`.
        seconds: its length; 0.3 s is enough to tell the class.
        rate: sample rate in Hz; 8000 is enough to tell the class.
        rng: all that varies comes from here, so equal generators give equal clips.

    Returns:
        float32 `[round(seconds * rate)]` in -1..1.

    Raises:
        KeyError: there is no such class.
    """
    return render(draw_voice(label, rng), seconds, rate, rng)
