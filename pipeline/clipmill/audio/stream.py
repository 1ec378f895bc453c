"""Sound files of any length, block by block: what `prepare_clip` would give, in memory that does not grow.

A block of sound that has been handed on cannot be taken back. So the first minute is held until there
is more. The samples are those of `prepare_clip`, but for the last of their 16 bits here and there (how
soxr's input is cut decides how it rounds), and but for one case: where libsndfile's result turns out
doubtful at the end of a longer file and FFmpeg finds more, the sound up to there is libsndfile's and
what follows is FFmpeg's, where `prepare_clip` takes all from FFmpeg; and where FFmpeg fails in what
follows, that is the file's failure, where `prepare_clip` keeps libsndfile's sound. Failures are told
where they are met, which may be at the end: a block is no proof that its file is sound.
"""

from __future__ import annotations

import io
import mmap
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from clipmill.audio.chunks import missing_frames
from clipmill.audio.convert import to_int16
from clipmill.audio.decode import (
    _CHAINED,
    _PACKET,
    _READ,
    MAX_RATE,
    MIN_RATE,
    _by_both,
    _check_readable,
    _check_whole,
    _Course,
    _Doubt,
    _doubt_of,
    _frames,
    _is_of,
    _joined,
    _leaves_unread,
    _link_spans,
    _mean_of_channels,
    _one_line,
    _silenced_stderr,
)
from clipmill.audio.part import Part
from clipmill.errors import DecodeError

HELD_S = 60.0
"""Seconds of libsndfile's sound that wait until it is known whether the file is longer."""

_BLOCK = 1 << 18  # samples in a block, about

Mono = NDArray[np.float32]
Runs = Iterable[tuple[int, Mono]]


class ClipStream:
    """A sound file as int16 mono at `rate` Hz, in blocks of some seconds; to be iterated once."""

    def __init__(self, path: Path, rate: int) -> None:
        self.rate = rate
        self._source = _Source(path)

    @property
    def duration_s(self) -> float:
        """Seconds of the source handed on so far: its length, once the blocks have ended."""
        return self._source.given / (self._source.rate or 1)

    def __iter__(self) -> Generator[NDArray[np.int16], None, None]:
        """Yield int16 `[samples]`, together those of `prepare_clip` before its padding; see above where they differ.

        Raises:
            DecodeError: once the file proves to be bad, which may be at its end; carries the reason code.
        """
        blocks = _checked(self._source)
        first = next(blocks)  # or it raises: there is no sound without samples
        for block in _resampled(chain([first], blocks), self._source.rate, self.rate):
            # Of what was resampled: too large a sample is no finite number then.
            if not _finite(block):
                raise DecodeError(
                    "corrupt", "its samples are too large for any sound, and overflow when resampled"
                )
            yield to_int16(block)


class _Source:
    """A file's samples in mono, at the rate of the first.

    Attributes:
        rate: Hz; 0 until it is known.
        given: frames handed on so far.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rate, self.given = path, 0, 0

    def blocks(self) -> Iterator[Mono]:
        """libsndfile's, then FFmpeg's where libsndfile fails or its result is in doubt; as `decode` does."""
        _check_readable(self.path)
        try:
            held, doubt = yield from self._by_libsndfile()
        except (soundfile.SoundFileError, RuntimeError) as error:
            yield from self._by_ffmpeg(_one_line(error, self.path))
            return
        if doubt.any:
            yield from self._the_longer(held, doubt)
        elif held:
            yield self._give(_joined(held))

    def _give(self, block: Mono) -> Mono:
        self.given += len(block)
        return block

    def _by_libsndfile(self) -> Generator[Mono, None, tuple[list[Mono], _Doubt]]:
        """Hand on what libsndfile reads, but for up to a minute, which is returned with what is doubtful of it all."""
        held: list[Mono] = []
        with open(self.path, "rb") as raw, _opened(raw.fileno()) as file:
            self.rate = file.samplerate
            for block in _read(file):
                _check_rate(self.rate)  # which says how much is held
                held.append(block)
                if self.given or sum(map(len, held)) > HELD_S * self.rate:
                    yield self._give(_joined(held))
                    held = []
            read = self.given + sum(map(len, held))
            left = os.fstat(raw.fileno()).st_size - os.lseek(raw.fileno(), 0, os.SEEK_CUR)
            if file.format in _CHAINED and _leaves_unread(file.format, left):
                spans = _spans(self.path)
                if len(spans) > 1:
                    for block in self._rest(_chained(self.path, spans)):
                        yield self._give(block)
                    return [], _Doubt()
            return held, _doubt_of(self.path, file, read, left)

    def _by_ffmpeg(self, refusal: str) -> Iterator[Mono]:
        """Hand on what FFmpeg finds after what was given; `refusal` is what libsndfile said."""
        if not self.given:
            self.rate = 0
        try:
            for block in self._rest(_ffmpeg_runs(self.path)):
                yield self._give(block)
            rate = self.rate or 1
            # libsndfile opens no CAF that is cut.
            _check_whole(self.given / rate, (self.given + missing_frames(self.path)) / rate)
        except DecodeError as second:
            raise _by_both(refusal, second) from second

    def _the_longer(self, held: list[Mono], doubt: _Doubt) -> Iterator[Mono]:
        """Hand on what is held, or what FFmpeg finds in its place where that is more."""
        own, found = sum(map(len, held)), 0
        waiting: list[Mono] = []
        try:
            for block in self._rest(_ffmpeg_runs(self.path)):
                waiting.append(block)
                found += len(block)
                if found > own:
                    yield self._give(_joined(waiting))
                    waiting = []
        except DecodeError:
            if doubt.damaged or found > own:
                raise
        if held and found <= own:
            yield self._give(_joined(held))
        _check_whole(self.given / self.rate, doubt.promised_s, exact=doubt.damaged)

    def _rest(self, runs: Runs) -> Iterator[Mono]:
        """What of the runs comes after what was given, at the source's rate; at that of the first if it has none."""
        skip = self.given
        for rate, run in groupby(runs, key=itemgetter(0)):
            self.rate = self.rate or rate
            for block in _resampled(_gathered(mono for _, mono in run), rate, self.rate):
                if skip < len(block):
                    yield block[skip:]
                skip = max(skip - len(block), 0)


