"""A stretch of a media file as a file of its own, its coded packets copied as they are.

Packets are 20 to 90 ms long and a codec needs some before it sounds right, so the file
holds a little more than was asked for, and where in it the stretch begins is told. The
same source gives the same bytes: no dates, no versions, no random identifiers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING

from clipmill.errors import DecodeError

if TYPE_CHECKING:
    import av

MARGIN_S = 0.3
"""Kept before and after the stretch; MP3 at its most entangled needs ten packets."""

_WAV = ("u8", "s16le", "s24le", "s32le", "f32le", "alaw", "mulaw")
_CONTAINERS = {
    "opus": ("webm", ".webm"),
    "vorbis": ("webm", ".webm"),
    "aac": ("ipod", ".m4a"),
    "alac": ("ipod", ".m4a"),
    **dict.fromkeys((f"pcm_{kind}" for kind in _WAV), ("wav", ".wav")),
}
# Also of FLAC, whose own frames would still tell the old times, and of MP3, whose players drop a start of its own.
_ELSE = ("matroska", ".mka")

CUT_SUFFIXES = tuple(dict.fromkeys(suffix for _, suffix in (*_CONTAINERS.values(), _ELSE)))
"""Every extension that a cut can have."""


@dataclass(frozen=True)
class Cut:
    """A file that was cut, and where in it (s) what was asked for begins."""

    path: Path
    start_s: float


def cut(source: IO[bytes] | Path, start_s: float, end_s: float, folder: Path) -> Cut:
    """Copy the audio from `start_s` to `end_s` (seconds) into a new file in `folder`, without decoding it.

    Args:
        source: a path, or an open file that can seek.
        folder: gets the file `cut` with the extension of what it holds.

    Raises:
        DecodeError: with reason no-audio, corrupt or too-short.
        OSError: `folder` cannot be written; also whatever reading `source` raises.
    """
    import av

    av.logging.set_level(av.logging.PANIC)
    try:
        with av.open(
            str(source) if isinstance(source, Path) else source, "r", metadata_errors="ignore"
        ) as container:
            if not container.streams.audio:
                raise DecodeError("no-audio", f"holds no audio stream (read as {container.format.name})")
            return _copy(container, start_s, end_s, folder)
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise DecodeError("corrupt", " ".join(str(error).split())) from error


def _copy(container: av.container.InputContainer, start_s: float, end_s: float, folder: Path) -> Cut:
    import av

    stream = container.streams.audio[0]
    name = stream.codec_context.codec.canonical_name
    kind, suffix = _CONTAINERS.get(name, _ELSE)
    path = folder / f"cut{suffix}"
    packets = _packets(container, stream, start_s - MARGIN_S, end_s + MARGIN_S)
    first = next(packets, None)
    if first is None or first.pts is None:
        raise DecodeError("too-short", f"the source ends before {start_s:g} s")
    if container.format.name == "ogg" and name == "vorbis":
        first, packets = _trusted(first, packets)
    # What comes before zero is an encoder's priming, which decoders drop: the first of the packets kept must
    # stand there too, or the sound would be late by what is dropped.
    at = first.pts or 0
    shift = at + _priming(stream) if at > 0 else 0
    # In memory first: PyAV would hide the error of a disk that is full behind one of its own.
    made = io.BytesIO()
    with av.open(made, "w", format=kind, container_options={"fflags": "+bitexact"}) as output:
        target = output.add_stream_from_template(stream)
        for packet in _joined(first, packets):
            packet.pts = packet.dts = (packet.pts or 0) - shift
            packet.stream = target
            output.mux(packet)
    made.seek(0)
    with av.open(made, "r") as again:  # only the file itself knows where its own sound begins
        begins_s = float(shift * _base(stream)) - _origin_s(stream) + _origin_s(again.streams.audio[0])
    path.write_bytes(made.getbuffer())
    return Cut(path, start_s - begins_s)


def _packets(
    container: av.container.InputContainer, stream: av.AudioStream, from_s: float, to_s: float
) -> Iterator[av.Packet]:
    """The stream's packets that sound between two times in seconds."""
    import av

    origin_s, tick_s = _origin_s(stream), float(_base(stream))
    if from_s > 0:
        try:
            container.seek(int((from_s + origin_s) / tick_s), stream=stream)
        except av.FFmpegError:
            container.seek(0)
    for packet in container.demux(stream):
        if packet.pts is None or not packet.size:
            continue
        at_s = packet.pts * tick_s - origin_s
        if at_s >= to_s:
            return
        if at_s + (packet.duration or 0) * tick_s > from_s:
            yield packet


def _trusted(first: av.Packet, packets: Iterator[av.Packet]) -> tuple[av.Packet, Iterator[av.Packet]]:
    """Begin where the second packet, the first that sounds, comes when it should.

    FFmpeg takes the first packet of each Ogg page for shorter or longer than it is where Vorbis changes its
    block size there, and its time is wrong by that: up to 10 ms.
    """
    for second in packets:
        if second.pts == (first.pts or 0) + (first.duration or 0):
            return first, _joined(second, packets)
        first = second
    return first, packets


def _priming(stream: av.AudioStream) -> int:
    """Ticks that a decoder drops from the head of every Opus stream, as its own header says."""
    head = stream.codec_context.extradata
    if head is None or not head.startswith(b"OpusHead"):
        return 0
    return round(int.from_bytes(head[10:12], "little") / 48_000 / _base(stream))


def _joined(first: av.Packet, rest: Iterator[av.Packet]) -> Iterator[av.Packet]:
    yield first
    yield from rest


def _base(stream: av.AudioStream) -> Fraction:
    return stream.time_base or Fraction(1, 1)


def _origin_s(stream: av.AudioStream) -> float:
    """Where the stream's sound begins, as `decode` counts."""
    return float(max(stream.start_time or 0, 0) * _base(stream))
