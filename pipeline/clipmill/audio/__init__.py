"""Everything that touches codecs: decode, mix to mono, resample, pad, encode, measure."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipmill.audio.content import content_sha256
from clipmill.audio.convert import pad_to_seconds, resample, to_int16
from clipmill.audio.cut import CUT_SUFFIXES, Cut, cut
from clipmill.audio.decode import DECODERS, decode
from clipmill.audio.encode import ENCODINGS, SUFFIXES, codec_versions, encode
from clipmill.audio.measure import measure
from clipmill.audio.stored import decode_flac_into
from clipmill.errors import DecodeError

__all__ = [
    "CUT_SUFFIXES",
    "DECODERS",
    "ENCODINGS",
    "SUFFIXES",
    "Cut",
    "ReadyClip",
    "codec_versions",
    "content_sha256",
    "cut",
    "decode",
    "decode_flac_into",
    "encode",
    "measure",
    "pad_to_seconds",
    "prepare_bytes",
    "prepare_clip",
    "prepare_file",
    "resample",
    "to_int16",
]


@dataclass(frozen=True)
class ReadyClip:
    """A clip in the house's format: int16 mono `[samples]`, a whole number of seconds long.

    `duration_s` is its length before the zeros at its end; `source_rate` (Hz) and
    `source_channels` are what it came from.
    """

    samples: NDArray[np.int16]
    content: int  # samples before the padding
    duration_s: float
    source_rate: int
    source_channels: int


def prepare_clip(
    path: Path, rate: int, start_s: float | None = None, end_s: float | None = None, decoder: str = "auto"
) -> ReadyClip:
    """Decode a file or a stretch of it, mix to mono, resample to `rate` Hz, and pad to whole seconds.

    Raises:
        DecodeError: the clip cannot be had; carries the reason code.
    """
    audio = decode(path, start_s, end_s, decoder)
    samples, source_rate, channels = audio.samples, audio.rate, audio.channels
    duration_s = audio.duration_s
    del audio  # of an hour it is 700 MB, and not needed beside what it becomes
    samples = resample(samples, source_rate, rate)
    # Of what was resampled: too large a sample is no finite number then.
    if source_rate != rate and not np.isfinite([samples.min(), samples.max()]).all():
        raise DecodeError("corrupt", "its samples are too large for any sound, and overflow when resampled")
    whole = to_int16(samples)
    del samples
    return ReadyClip(pad_to_seconds(whole, rate), len(whole), duration_s, source_rate, channels)


def prepare_file(path: Path | str, rate: int) -> NDArray[np.int16]:
    """A whole sound file as the int16 mono `[samples]` that its shard would hold.

    Raises:
        DecodeError: the file cannot be decoded; carries the reason code.
    """
    return prepare_clip(Path(path), rate).samples


def prepare_bytes(data: bytes, rate: int) -> NDArray[np.int16]:
    """The bytes of a whole sound file as the int16 mono `[samples]` that its shard would hold.

    Raises:
        DecodeError: they cannot be decoded; carries the reason code.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return prepare_file(file.name, rate)
