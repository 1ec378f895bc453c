"""What the first bytes of a FLAC or WAV file say, without decoding it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from clipmill.audio.decode import MAX_RATE, MIN_RATE

_STREAMED = 0x7FFF0000  # WAV sizes from here up are what programs write that do not know the length yet
_LEAST_FRAME, _MOST_SAMPLES = (
    10,
    65535,
)  # bytes of FLAC's shortest frame, samples of its longest (RFC 9639, 9)
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


class Header(NamedTuple):
    """What a sound file says of itself.

    rate: Hz. channels: how many. frames: samples of each. plain: "flac" or "pcm16" where the file is mono
    and of 16 bits, else None. offset, length: the bytes that such a file can be read from, in bytes from
    the file's start: of FLAC the whole file, of WAV the samples alone.
    """

    rate: int
    channels: int
    frames: int
    plain: str | None
    offset: int
    length: int


def read_header(head: bytes, size: int) -> Header | None:
    """Read the header of a FLAC or WAV file.

    Args:
        head: the file's first bytes; 512 are mostly enough.
        size: bytes of the whole file.

    Returns:
        None where only decoding tells: another format, a length that is not stated or is not there, a rate
        that cannot be, or a header that is longer than `head`.
    """
    found = _flac(head, size) if head.startswith(b"fLaC") else _wav(head, size)
    sound = found is not None and found.frames > 0 and MIN_RATE <= found.rate <= MAX_RATE
    return found if sound else None


def _flac(head: bytes, size: int) -> Header | None:
    """STREAMINFO is the first block of all (RFC 9639, 8.2)."""
    if len(head) < 42 or head[4] & 0x7F:
        return None
    packed = int.from_bytes(head[18:26], "big")
    rate, channels, bits = packed >> 44, (packed >> 41 & 7) + 1, (packed >> 36 & 31) + 1
    plain = "flac" if (channels, bits) == (1, 16) else None
    frames = packed & (1 << 36) - 1
    if frames > size // _LEAST_FRAME * _MOST_SAMPLES:  # a damaged header must not size an allocation
        return None
    return Header(rate, channels, frames, plain, 0, size)


def _wav(head: bytes, size: int) -> Header | None:
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    kind = channels = rate = block = bits = 0
    for name, start, stated in _chunks(head):
        if name == b"fmt " and start + 16 <= len(head):
            kind, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", head, start)
            if kind == _EXTENSIBLE and start + 26 <= len(head):
                kind = int.from_bytes(head[start + 24 : start + 26], "little")
        elif name == b"data":
            there = size - start
            if not block or kind not in (_PCM, _FLOAT) or there < stated < _STREAMED:
                return None
            frames = min(stated, there) // block
            plain = "pcm16" if (kind, channels, bits, block) == (_PCM, 1, 16, 2) else None
            return Header(rate, channels, frames, plain, start, frames * block)
    return None


def _chunks(head: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start of the contents and stated size of each chunk whose header is in `head`."""
    at = 12
    while at + 8 <= len(head):
        name, size = struct.unpack_from("<4sI", head, at)
        yield name, at + 8, size
        at += 8 + size + size % 2
