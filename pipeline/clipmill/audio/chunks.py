"""What a file's own header says of its length, against the bytes there: chunks of PCM files, and an MP3's Xing."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_STREAMED = 0x7FFF0000
"""Sizes of 32 bits from here up are what programs write that do not know the length yet: no promise."""

_LONGEST = 1 << 48  # bytes: the same for sizes of 64 bits
_W64_REST = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # what follows the four letters in a W64 chunk's name
_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}  # of a sample, by AU's encoding
_BLOCKS = (
    0x02,
    0x11,
    0x31,
)  # WAV's MS ADPCM, IMA ADPCM and GSM: blocks of many frames, told in the fmt chunk
_MP3_FRAME = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x00-\xef]")
_XING_AT = {
    False: (36, 21),
    True: (21, 13),
}  # MPEG 1, MPEG 2 and 2.5: bytes from the first frame, stereo, mono


@dataclass(frozen=True)
class _Form:
    """How a format's chunks are laid out: their header, where the first is, which one holds the sound."""

    header: str  # of a chunk: name and size
    first: int  # byte
    sound: bytes
    step: int = 2  # chunks begin at its multiples
    inclusive: bool = False  # whether the size counts the header


_FORMS = {
    b"RIFF": _Form("<4sI", 12, b"data"),
    b"RF64": _Form("<4sI", 12, b"data"),
    b"FORM": _Form(">4sI", 12, b"SSND"),
    b"caff": _Form(">4sQ", 8, b"data", step=1),
    b"riff": _Form("<16sQ", 40, b"data" + _W64_REST, step=8, inclusive=True),
}


def missing_frames(path: Path) -> int:
    """Frames that the header of a WAV, RF64, W64, AIFF, CAF or AU file counts and its end lacks.

    0 where all is well or nothing is known.
    """
    with open(path, "rb") as file:
        total = file.seek(0, 2)
        file.seek(0)
        magic = file.read(4)
        if magic == b".snd":
            start, size, encoding, _, channels = struct.unpack(">5I", file.read(20).ljust(20, b"\0"))
            block, frames = channels * _AU_BYTES.get(encoding, 0), 1
        else:
            start, size, block, frames = _sound_chunk(file, magic)
        missing = start + size - total
        most = _STREAMED if magic in (b".snd", b"RIFF", b"FORM") else _LONGEST
        return -(-missing * frames // block) if block and missing > 0 and size < most else 0


def _sound_chunk(file: IO[bytes], magic: bytes) -> tuple[int, int, int, int]:
    """Where the sound starts, its size as stated, the bytes of a block and the frames in one; zeros if unknown."""
    block, frames, long_size = 0, 1, 0
    for name, start, size in _chunks(file, magic):
        if name == _FORMS[magic].sound:
            return start, long_size if magic == b"RF64" and size == 0xFFFFFFFF else size, block, frames
        body = file.read(min(size, 32))
        if name[:4] == b"fmt " and len(body) >= 16:
            tag, block = struct.unpack_from("<H10xH", body)
            frames = struct.unpack_from("<H", body, 18)[0] if tag in _BLOCKS and len(body) >= 20 else 1
        elif name == b"COMM" and len(body) >= 8:
            channels, _, bits = struct.unpack_from(">hIh", body)
            block = channels * -(-bits // 8)
        elif name == b"desc" and len(body) >= 24:
            block, frames = struct.unpack_from(">II", body, 16)
        elif name == b"ds64" and len(body) >= 16:
            long_size = struct.unpack_from("<Q", body, 8)[0]
    return 0, 0, 0, 0


def _chunks(file: IO[bytes], magic: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each chunk's name, the byte where its body starts, and its size; the file stands at the body."""
    form = _FORMS.get(magic)
    at = form.first if form else 0
    while form and at < _LONGEST:
        file.seek(at)
        header = file.read(struct.calcsize(form.header))
        if len(header) < struct.calcsize(form.header):
            return
        name, size = struct.unpack(form.header, header)
        size = max(size - len(header), 0) if form.inclusive else size
        yield name, at + len(header), size
        at += len(header) + size
        at += -at % form.step


def skip_id3(file: IO[bytes]) -> None:
    """Go past the ID3v2 tags that a file begins with; a picture in one can be of any size."""
    at = 0
    file.seek(at)
    while len(head := file.read(10)) == 10 and head[:3] == b"ID3" and max(head[6:]) < 0x80:
        at += 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
        file.seek(at)
    file.seek(at)


def has_xing(path: Path) -> bool:
    """Whether an MP3's first frame holds a Xing header that counts the frames; without, its length is a guess."""
    with open(path, "rb") as file:
        skip_id3(file)
        head = file.read(1 << 13)
    if not (first := _MP3_FRAME.search(head)):
        return False
    frame = head[first.start() :][:64].ljust(64, b"\0")
    at = _XING_AT[not frame[1] & 8][frame[3] >> 6 == 3]
    # Some encoders leave two bytes for a checksum before it.
    return any(frame[k : k + 4] in (b"Xing", b"Info") and frame[k + 7] & 1 for k in (at, at + 2))
