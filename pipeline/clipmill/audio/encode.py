"""int16 samples to the bytes kept in shards."""

from __future__ import annotations

import io
from importlib.metadata import version

import numpy as np
import soundfile
from numpy.typing import NDArray

from clipmill.errors import ConfigError

ENCODINGS = ("flac", "pcm16")
"""flac: lossless, about half the bytes. pcm16: a plain WAV, no decoding at all."""

SUFFIXES = {"flac": "flac", "pcm16": "wav"}
"""Encoding -> the member's extension in a tar."""

_SUBTYPE = "PCM_16"
_FLAC_LEVEL = 0.625  # libFLAC's level 5: higher ones save 1.5 % of the bytes for a third more time


def encode(samples: NDArray[np.int16], rate: int, encoding: str) -> bytes:
    """Encode mono `[samples]` at `rate` Hz as a whole FLAC or WAV file.

    Raises:
        ConfigError: the encoding is unknown.
    """
    if encoding not in ENCODINGS:
        raise ConfigError(f"unknown encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
    buffer = io.BytesIO()
    flac = encoding == "flac"
    with soundfile.SoundFile(
        buffer,
        "w",
        rate,
        1,
        _SUBTYPE,
        format="FLAC" if flac else "WAV",
        **({"compression_level": _FLAC_LEVEL} if flac else {}),
    ) as file:
        file.write(samples)
    return buffer.getvalue()


def codec_versions() -> dict[str, str]:
    """The versions of everything that decides what decoding, resampling and encoding give."""
    names = ("av", "imageio-ffmpeg", "soundfile", "soxr")
    return {"libsndfile": soundfile.__libsndfile_version__} | {name: version(name) for name in names}
