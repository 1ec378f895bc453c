"""The files of `tones` as a realistic mess: many recorders, odd names, and a few broken files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipmill.audio.media import encode_media
from clipmill.types import Clip


@dataclass(frozen=True, slots=True)
class Recorder:
    """What wrote a file: container, encoding, rate in Hz, channels.

    `container` and `encoding` are libsndfile's names (upper case), or FFmpeg's (lower).
    """

    container: str
    encoding: str
    rate: int
    channels: int

    @property
    def kind(self) -> str:
        """The file name's ending, in lower case, without its dot."""
        return {"WAVEX": "wav", "ipod": "m4a"}.get(self.container, self.container.lower())


# The first six cover the six kinds of file, so that the smallest collection is a mess too.
RECORDERS = tuple(
    Recorder(*row)
    for row in (
        ("WAV", "PCM_16", 44_100, 1),
        ("FLAC", "PCM_24", 96_000, 1),
        ("OGG", "VORBIS", 44_100, 2),
        ("MP3", "MPEG_LAYER_III", 44_100, 2),
        ("webm", "libopus", 48_000, 2),
        ("ipod", "aac", 44_100, 2),
        ("WAV", "PCM_U8", 8_000, 1),
        ("WAVEX", "PCM_24", 48_000, 6),
        ("WAV", "FLOAT", 22_050, 2),
        ("WAV", "PCM_16", 22_050, 1),
        ("WAV", "PCM_24", 96_000, 2),
        ("WAV", "PCM_16", 16_000, 2),
        ("WAV", "PCM_24", 48_000, 2),
        ("WAV", "FLOAT", 88_200, 1),
        ("FLAC", "PCM_16", 44_100, 2),
        ("FLAC", "PCM_16", 16_000, 1),
        ("FLAC", "PCM_16", 48_000, 6),
        ("OGG", "VORBIS", 32_000, 1),
        ("OGG", "VORBIS", 48_000, 6),
        ("MP3", "MPEG_LAYER_III", 16_000, 1),
        ("MP3", "MPEG_LAYER_III", 24_000, 2),
        ("webm", "libopus", 16_000, 1),
        ("webm", "libopus", 48_000, 6),
        ("ipod", "aac", 22_050, 1),
        ("ipod", "aac", 48_000, 6),
    )
)
"""The recorders that the clips are dealt to."""


@dataclass(frozen=True, slots=True)
class Breakage:
    """A way for a file to be broken, the reason code it must come to, and what wrote it."""

    how: str
    reason: str
    recorder: Recorder


# Each was seen to be unambiguous: neither libsndfile nor FFmpeg opens the corrupt ones, the empty ones hold no
# sample, and the silent ones are all zero. A truncated MP3, Ogg or WebM would not be: decoders differ in how
# much of it they accept. The first three stand for the three reasons.
BREAKAGES = (
    Breakage("digital silence", "silent", Recorder("WAV", "PCM_16", 44_100, 2)),
    Breakage("zero bytes", "empty", Recorder("WAV", "PCM_16", 44_100, 1)),
    Breakage("cut short before its index", "corrupt", Recorder("ipod", "aac", 44_100, 2)),
    Breakage("a web page saved as audio", "corrupt", Recorder("WAV", "PCM_16", 44_100, 1)),
    Breakage("a header without samples", "empty", Recorder("WAV", "PCM_16", 48_000, 1)),
    Breakage("random bytes", "corrupt", Recorder("webm", "libopus", 48_000, 2)),
    Breakage("zero bytes", "empty", Recorder("MP3", "MPEG_LAYER_III", 44_100, 2)),
    Breakage("digital silence", "silent", Recorder("FLAC", "PCM_24", 48_000, 1)),
)
"""The breakages, in the order they are dealt out."""

_WEB_PAGE = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body><h1>Not Found</h1></body></html>\n"


def file_name(recorder: Recorder, clip: Clip, number: int) -> str:
    """A relative path such as people's own folders hold: spaces, dots, accents, capitals, a leading dash."""
    return {
        "wav": f"recorder/day {number % 4 + 1}/ZOOM{number:04d}.WAV",
        "flac": f"Ångström lab/{clip.group}.take {number}.flac",
        "ogg": f"field/2021.06.{number % 28 + 1:02d}/{number}.ogg",
        "mp3": f"old laptop/Track {number:02d} (final).mp3",
        "webm": f"video/-x{number:04d}_Q.webm",
        "m4a": f"téléphone/voice memo {number}.m4a",
    }[recorder.kind]


def spread(mono: NDArray[np.float32], recorder: Recorder, rng: np.random.Generator) -> NDArray[np.float32]:
    """Place a mono clip `[samples]` between a recorder's microphones: float32 `[channels, samples]`, in phase."""
    gains = rng.uniform(0.6, 1.0, recorder.channels)
    gains[rng.integers(recorder.channels)] = 1.0
    if recorder.channels == 6:
        gains[3] = 0.1  # the low-frequency channel of 5.1 carries next to nothing
    samples = gains[:, None] * mono
    if recorder.encoding == "PCM_U8":
        # Eight bits hold a sound only near full scale (at -30 dBFS it would be eight steps high), and
        # without half a step of the converter's own noise its quiet parts would be pure digital zero.
        samples *= 0.7 / np.max(np.abs(samples))
        samples += 0.5 / 128 * rng.standard_normal(samples.shape)
    return samples.astype(np.float32)


def write(samples: NDArray[np.float32], recorder: Recorder) -> bytes:
    """The whole file that a recorder makes of float32 `[channels, samples]`."""
    return encode_media(samples, recorder.rate, recorder.container, recorder.encoding)


def write_broken(samples: NDArray[np.float32], breakage: Breakage, rng: np.random.Generator) -> bytes:
    """Write float32 `[channels, samples]` the way `breakage` says: a whole file that is of no use."""
    if breakage.how == "zero bytes":
        return b""
    if breakage.how == "a web page saved as audio":
        return _WEB_PAGE
    if breakage.how == "random bytes":
        return rng.bytes(20_000)
    if breakage.how == "a header without samples":
        return write(samples[:, :0], breakage.recorder)
    if breakage.how == "digital silence":
        return write(np.zeros_like(samples), breakage.recorder)
    # MPEG-4 keeps its index at the end: the first half of a download cannot be played at all.
    whole = write(samples, breakage.recorder)
    return whole[: len(whole) // 2]
