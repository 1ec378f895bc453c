"""Whether media that arrived are what was asked for: they decode, are long enough, and sound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipmill.audio import content_sha256, decode, to_int16
from clipmill.errors import DecodeError


@dataclass(frozen=True, slots=True)
class Checked:
    """A stretch of sound as it decodes, and the hash of its file's content; `rate` in Hz."""

    duration_s: float
    rate: int
    channels: int
    sha256: str


def check_media(
    path: Path,
    start_s: float | None,
    end_s: float | None,
    wanted_s: float,
    *,
    short_s: float = 0.5,
    keep_silent: bool = False,
) -> Checked:
    """Decode the stretch from `start_s` to `end_s` (seconds; None: all of it) and check it.

    Args:
        path: the media file.
        start_s: where the stretch begins; None is the file's beginning.
        end_s: where it ends; None is the file's end.
        wanted_s: how long it should be.
        short_s: how much of that may be missing.
        keep_silent: silence is welcome.

    Raises:
        DecodeError: it does not decode, is too short, or is silent; carries the reason code.
    """
    audio = decode(path, start_s, end_s)
    if audio.duration_s < wanted_s - short_s:
        raise DecodeError(
            "too-short",
            f"{audio.duration_s:.2f} s came of the {wanted_s:.2f} s wanted, and {short_s:g} s may be missing; "
            "--allow-short SECONDS allows more",
        )
    if not keep_silent and not to_int16(audio.samples).any():
        raise DecodeError("silent", "no sample reaches the last of 16 bits; --keep-silent keeps such clips")
    return Checked(audio.duration_s, audio.rate, audio.channels, content_sha256(path))
