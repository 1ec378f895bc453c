"""Sound files to mono float32, in process: libsndfile first, PyAV for what it cannot read.

Mono is the mean of the channels, taken block by block, so that a stream whose channel
count changes part-way needs no special case. A header's frame count is never believed:
it must not size an allocation, and when what was read does not agree with it, or much
of the file was left unread, PyAV decodes the file too and the longer result stands.
"""

from __future__ import annotations

import io
import mmap
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from clipmill.audio.chunks import has_xing, missing_frames
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
_READ = 1 << 20  # samples of all channels read at once: most clips come whole
_PREROLL_S = 1.0  # lossy codecs need some packets before a cut to be exact after it
_PACKET = 4096  # frames in the longest packet of the codecs in use
_MP3_SLACK = 4 * 1152  # frames by which an honest MP3 header may be off (encoder delay and padding)
_UNREAD_BYTES = {
    "FLAC": 1 << 12,
    "OGG": 1 << 12,
    "MP3": 1 << 12,
}  # more than this unread at the end is more than tags and read-ahead
_GAP_S = 0.1  # more than the clocks of containers are off
_BETWEEN_PACKETS = 1 << 11  # bytes: more than a container has to say there
_CHUNKED = (
    "WAV",
    "WAVEX",
    "RF64",
    "W64",
    "AIFF",
    "CAF",
    "AU",
)  # of these a cut end can be seen in the header
# Formats in which FFmpeg finds a place by an index or by times; in others it reckons it from the bit rate.
_INDEXED = ("matroska", "webm", "mp4", "ogg", "flac", "wav", "w64", "aiff", "caf", "au", "avi", "mp3")
_CHAINED = ("OGG", "MP3")  # what is a whole file still when several are put one after the other
_ID3 = re.compile(rb"ID3[\x02-\x04]\0.[\x00-\x7f]{4}", re.DOTALL)
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}  # FFmpeg's names
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
    audio = (_by_program if decoder == "ffmpeg" else _in_process)(path, start_s, end_s)
    if not len(audio.samples):
        if start_s:
            raise DecodeError("too-short", f"the source ends before {start_s:g} s")
        raise DecodeError("empty", "decodes to no samples")
    if not MIN_RATE <= audio.rate <= MAX_RATE:
        raise DecodeError(
            "corrupt", f"says its rate is {audio.rate} Hz; allowed are {MIN_RATE} to {MAX_RATE}"
        )
    if not np.isfinite([audio.samples.min(), audio.samples.max()]).all():  # either is nan where one sample is
        raise DecodeError("corrupt", "decodes to samples that are no finite numbers")
    return audio


