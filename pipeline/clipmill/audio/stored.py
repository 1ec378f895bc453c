"""A clip as shards keep it, decoded straight into an array that is there already.

FLAC goes through dr_flac (of miniaudio), which checks every frame's CRC, can begin anywhere, needs no
file object, and takes half of libFLAC's time. Both let go of Python's lock while they work.
"""

from __future__ import annotations

import numpy as np
from miniaudio import ffi, lib
from numpy.typing import NDArray

from clipmill.errors import DecodeError


def decode_flac_into(
    data: bytes | memoryview, out: NDArray[np.int16], start: int = 0, samples: int | None = None
) -> None:
    """Fill int16 `out` with the samples from `start` on of a whole FLAC file: mono, 16 bits.

    `samples` is how many the file has; by default those up to the end of `out`.

    Raises:
        DecodeError: the bytes are damaged from `start` on, or fewer samples are there.
    """
    behind = 0 if samples is None else samples - start - len(out)
    stream = lib.ma_dr_flac_open_memory(ffi.from_buffer(data), len(data), ffi.NULL)
    if stream == ffi.NULL:
        raise DecodeError("corrupt", "is no FLAC file")
    try:
        # A frame whose checksum is wrong is left out, and those behind it move up: damage shows as too few samples,
        # once all the rest is decoded too.
        found = 0
        if not start or lib.ma_dr_flac_seek_to_pcm_frame(stream, start):
            found = lib.ma_dr_flac_read_pcm_frames_s16(stream, len(out), ffi.from_buffer("short[]", out))
            if behind and found == len(out):
                found += lib.ma_dr_flac_read_pcm_frames_s16(stream, behind, ffi.NULL)
    finally:
        lib.ma_dr_flac_close(stream)
    if found != len(out) + behind:
        raise DecodeError("corrupt", f"{found} of {len(out) + behind} samples decode")