def _checked(source: _Source) -> Iterator[Mono]:
    """The source's blocks, each checked as `decode` checks the whole; at least one."""
    for block in source.blocks():
        _check_rate(source.rate)
        if not _finite(block):
            raise DecodeError("corrupt", "decodes to samples that are no finite numbers")
        yield block
    if not source.given:
        raise DecodeError("empty", "decodes to no samples")


def _check_rate(rate: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise DecodeError("corrupt", f"says its rate is {rate} Hz; allowed are {MIN_RATE} to {MAX_RATE}")


def _finite(block: Mono) -> bool:
    return not len(block) or bool(np.isfinite([block.min(), block.max()]).all())


def _resampled(blocks: Iterable[Mono], rate_from: int, rate_to: int) -> Iterator[Mono]:
    """The samples of `convert.resample`, but for how they are rounded, of blocks that follow each other."""
    if rate_from == rate_to:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate_from, rate_to, 1, dtype="float32", quality="HQ")
    taken = made = 0
    for block in blocks:
        taken += len(block)
        result = stream.resample_chunk(np.ascontiguousarray(block))
        made += len(result)
        if len(result):
            yield result
    if taken:
        left = max(-(-taken * rate_to // rate_from) - made, 0)
        last = stream.resample_chunk(np.zeros(0, np.float32), last=True)[:left]
        yield np.concatenate([last, np.zeros(left - len(last), np.float32)])


def _gathered(blocks: Iterable[Mono]) -> Iterator[Mono]:
    """Blocks joined to larger ones: a codec's frame holds some milliseconds."""
    waiting: list[Mono] = []
    samples = 0
    for block in blocks:
        waiting.append(block)
        samples += len(block)
        if samples >= _BLOCK:
            yield _joined(waiting)
            waiting, samples = [], 0
    if waiting:
        yield _joined(waiting)


def _opened(place: int | io.RawIOBase) -> soundfile.SoundFile:
    with _silenced_stderr():
        return soundfile.SoundFile(place, closefd=False)


def _read(file: soundfile.SoundFile) -> Iterator[Mono]:
    """The rest of an open file in blocks, mixed to mono."""
    most = max(_READ // file.channels, 1)
    while True:
        with _silenced_stderr():
            block = file.read(most, "float32", always_2d=True)
        if not len(block):
            return
        yield _mean_of_channels(block.T)


def _ffmpeg_runs(path: Path) -> Iterator[tuple[int, Mono]]:
    """Rate and mono samples of each of FFmpeg's frames; raises DecodeError as `decode` does."""
    import av

    av.logging.set_level(av.logging.PANIC)
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise DecodeError("no-audio", f"holds no audio stream (read as {container.format.name})")
            course = _Course()
            frames = _frames(container, path, course)
            yield from _without_surplus(frames, course) if _is_of(container, ("mp4",)) else frames
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise DecodeError("corrupt", _one_line(error, path)) from error


def _without_surplus(frames: Runs, course: _Course) -> Iterator[tuple[int, Mono]]:
    """Frames without those at the end of which the course says, once it is over, that they are no sound."""
    held: deque[tuple[int, Mono]] = deque()
    waiting = 0
    for frame in frames:
        held.append(frame)
        waiting += len(frame[1])
        while waiting - len(held[0][1]) >= _PACKET:
            waiting -= len(held[0][1])
            yield held.popleft()
    left = waiting - course.surplus
    for rate, mono in held:
        if left > 0:
            yield rate, mono[:left]
        left -= len(mono)


def _spans(path: Path) -> list[tuple[int, int]]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _link_spans(data)


def _chained(path: Path, spans: list[tuple[int, int]]) -> Iterator[tuple[int, Mono]]:
    """Rate and mono samples of the streams that follow each other in a file, by libsndfile."""
    for start, end in spans:
        with open(path, "rb", buffering=0) as raw, _opened(Part(raw, start, end)) as file:
            for block in _read(file):
                yield file.samplerate, block
