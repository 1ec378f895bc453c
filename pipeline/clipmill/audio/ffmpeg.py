"""The ffmpeg program as a decoder: isolated in a process of its own, slower, independent."""

from __future__ import annotations

import io
import re
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from clipmill.audio.chunks import skip_id3
from clipmill.errors import DecodeError
from clipmill.types import Audio

TIMEOUT_S = 300.0

_BLOCK = 1 << 16  # frames mixed to mono at once

_PREROLL_S = 1.0
"""Decoded before a stretch and thrown away: a lossy codec that starts at the stretch itself is not yet settled."""


@lru_cache(maxsize=1)
def ffmpeg_program() -> str:
    """Path of the ffmpeg binary that imageio-ffmpeg bundles (or $IMAGEIO_FFMPEG_EXE)."""
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


def decode_with_ffmpeg(path: Path, start_s: float = 0.0, end_s: float | None = None) -> Audio:
    """Decode a stretch of a file's first audio stream in a process of its own; mono is the channels' mean.

    Raises:
        DecodeError: with reason corrupt, no-audio, memory or timeout.
    """
    import ffmpeg

    # Seeking to zero is not the same as not seeking: it drops the first packet of Opus and AAC.
    seek = {"ss": start_s - _PREROLL_S} if start_s > _PREROLL_S else {}
    stretch = {"ss": min(start_s, _PREROLL_S)} if start_s else {}
    if end_s is not None:
        stretch["t"] = end_s - start_s
    # Explode on the first damaged packet: a clip with holes must be a row in the failures, not a clip.
    # FLAC's damage shows in its checksums alone; sound MP3s are about that have wrong ones.
    # And its frames are numbered from zero, also where the first that is sound comes later.
    flac: dict[str, object] = (
        {"err_detect": "crccheck+explode", "seek_timestamp": 1} if _is_flac(path) else {}
    )
    # Where channels change part-way, a filter made anew would mix them to those of the first part.
    options = {"err_detect": "explode", "xerror": None, "reinit_filter": 0, **flac, **seek}
    source = ffmpeg.input(f"file:{path}", **options)
    # AU, unlike WAV, allows a stream of unknown length.
    command = source.output(
        "pipe:", format="au", acodec="pcm_f32be", map="0:a:0", loglevel="error", **stretch
    )
    arguments = [*command.compile(cmd=ffmpeg_program()), "-nostdin"]
    try:
        done = subprocess.run(arguments, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise DecodeError("timeout", f"ffmpeg did not finish within {TIMEOUT_S:g} s") from None
    said = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode:
        causes = {"matches no streams": "no-audio", "Cannot allocate memory": "memory"}
        reason = next((code for words, code in causes.items() if any(words in s for s in said)), "corrupt")
        last = re.sub(r" @ 0x[0-9a-f]+", "", said[-1]) if said else f"ended with {done.returncode}"
        raise DecodeError(reason, f"ffmpeg: {last}")
    if not done.stdout:
        return Audio(np.zeros(0, np.float32), 1, 0)
    with soundfile.SoundFile(io.BytesIO(done.stdout)) as file:
        mono = np.empty(len(done.stdout) // (4 * file.channels), np.float32)
        read = 0
        while len(block := file.read(_BLOCK, "float32", always_2d=True)):
            mono[read : read + len(block)] = block.mean(axis=1, dtype=np.float32)
            read += len(block)
        return Audio(mono[:read], file.samplerate, file.channels)


def _is_flac(path: Path) -> bool:
    with open(path, "rb") as file:
        skip_id3(file)
        return file.read(4) == b"fLaC"
