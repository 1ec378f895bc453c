"""How much of a WAV or AIFF file is missing: what its sound chunk says it holds, against the bytes there."""

from __future__ import annotations

import struct
from pathlib import Path

_STREAMED = 0x7FFF0000
"""Sizes from here up are what programs write that do not know the length yet: no promise."""


def missing_frames(path: Path) -> int:
    """Frames that the header of a WAV or AIFF file counts and its end lacks; 0 where all is well or unknown."""
    with open(path, "rb") as file:
        total = file.seek(0, 2)
        file.seek(0)
        head = file.read(12)
        order, sound = {b"RIFF": ("<", b"data"), b"FORM": (">", b"SSND")}.get(head[:4], ("", b""))
        frame = 0
        while order and len(chunk := file.read(8)) == 8:
            name, size = chunk[:4], struct.unpack(order + "I", chunk[4:])[0]
            start = file.tell()
            if name == sound:
                missing = start + size - total
                return -(-missing // frame) if frame and missing > 0 and size < _STREAMED else 0
            body = file.read(min(size, 32))
            if name == b"fmt " and len(body) >= 16:
                frame = struct.unpack_from("<H", body, 12)[0]
            elif name == b"COMM" and len(body) >= 8:
                channels, _, bits = struct.unpack_from(">hIh", body)
                frame = channels * -(-bits // 8)
            file.seek(start + size + size % 2)
    return 0