def _check_readable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode):  # opening it would wait for its writer, and decoders go back and forth
            raise DecodeError(
                "unreadable",
                "is a pipe and no regular file; `pipeline predict RUN -` hears what comes on stdin",
            )
        if not stat.S_ISREG(mode):
            raise DecodeError("unreadable", "is no regular file")
        with open(path, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise DecodeError("missing", "no such file") from None
    except OSError as error:
        raise DecodeError("unreadable", error.strerror or str(error)) from error
    if empty:
        raise DecodeError("empty", "the file has no bytes")


def _begins_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _by_program(path: Path, start_s: float, end_s: float | None) -> Audio:
    """The ffmpeg program, which calls a file whole that ends between two packets: what it states is asked for too.

    Raises:
        DecodeError: also where decoding in process finds that the file is cut short.
    """
    audio = decode_with_ffmpeg(path, start_s, end_s)
    promised_s = _due_s(_promised_s(path), start_s, end_s)
    if promised_s is not None and _lacks(audio.duration_s, promised_s):
        _in_process(path, start_s, end_s)  # tells a cut end from a gap between packets
    return audio


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
        # FFmpeg seeks within the first of streams that follow each other alone.
        chained = start_s > _PREROLL_S and _begins_with(path, b"OggS") and len(_links(path)) > 1
        try:
            audio = _decode_av(path, start_s, end_s, seek=not chained)
            if end_s is None or audio.duration_s < end_s - start_s:  # libsndfile opens no CAF that is cut
                stated_s = start_s + audio.duration_s + missing_frames(path) / audio.rate
                _check_whole(audio.duration_s, _due_s(stated_s, start_s, end_s))
        except DecodeError as second:
            raise _by_both(refusal, second) from second
        return audio
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


def _by_both(refusal: str, second: DecodeError) -> DecodeError:
    """What to raise where libsndfile said `refusal` and FFmpeg then failed too."""
    if second.reason != "corrupt":
        return second
    return DecodeError("corrupt", f"libsndfile: {refusal}; FFmpeg: {second}")


def _check_whole(found_s: float, promised_s: float | None, *, exact: bool = False) -> None:
    """Raise DecodeError where less was found than a reliable (or exact) statement of the length promised."""
    if promised_s is not None and _lacks(found_s, promised_s, exact=exact):
        raise DecodeError(
            "corrupt", f"is cut short: {promised_s:.2f} s are promised, {found_s:.2f} s are there"
        )


def _lacks(found_s: float, promised_s: float, *, exact: bool = False) -> bool:
    return promised_s - found_s > (0.0005 if exact else max(0.1, 0.02 * promised_s))


def _due_s(stated_s: float | None, start_s: float, end_s: float | None) -> float | None:
    """Seconds of a stretch that a file holds which states its length; None where it states none."""
    if stated_s is None:
        return None
    return max(min(stated_s, stated_s if end_s is None else end_s) - start_s, 0.0)


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
        form = file.format
        if form == "FLAC" and (first or wanted is not None):
            # libsndfile passes over damaged frames when it seeks, and what follows them comes too early.
            with suppress(DecodeError):
                return _decode_av(path, start_s, end_s), _Doubt()
            _read_mono(file, first)  # in order it finds the damage, or that it was FFmpeg's alone
        elif first and (first >= promised or not file.seekable()):
            links = _links(path) if form in _CHAINED else []
            if len(links) > 1:
                return _decode_chain(links, start_s, end_s), _Doubt()
            promise = _reliable_promise(path, form, promised)
            if promise is not None and promised <= first < promise:
                _check_whole(promised / rate, promise / rate)
            return _decode_av(path, start_s, end_s), _Doubt()
        elif first:
            file.seek(first)
        samples = _read_mono(file, wanted)
        read = len(samples)
        left = os.fstat(raw.fileno()).st_size - os.lseek(raw.fileno(), 0, os.SEEK_CUR)
    if wanted is not None and read >= wanted:  # all that was asked for is there
        return Audio(samples, rate, channels), _Doubt()
    unread = _leaves_unread(form, left)
    if form in _CHAINED and (unread or first or wanted is not None) and len(links := _links(path)) > 1:
        return _decode_chain(links, start_s, end_s), _Doubt()
    return Audio(samples, rate, channels), _doubt_of(path, file, read, left, first, wanted)


def _leaves_unread(form: str, left: int) -> bool:
    """Whether `left` bytes at the end are more than a file of libsndfile's format `form` has after its sound."""
    return left > _UNREAD_BYTES.get(form, _UNREAD_BYTES_ELSE)


def _doubt_of(
    path: Path, file: soundfile.SoundFile, read: int, left: int, first: int = 0, wanted: int | None = None
) -> _Doubt:
    """What is doubtful where `read` of the `wanted` frames (None: all) from `first` came, and `left` bytes did not."""
    form, promised = file.format, file.frames
    slack = _MP3_SLACK if form == "MP3" else 0
    short = promised - first - read
    promise = _reliable_promise(path, form, promised)
    due = None if promise is None else promise - first if wanted is None else min(promise - first, wanted)
    doubtful = (
        (wanted is None and abs(short) > slack)
        or _leaves_unread(form, left)
        or (not read and left > 0)
        or (due is not None and due - read > slack)
    )
    promised_s = None if due is None else due / file.samplerate
    return _Doubt(doubtful, form == "FLAC" and short > 0, promised_s)


def _read_mono(file: soundfile.SoundFile, wanted: int | None) -> NDArray[np.float32]:
    """The next `wanted` frames of an open file, or all that are left, mixed to mono `[frames]`."""
    most = max(_READ // file.channels, 1)
    sound = _Sound()
    read = 0
    while wanted is None or read < wanted:
        size = most if wanted is None else min(most, wanted - read)
        block = file.read(size, "float32", always_2d=True)
        if not len(block):
            break
        read += len(block)
        sound.append(_mean_of_channels(block.T))
    return sound.joined()


def _links(path: Path) -> list[bytes]:
    """The streams that were put one after the other to make an Ogg or MP3 file; one where it is neither."""
    data = path.read_bytes()
    return [data[start:end] for start, end in _link_spans(data)]


def _link_spans(data: bytes | mmap.mmap) -> list[tuple[int, int]]:
    """Where the streams of `_links` begin and end, in bytes.

    Within Ogg each begins with pages marked so, after the pages of the one before; within MP3 with a tag.
    """
    starts = [0]
    if data[:4] == b"OggS":
        at, opening = 0, True
        while (at := data.find(b"OggS\0", at)) >= 0 and at + 27 <= len(data):
            begins = bool(data[at + 5] & 2)
            if begins and not opening:
                starts.append(at)
            opening = begins
            segments = data[at + 26]
            at += 27 + segments + sum(data[at + 27 : at + 27 + segments])
    else:
        starts += [found.start() for found in _ID3.finditer(data) if found.start()]
    return list(zip(starts, [*starts[1:], len(data)], strict=True))


def _decode_chain(links: list[bytes], start_s: float, end_s: float | None) -> Audio:
    """Decode streams that follow each other, by libsndfile, at the rate of the first that is in the stretch."""
    parts: list[tuple[int, NDArray[np.float32]]] = []
    channels = 0
    at_s = 0.0
    for link in links:
        if end_s is not None and at_s >= end_s:
            break
        with _silenced_stderr(), soundfile.SoundFile(io.BytesIO(link)) as file:
            rate, length_s = file.samplerate, file.frames / file.samplerate
            if at_s + length_s > start_s:
                skipped = max(round((start_s - at_s) * rate), 0)
                file.seek(skipped)
                wanted = None if end_s is None else max(round((end_s - at_s) * rate) - skipped, 0)
                samples = _read_mono(file, wanted)
                length_s = (skipped + len(samples)) / rate
                parts.append((rate, samples))
                channels = max(channels, file.channels)
        at_s += length_s
    return Audio(_at_one_rate(parts) if parts else _joined([]), parts[0][0] if parts else MIN_RATE, channels)


def _reliable_promise(path: Path, form: str, promised: int) -> int | None:
    """Frames that a file states in a way to be trusted, or None.

    Not an MP3's without a Xing header (an estimate from its first frame), nor an absurd
    one; and of WAV, AIFF and their like the chunk's own size, for libsndfile hides what is cut off.
    """
    if form in _CHUNKED:
        return promised + missing_frames(path)
    if form == "FLAC":
        return promised if promised < _ABSURD else None
    if form == "MP3":
        return promised if has_xing(path) else None
    return None


def _promised_s(path: Path) -> float | None:
    """Seconds that a file's header states in a way to be trusted; None where it states none, or cannot be opened."""
    import av

    try:
        with (
            _silenced_stderr(),
            open(path, "rb") as raw,
            soundfile.SoundFile(raw.fileno(), closefd=False) as file,
        ):
            promise = _reliable_promise(path, file.format, file.frames)
            return None if promise is None else promise / file.samplerate
    except (soundfile.SoundFileError, RuntimeError):
        pass
    av.logging.set_level(av.logging.PANIC)
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.audio[0]
            return _stated_s(
                container, stream, max(float((stream.start_time or 0) * (stream.time_base or 0)), 0.0)
            )
    except (av.FFmpegError, ValueError, OverflowError, IndexError):
        return None


def _decode_av(path: Path, start_s: float, end_s: float | None, *, seek: bool = True) -> Audio:
    """Decode by PyAV (FFmpeg's libraries), seeking where that can be trusted and `seek` allows it."""
    import av

    av.logging.set_level(av.logging.PANIC)
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise DecodeError("no-audio", f"holds no audio stream (read as {container.format.name})")
            if not seek or start_s <= _PREROLL_S or not _is_of(container, _INDEXED):
                return _read_stream(container, path, start_s, end_s)
            with suppress(DecodeError, av.FFmpegError):
                audio = _read_stream(container, path, start_s, end_s, seek=True)
                due_s = _due_s(_stated_s(container, container.streams.audio[0], 0.0), start_s, end_s)
                enough_s = due_s or (0.0 if end_s is None else end_s - start_s)
                if len(audio.samples) and audio.duration_s >= enough_s - 0.1:
                    return audio
        # Seeking trusts times that can be wrong, as where the rate changes part-way; counting samples does not.
        with av.open(str(path), metadata_errors="ignore") as container:
            return _read_stream(container, path, start_s, end_s)
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise DecodeError("corrupt", _one_line(error, path)) from error


def _is_of(container: av.container.InputContainer, names: Sequence[str]) -> bool:
    """Whether the container's format is one of FFmpeg's `names`; it may have several names itself."""
    return not set(names).isdisjoint(container.format.name.split(","))


def _read_stream(
    container: av.container.InputContainer,
    path: Path,
    start_s: float,
    end_s: float | None,
    *,
    seek: bool = False,
) -> Audio:
    """The first audio stream from `start_s` to `end_s`, whatever rates and layouts its frames have."""
    parts: list[tuple[int, NDArray[np.float32]]] = []  # rate and samples, one for each run of equal rate
    sound = _Sound()
    course = _Course()
    rate = 0
    for its_rate, mono in _frames(container, path, course, start_s, end_s, seek=seek):
        if its_rate != rate:
            if rate:
                parts.append((rate, sound.joined()))
            sound, rate = _Sound(), its_rate
        sound.append(mono)
    parts.append((rate, sound.joined()))
    samples = _at_one_rate(parts)
    if course.surplus:
        samples = samples[: max(len(samples) - course.surplus, 0)]
    return Audio(samples, parts[0][0] or 1, course.channels)


@dataclass
class _Course:
    """What becomes known of a stream while its frames are taken.

    `surplus`: frames at its end, at the rate of the last, that are no sound; known after the last.
    """

    channels: int = 0
    surplus: int = 0


def _frames(
    container: av.container.InputContainer,
    path: Path,
    course: _Course,
    start_s: float = 0.0,
    end_s: float | None = None,
    *,
    seek: bool = False,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The rate and the mono samples of each frame of the first audio stream, cut to `start_s` to `end_s`.

    A cut is as exact as the container's clock: to the sample in most, to 1 ms in WebM and Matroska.

    Raises:
        DecodeError: also after the last frame, where what came is not what should have come.
    """
    import av

    stream = container.streams.audio[0]
    exact = container.format.name == "flac"  # its frames are numbered, and its length is exact to the sample
    if stream.codec_context.name == "flac":  # without, FFmpeg passes over damaged frames without a word
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    origin_s = _seek(container, stream, start_s - (0.0 if exact else _PREROLL_S)) if seek else None
    rate = 0
    at_s: float | None = None
    heard_s = 0.0  # the last frame's end by the container's clock, which goes on where packets are left out
    try:
        for frame in container.decode(stream):
            if at_s is None:
                origin_s = _origin_s(frame, stream) if origin_s is None else origin_s
                # Where places are counted from the first sample, it stands at zero whatever its time (WMA's is late).
                at_s = max((frame.time or 0.0) - origin_s, 0.0) if _is_of(container, _INDEXED) else 0.0
            clock_s = at_s if frame.time is None or origin_s is None else frame.time - origin_s
            if exact:
                due_at_s = at_s if rate else start_s if seek else 0.0
                gap = (clock_s - due_at_s) * frame.sample_rate
                if gap > 0.5 or (seek and gap < -0.5 and rate):  # back in time a second stream begins
                    raise DecodeError("corrupt", f"lacks what should be at {at_s:.2f} s")
            rate = frame.sample_rate
            course.channels = max(course.channels, frame.layout.nb_channels)
            mono = _mean_of_channels(_as_float(frame))
            skip = max(round((start_s - at_s) * rate), 0)
            keep = None if end_s is None else max(round((end_s - at_s) * rate), 0)
            yield rate, mono[skip:keep]
            at_s += len(mono) / rate
            heard_s = clock_s + len(mono) / rate
            if end_s is not None and at_s >= end_s:
                break
    except av.FFmpegError as error:
        raise DecodeError("corrupt", f"after {at_s or 0.0:.2f} s: {_one_line(error, path)}") from error
    due_s = _due_s(_stated_s(container, stream, origin_s or 0.0), start_s, end_s)
    found_s = max(at_s or 0.0, start_s) - start_s
    if heard_s - (at_s or 0.0) > _GAP_S and _is_of(container, ("matroska", "webm")) and _has_hole(path):
        raise DecodeError("corrupt", "is damaged: bytes between its packets belong to none of them")
    # A gap that packets leave in time, as those of a broadcast may, is no cut end.
    _check_whole(max(found_s, heard_s - start_s), due_s, exact=exact)
    if at_s is not None and "mp4" in container.format.name and stream.duration and stream.time_base:
        # MP4 states the length exactly: what is left of the last packet is the encoder's padding, not sound.
        surplus = round((at_s - float(stream.duration * stream.time_base)) * rate)
        if 0 < surplus < _PACKET and (end_s is None or at_s < end_s):
            course.surplus = surplus


def _has_hole(path: Path) -> bool:
    """Whether bytes between a container's packets belong to none of them: damage that FFmpeg passed over."""
    import av

    end = None
    with av.open(str(path), metadata_errors="ignore") as container:
        for packet in container.demux():
            if packet.pos is None or packet.pos < 0:
                continue
            if end is not None and packet.pos - end > _BETWEEN_PACKETS:
                return True
            end = packet.pos + packet.size
    return False


def _stated_s(
    container: av.container.InputContainer, stream: av.AudioStream, origin_s: float
) -> float | None:
    """Seconds of sound that the header states, and that are not reckoned from the file's size; None where it does not.

    `origin_s` is the container's time where the sound starts. A video in the file may be longer than the sound.
    """
    import av

    if _is_of(container, ("mp4",)):
        return float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
    whole_s = container.duration / av.time_base if container.duration else None
    if _is_of(container, ("flac",)):
        return whole_s
    if not _is_of(container, ("matroska", "webm")):
        return None
    if found := _CLOCK.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, found.groups())
        own_s = 3600 * hours + 60 * minutes + seconds
        whole_s = own_s if whole_s is None else min(own_s, whole_s)
    elif len(container.streams) > 1:
        return None
    return None if whole_s is None else max(whole_s - origin_s, 0.0)


def _seek(container: av.container.InputContainer, stream: av.AudioStream, place_s: float) -> float | None:
    """Go to `place_s`, in seconds from where the sound starts, or a little before it.

    Returns the container's time of that start; None where it has no times, and the stream is at its beginning.
    """
    import av

    first = next(iter(container.decode(stream)), None)
    if first is None or first.time is None or stream.time_base is None:
        container.seek(0)
        return None
    origin_s = _origin_s(first, stream)
    try:
        container.seek(int((origin_s + place_s) / stream.time_base), stream=stream)
    except av.FFmpegError:
        container.seek(0)
    return origin_s


def _origin_s(first: av.AudioFrame, stream: av.AudioStream) -> float:
    """The container's time where the sound starts, in seconds: what it states, or its first frame's if that is earlier.

    A WebM's statement can be 30 ms late. Time before zero is an encoder's priming, and no sound.
    A FLAC that states its length begins at zero: where FFmpeg's first frame is later, one before it is damaged.
    """
    if stream.container.format.name == "flac" and stream.duration:
        return 0.0
    stated_s = float((stream.start_time or 0) * (stream.time_base or 0))
    return max(min(stated_s, first.time or 0.0), 0.0)


def _at_one_rate(parts: list[tuple[int, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """Join runs of different rates at the rate of the first."""
    from clipmill.audio.convert import resample

    rate = parts[0][0]
    return _joined(
        [samples if r == rate else resample(samples, r, rate) for r, samples in parts if len(samples)]
    )


def _as_float(frame: av.AudioFrame) -> Sequence[NDArray[np.float32]] | NDArray[np.float32]:
    """A frame's channels as float32 `[channels][samples]`, integers scaled to -1..1."""
    from av.audio.plane import AudioPlane

    channels = frame.layout.nb_channels
    dtype = _DTYPES[frame.format.name.rstrip("p")]
    # Not by PyAV's to_ndarray: of 8 and more planes it counts one too many, and reads where nothing is.
    planes: list[Any] = [AudioPlane(frame, k) for k in range(channels if frame.format.is_planar else 1)]
    if frame.format.is_planar:
        return [_scaled(np.frombuffer(plane, dtype, frame.samples)) for plane in planes]
    return _scaled(np.frombuffer(planes[0], dtype, frame.samples * channels).reshape(-1, channels).T)


def _scaled(samples: NDArray[Any]) -> NDArray[np.float32]:
    """A copy as float32, integers scaled to -1..1."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / np.float32(2.0 ** (8 * samples.dtype.itemsize - 1))
    return samples.astype(np.float32)


def _mean_of_channels(channels: Sequence[NDArray[np.float32]] | NDArray[np.float32]) -> NDArray[np.float32]:
    """`[channels][samples]` -> `[samples]`."""
    if len(channels) == 1:
        return channels[0]
    if len(channels) == 2:  # numpy's mean over two interleaved channels takes ten times as long
        mono = channels[0] + channels[1]
        mono *= np.float32(0.5)
        return mono
    return np.asarray(channels).mean(axis=0, dtype=np.float32)


class _Sound:
    """Mono samples that come in blocks; many of them grow in place, so that a long sound is never there twice."""

    def __init__(self) -> None:
        self._samples: NDArray[np.float32] = np.zeros(0, np.float32)
        self._blocks: list[NDArray[np.float32]] = []
        self._waiting = 0

    def append(self, block: NDArray[np.float32]) -> None:
        self._blocks.append(block)
        self._waiting += len(block)
        if self._waiting > 2 * _READ:
            self._grow()

    def joined(self) -> NDArray[np.float32]:
        if not len(self._samples):
            return _joined(self._blocks)
        self._grow()
        return self._samples

    def _grow(self) -> None:
        at = len(self._samples)
        # The allocator moves a large array's pages, and copies nothing.
        self._samples.resize(at + self._waiting, refcheck=False)
        for block in self._blocks:
            self._samples[at : at + len(block)] = block
            at += len(block)
        self._blocks, self._waiting = [], 0


def _joined(blocks: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    if len(blocks) == 1:
        return blocks[0]
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
    """libmpg123, inside libsndfile, prints warnings straight to file descriptor 2.

    That is the whole process's: a thread beside the main one lets them through, lest it swallows what others say.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
