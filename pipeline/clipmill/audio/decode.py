"""Sound files to mono float32, in process: libsndfile first, PyAV for what it cannot read.

Mono is the mean of the channels, taken block by block, so that a stream whose channel
count changes part-way needs no special case. A header's frame count is never believed:
it must not size an allocation, and when what was read does not agree with it, or much
of the file was left unread, PyAV decodes the file too and the longer result stands.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from clipmill.audio.chunks import missing_frames
from clipmill.audio.ffmpeg import decode_with_ffmpeg
from clipmill.errors import ConfigError, DecodeError
from clipmill.types import Audio

if TYPE_CHECKING:
    import av

DECODERS = ("auto", "ffmpeg")
"""auto: in process. ffmpeg: one process of the ffmpeg program for each clip, isolated and slower."""

MIN_RATE, MAX_RATE = 1_000, 1_000_000
"""Sample rates in Hz that a source may say it has; another is a header that lies."""

_ABSURD = 1 << 40  # frames: no header that promises more is believed
_BLOCK = 1 << 16  # frames read at once
_PREROLL_S = 1.0  # lossy codecs need some packets before a cut to be exact after it
_PACKET = 4096  # frames in the longest packet of the codecs in use
_MP3_SLACK = 4 * 1152  # frames by which an honest MP3 header may be off (encoder delay and padding)
_UNREAD_BYTES = {"FLAC": 1 << 12}  # more than this unread at the end is more than tags and read-ahead
_UNREAD_BYTES_ELSE = 1 << 17  # WAV and its like carry whole chunks of metadata after the samples


def decode(
    path: Path, start_s: float | None = None, end_s: float | None = None, decoder: str = "auto"
) -> Audio:
    """Decode a file, or the stretch from `start_s` to `end_s` (seconds) of it, to mono.

    A stretch that runs past the end of the source is cut there.

    Raises:
        DecodeError: with reason missing, unreadable, no-audio, corrupt, empty or too-short.
        ConfigError: `decoder` is unknown, or the stretch is not one.
    """
    if decoder not in DECODERS:
        raise ConfigError(f"unknown decoder {decoder!r}; known: {', '.join(DECODERS)}")
    start_s = start_s or 0.0
    if start_s < 0 or (end_s is not None and end_s <= start_s):
        raise ConfigError(f"{path}: no stretch from {start_s:g} s to {end_s:g} s")
    _check_readable(path)
    audio = (
        decode_with_ffmpeg(path, start_s, end_s) if decoder == "ffmpeg" else _in_process(path, start_s, end_s)
    )
    if not len(audio.samples):
        if start_s:
            raise DecodeError("too-short", f"the source ends before {start_s:g} s")
        raise DecodeError("empty", "decodes to no samples")
    if not MIN_RATE <= audio.rate <= MAX_RATE:
        raise DecodeError(
            "corrupt", f"says its rate is {audio.rate} Hz; allowed are {MIN_RATE} to {MAX_RATE}"
        )
    if not np.isfinite(audio.samples).all():
        raise DecodeError("corrupt", "decodes to samples that are no finite numbers")
    return audio


def _check_readable(path: Path) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise DecodeError("unreadable", "is no regular file")
        with open(path, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise DecodeError("missing", "no such file") from None
    except OSError as error:
        raise DecodeError("unreadable", error.strerror or str(error)) from error
    if empty:
        raise DecodeError("empty", "the file has no bytes")


def _in_process(path: Path, start_s: float, end_s: float | None) -> Audio:
    """libsndfile, then PyAV where libsndfile fails or its result is in doubt.

    Raises:
        DecodeError: also where both find less than a length that the file states reliably:
            half a clip is not the clip that its label speaks of.
    """
    try:
        audio, doubt = _decode_soundfile(path, start_s, end_s)
    except (soundfile.SoundFileError, RuntimeError) as error:
        refusal = _one_line(error, path)
        try:
            return _decode_av(path, start_s, end_s)
        except DecodeError as second:
            if second.reason != "corrupt":
                raise
            raise DecodeError("corrupt", f"libsndfile: {refusal}; FFmpeg: {second}") from second
    if doubt.any:
        try:
            other = _decode_av(path, start_s, end_s)
        except DecodeError:
            if doubt.damaged:
                raise
        else:
            audio = other if other.duration_s > audio.duration_s else audio
        _check_whole(audio.duration_s, doubt.promised_s, exact=doubt.damaged)
    return audio


def _check_whole(found_s: float, promised_s: float | None, *, exact: bool = False) -> None:
    """Raise DecodeError where less was found than a reliable (or exact) statement of the length promised."""
    if promised_s is not None and promised_s - found_s > (0.0005 if exact else max(0.1, 0.02 * promised_s)):
        raise DecodeError(
            "corrupt", f"is cut short: {promised_s:.2f} s are promised, {found_s:.2f} s are there"
        )


@dataclass(frozen=True)
class _Doubt:
    """What makes a result of libsndfile doubtful.

    `damaged`: fewer samples came than its header says, from a codec that says it exactly.
    `promised_s`: the length that should have come, where the file states it reliably.
    """

    any: bool = False
    damaged: bool = False
    promised_s: float | None = None


def _decode_soundfile(path: Path, start_s: float, end_s: float | None) -> tuple[Audio, _Doubt]:
    """Decode by libsndfile, and say whether the header and the stream disagree."""
    with (
        _silenced_stderr(),
        open(path, "rb") as raw,
        soundfile.SoundFile(raw.fileno(), closefd=False) as file,
    ):
        rate, channels, promised = file.samplerate, file.channels, file.frames
        first = round(start_s * rate)
        wanted = None if end_s is None else max(round(end_s * rate) - first, 0)
        if first and (first >= promised or not file.seekable()):
            return _decode_av(path, start_s, end_s), _Doubt()
        if first:
            file.seek(first)
        blocks: list[NDArray[np.float32]] = []
        read = 0
        while wanted is None or read < wanted:
            block = file.read(
                _BLOCK if wanted is None else min(_BLOCK, wanted - read), "float32", always_2d=True
            )
            if not len(block):
                break
            read += len(block)
            blocks.append(_mean_of_channels(block.T))
        left = os.fstat(raw.fileno()).st_size - os.lseek(raw.fileno(), 0, os.SEEK_CUR)
        form = file.format
    samples = _joined(blocks)
    if wanted is not None and read >= wanted:  # all that was asked for is there
        return Audio(samples, rate, channels), _Doubt()
    slack = _MP3_SLACK if form == "MP3" else 0
    unread = left > _UNREAD_BYTES.get(form, _UNREAD_BYTES_ELSE)
    short = promised - first - read
    promise = _reliable_promise(path, form, promised)
    promised_s = None if promise is None or wanted is not None else (promise - first) / rate
    doubtful = abs(short) > slack or unread or (promised_s is not None and promised_s * rate - read > slack)
    return Audio(samples, rate, channels), _Doubt(doubtful, form == "FLAC" and short > 0, promised_s)


def _reliable_promise(path: Path, form: str, promised: int) -> int | None:
    """Frames that a file states in a way to be trusted, or None.

    Not an MP3's without a Xing header (an estimate from its first frame), nor an absurd
    one; and of WAV and AIFF the chunk's own size, for libsndfile hides what is cut off.
    """
    if form in ("WAV", "WAVEX", "AIFF"):
        return promised + missing_frames(path)
    if form == "FLAC":
        return promised if promised < _ABSURD else None
    if form == "MP3":
        with open(path, "rb") as file:
            head = file.read(1 << 16)
        return promised if b"Xing" in head or b"Info" in head else None
    return None


def _decode_av(path: Path, start_s: float, end_s: float | None) -> Audio:
    """Decode by PyAV (FFmpeg's libraries)."""
    import av

    av.logging.set_level(av.logging.PANIC)
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise DecodeError("no-audio", f"holds no audio stream (read as {container.format.name})")
            return _read_stream(container, path, start_s, end_s)
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise DecodeError("corrupt", _one_line(error, path)) from error


def _read_stream(
    container: av.container.InputContainer, path: Path, start_s: float, end_s: float | None
) -> Audio:
    """The first audio stream from `start_s` to `end_s`, whatever rates and layouts its frames have.

    A cut is as exact as the container's clock: to the sample in most, to 1 ms in WebM and Matroska.
    """
    import av

    stream = container.streams.audio[0]
    if start_s > _PREROLL_S and stream.time_base is not None:
        origin = stream.start_time or 0
        try:
            container.seek(origin + int((start_s - _PREROLL_S) / stream.time_base), stream=stream)
        except av.FFmpegError:
            container.seek(0)
    parts: list[tuple[int, NDArray[np.float32]]] = []  # rate and samples, one for each run of equal rate
    blocks: list[NDArray[np.float32]] = []
    rate = channels = 0
    at_s: float | None = None
    try:
        for frame in container.decode(stream):
            if at_s is None:
                at_s = _time_of(frame, stream)
            if frame.sample_rate != rate:
                if blocks:
                    parts.append((rate, _joined(blocks)))
                blocks, rate = [], frame.sample_rate
            channels = max(channels, frame.layout.nb_channels)
            mono = _mean_of_channels(_as_float(frame))
            skip = max(round((start_s - at_s) * rate), 0)
            keep = None if end_s is None else max(round((end_s - at_s) * rate), 0)
            blocks.append(mono[skip:keep])
            at_s += len(mono) / rate
            if end_s is not None and at_s >= end_s:
                break
    except av.FFmpegError as error:
        raise DecodeError("corrupt", f"after {at_s or 0.0:.2f} s: {_one_line(error, path)}") from error
    parts.append((rate, _joined(blocks)))
    samples = _at_one_rate(parts)
    if container.duration and len(container.streams) == 1 and end_s is None and _states_its_length(container):
        # FFmpeg passes over damaged FLAC frames without a word, but FLAC's length is exact to the sample.
        exact = container.format.name == "flac"
        _check_whole((at_s or 0.0), container.duration / av.time_base, exact=exact)
    if at_s is not None and "mp4" in container.format.name and stream.duration and stream.time_base:
        # MP4 states the length exactly: what is left of the last packet is the encoder's padding, not sound.
        surplus = round((at_s - float(stream.duration * stream.time_base)) * rate)
        if 0 < surplus < _PACKET and (end_s is None or at_s < end_s):
            samples = samples[: max(len(samples) - surplus, 0)]
    return Audio(samples, parts[0][0] or 1, channels)


def _states_its_length(container: av.container.InputContainer) -> bool:
    """Whether the container's duration is stated by its header and not estimated from its size."""
    return any(name in container.format.name for name in ("matroska", "webm", "mp4", "flac"))


def _time_of(frame: av.AudioFrame, stream: av.AudioStream) -> float:
    """Seconds from the start of the stream to the start of a frame."""
    if frame.pts is None or frame.time_base is None or stream.time_base is None:
        return 0.0
    # A stream may begin a little before zero (an encoder's priming samples): zero is where sound begins.
    origin = max(stream.start_time or 0, 0) * stream.time_base
    return max(float(frame.pts * frame.time_base - origin), 0.0)


def _at_one_rate(parts: list[tuple[int, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """Join runs of different rates at the rate of the first."""
    from clipmill.audio.convert import resample

    rate = parts[0][0]
    return _joined(
        [samples if r == rate else resample(samples, r, rate) for r, samples in parts if len(samples)]
    )


def _as_float(frame: av.AudioFrame) -> NDArray[np.float32]:
    """A frame's samples as float32 `[channels, samples]`, integers scaled to -1..1."""
    samples: NDArray[Any] = frame.to_ndarray()
    if frame.format.is_packed:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / np.float32(2.0 ** (8 * samples.dtype.itemsize - 1))
    return samples.astype(np.float32, copy=False)


def _mean_of_channels(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[channels, samples]` -> `[samples]`."""
    return block[0] if len(block) == 1 else block.mean(axis=0, dtype=np.float32)


def _joined(blocks: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _one_line(error: BaseException, path: Path) -> str:
    """A decoder's message in one line, without what differs from run to run or misleads."""
    text = " ".join(str(error).split()).replace(f": '{path}'", "").replace(f"Error opening '{path}': ", "")
    text = re.sub(r"^\[Errno \d+\] |^Error opening \d+: |; last error log: .*|\.$", "", text)
    # What libsndfile says of bytes that libmpg123 took for MPEG audio and then could not open.
    return text.replace(
        "File does not exist or is not a regular file (possibly a pipe?)", "Format not recognised"
    )


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """libmpg123, inside libsndfile, prints warnings straight to file descriptor 2."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
