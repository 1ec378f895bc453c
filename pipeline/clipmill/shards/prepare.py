"""One clip, from its source to the bytes that its shard keeps, in a process that may hang, crash or run out of memory.

Decoders are C libraries fed with whatever the world uploads. So they run in a process beside
the one that writes the shard, one clip after the other, each within limits of time and memory:
what goes wrong there costs that clip alone.
"""

from __future__ import annotations

import atexit
import hashlib
import mmap
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmill.audio import measure, prepare_clip
from clipmill.errors import DecodeError, RunError
from clipmill.run import Crew
from clipmill.shards.formats import WRITERS
from clipmill.sources import opened
from clipmill.types import Clip

if TYPE_CHECKING:
    from clipmill.shards.plan import ShardSpec

_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS)
"""The signals that a process brings upon itself."""

_CRASHES = 2
"""So often a clip may take its decoder down before it is the clip's fault."""

_KILLS = 5
"""So often its decoder may be killed by others: SIGKILL comes from the machine, short of memory, or from people."""

_STARTS = 5
"""So often a decoder may fail to start, before that is the machine's fault."""

_CLIPS_A_PROCESS = 20_000
"""Then it is replaced, whatever its libraries leaked."""


@dataclass(frozen=True)
class Limits:
    """What one clip may cost: seconds of wall time, and megabytes of memory beside what a decoder needs anyway."""

    seconds: float = 120.0
    memory_mb: int = 2000


@dataclass(frozen=True)
class Ready:
    """A clip as its shard keeps it: its encoded audio, and its facts, the index columns that it decides itself.

    Of a clip that `prepare` gives, the audio stays as it is until the next one is prepared.
    """

    audio: bytes | memoryview
    facts: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """Why a clip cannot be had: one of `clipmill.types.REASONS`, and the story."""

    reason: str
    message: str


@dataclass(frozen=True)
class _Order:
    clip: Clip
    media_root: Path
    spec: ShardSpec
    table: str


def prepare(clip: Clip, media_root: Path, spec: ShardSpec, limits: Limits) -> Ready | Refused:
    """Decode, mix, resample, measure, pad and encode a clip, in this thread's decoder process.

    Raises:
        RunError: that process does not start.
    """
    decoder = _decoder(limits)
    deaths: dict[bool, int] = {True: 0, False: 0}
    starts = 0
    while True:
        answer = decoder.crew.ask(_Order(clip, media_root, spec, decoder.table.path), limits.seconds)
        if isinstance(answer, tuple):
            return Ready(decoder.table.taken(answer[0]), answer[1])
        if isinstance(answer, Refused):
            return answer
        if not answer.begun:
            starts += 1
            if starts == _STARTS:
                raise RunError(f"the decoder does not start: {answer.message}")
            time.sleep(0.1 * 2**starts)
            continue
        if answer.reason == "timeout":
            return Refused("timeout", f"took longer than the {limits.seconds:g} s of --clip-timeout")
        killed = answer.signal is not None and answer.signal not in _FAULTS
        deaths[killed] += 1
        if deaths[False] == _CRASHES:
            return Refused("crash", f"its decoder died of it, {_CRASHES} times ({_name(answer.signal)})")
        if deaths[True] == _KILLS:
            return Refused(
                "memory", f"its decoder was killed {_KILLS} times, as when a machine has no memory left"
            )
        if killed:
            time.sleep(0.1 * 2 ** deaths[True])


def _name(number: int | None) -> str:
    return signal.Signals(number).name if number else "it ended by itself"


class _Table:
    """Memory that two processes share, for one clip's audio at a time: through a pipe it would be copied four times."""

    def __init__(self, path: str | None = None) -> None:
        self._file = os.memfd_create("clip") if path is None else os.open(path, os.O_RDWR)
        self.path = path or f"/proc/{os.getpid()}/fd/{self._file}"
        self._map: mmap.mmap | None = None

    def put(self, data: bytes) -> int:
        """Lay bytes on the table; returns how many."""
        if os.fstat(self._file).st_size < len(data):
            os.ftruncate(self._file, 2 * len(data))
        self._mapped(len(data))[: len(data)] = data
        return len(data)

    def taken(self, count: int) -> memoryview:
        """So many bytes from the table, as they lie there."""
        return memoryview(self._mapped(count))[:count]

    def _mapped(self, count: int) -> mmap.mmap:
        if self._map is None or len(self._map) < count:
            self._map = mmap.mmap(self._file, 0)
        return self._map


@dataclass(frozen=True)
class _Decoder:
    limits: Limits
    process: int
    table: _Table
    crew: Crew[_Order]


_mine = threading.local()


def _decoder(limits: Limits) -> _Decoder:
    """The decoder process of this thread, from its last shard, or a new one."""
    held: _Decoder | None = getattr(_mine, "decoder", None)
    if held is None or (held.process, held.limits) != (os.getpid(), limits):
        if held is not None and held.process == os.getpid():
            held.crew.close()
        crew = Crew(_ready, 1, memory_mb=limits.memory_mb, renew_after=_CLIPS_A_PROCESS)
        atexit.register(crew.close)
        _mine.decoder = held = _Decoder(limits, os.getpid(), _Table(), crew)
    return held


_table = lru_cache(maxsize=1)(_Table)


def _ready(order: _Order) -> tuple[int, dict[str, Any]] | Refused:
    """In the decoder's process: the size of the audio that lies on the table, and the facts; or why not."""
    try:
        audio, facts = _made_ready(order.clip, order.media_root, order.spec)
        return _table(order.table).put(audio), facts
    except DecodeError as error:
        return Refused(error.reason, str(error))
    except MemoryError:
        return Refused("memory", "needs more memory than --clip-memory allows")
    except FileNotFoundError:  # of a library: it was there when it was looked for
        return Refused("missing", "the file vanished while it was read")
    except Exception as error:  # of a library, at what nobody has fed it yet
        return Refused("tool-error", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _made_ready(clip: Clip, media_root: Path, spec: ShardSpec) -> tuple[bytes, dict[str, Any]]:
    with opened(media_root, clip.source) as path:
        sound = prepare_clip(path, spec.sample_rate, clip.start_s, clip.end_s, decoder=spec.decoder)
    content = sound.samples[: sound.content]
    if not spec.keep_silent and not content.any():
        raise DecodeError(
            "silent",
            f"nothing in {sound.duration_s:.2f} s reaches the last of 16 bits; --keep-silent keeps such clips",
        )
    facts = asdict(clip)
    del facts["bytes"]  # it says whether the source has changed, and nothing of the clip
    row = facts | {
        "labels": list(clip.labels),
        "samples": len(sound.samples),
        "sha256": hashlib.sha256(sound.samples.data).hexdigest(),
        "duration_s": sound.duration_s,
        "source_rate": sound.source_rate,
        "source_channels": sound.source_channels,
        **measure(content, spec.sample_rate),
    }
    return WRITERS[spec.format].encoded(sound.samples, spec.sample_rate, spec.encoding), row
