"""The samples of clips, from wherever they lie: one positioned read a clip, decoded into the caller's array."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmill.audio import decode_flac_into, prepare_bytes, to_int16
from clipmill.audio.header import read_header
from clipmill.errors import DecodeError, ShardError
from clipmill.shards.places import Job, Places, ShardSet
from clipmill.stores import ReadFailure

_HEAD = 512  # bytes of a sound file that hold its header
_FLAC_TOTAL, _FLAC_TOTAL_BITS = slice(21, 26), (1 << 36) - 1  # STREAMINFO's count of samples (RFC 9639, 8.2)
_HDF5_FILES = 32  # that only the library reads, kept open
_HDF5_LOCK = threading.Lock()  # the library lets one thread in at a time, and some builds crash when two try


@dataclass(frozen=True)
class Unread:
    """A clip that could not be read: its place in the batch, its names, a reason code of `types.REASONS`, and more."""

    place: int
    key: str
    shard: str
    reason: str
    message: str


class Reader:
    """Reads clips of several sets; rows count through all of their indexes, one after the other. Safe for threads."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.sets = tuple(sets)
        self.firsts = np.cumsum([0, *(part.index.num_rows for part in self.sets)])
        self._places: list[Places | None] = [None] * len(self.sets)
        self._lock = threading.Lock()
        self._local = threading.local()
        self._hdf5: dict[tuple[int, str], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"sets": self.sets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read_into(
        self,
        rows: NDArray[np.int64],
        out: NDArray[np.int16],
        starts: NDArray[np.int64] | None = None,
        *,
        check: bool = False,
    ) -> list[Unread]:
        """Fill `out` `[clips, samples]` with clips from `starts` on (samples), zeros behind a clip's end.

        `check` compares the whole clip's samples with the sha256 in the index. A clip that cannot be
        read leaves its row undefined and comes back with the reason; nothing is raised for it.
        """
        unread: list[Unread] = []
        for part, jobs in self.jobs(rows, out, starts):
            # What only the HDF5 library finds is read through it, one by one.
            hidden, plain = [job for job in jobs if job.offset < 0], [job for job in jobs if job.offset >= 0]
            for job in hidden:
                with _told(unread, part, job):
                    self._fill(part, job, self.by_hdf5(part, job), check)
            (self._near if part.store.near else self._far)(part, plain, check, unread)
        return sorted(unread, key=lambda one: one.place)

    def decode_into(
        self, rows: NDArray[np.int64], files: Sequence[bytes], out: NDArray[np.int16]
    ) -> list[Unread]:
        """The same for whole clips whose sound files, as a tar has them, are there already."""
        unread: list[Unread] = []
        for part, jobs in self.jobs(rows, out, None):
            for job in jobs:
                with _told(unread, part, job):
                    self.decode(
                        part, job, _bare(files[job.place]) if job.raw else memoryview(files[job.place]), False
                    )
        return sorted(unread, key=lambda one: one.place)

    def jobs(
        self, rows: NDArray[np.int64], out: NDArray[np.int16], starts: NDArray[np.int64] | None
    ) -> Iterator[tuple[ShardSet, list[Job]]]:
        """What is to be read of each set; see `Places.jobs`."""
        which = np.searchsorted(self.firsts, rows, "right") - 1
        for number in np.unique(which).tolist():
            with self._lock:
                places = self._places[number] = self._places[number] or Places.of(self.sets[number])
            at = np.flatnonzero(which == number)
            begins = np.zeros(len(at), np.int64) if starts is None else starts[at]
            yield self.sets[number], places.jobs(at, rows[at] - self.firsts[number], begins, out)

    def decode(self, part: ShardSet, job: Job, data: memoryview, check: bool) -> None:
        """Fill the job's target from the bytes that were read for it.

        Raises:
            DecodeError: they are damaged, or not what the index says.
        """
        if job.raw:
            samples = np.frombuffer(data, "<i2")
            if not check and len(samples) == len(job.target):
                job.target[:] = samples
                return
        elif job.codec == "flac":
            total = int.from_bytes(data[_FLAC_TOTAL], "big") & _FLAC_TOTAL_BITS
            if total != job.samples:
                raise DecodeError("corrupt", f"{total} samples where the index says {job.samples}")
            try:
                if not check:
                    decode_flac_into(data, job.target, job.start, job.samples)
                    return
                samples = np.empty(job.samples, np.int16)
                decode_flac_into(data, samples)
            except DecodeError:
                if "foreign" not in part.info:
                    raise
                # Others' encoders make what dr_flac does not know; what is damaged libsndfile refuses too.
                samples = prepare_bytes(bytes(data), part.info["spec"]["sample_rate"])[: job.samples]
        else:
            samples = prepare_bytes(bytes(data), part.info["spec"]["sample_rate"])
        self._fill(part, job, samples, check)

    def by_hdf5(self, part: ShardSet, job: Job) -> NDArray[np.int16]:
        """A whole clip as the HDF5 library gives it: where others compressed the waveforms.

        Raises:
            DecodeError: it is damaged there.
            ReadFailure: the shard is not there.
        """
        path = self._hdf5_path(part, job.name)
        with _HDF5_LOCK:
            try:
                file = self._hdf5_file(path)
                found = file["waveform" if "waveform" in file else "flac"][part.index["row"][job.row].as_py()]
            except (OSError, KeyError, ValueError, IndexError, RuntimeError) as error:
                raise DecodeError("corrupt", str(error)) from error
        if found.dtype == np.uint8:
            return prepare_bytes(found.tobytes(), part.info["spec"]["sample_rate"])
        whole = to_int16(found) if np.issubdtype(found.dtype, np.floating) else found.astype(np.int16)
        return np.pad(whole, (0, max(job.samples - len(whole), 0)))

    def bytes_at(self, row: int, name: str, offset: int, length: int) -> bytes:
        """Bytes of the shard called `name` in the set that `row` belongs to.

        Raises:
            ReadFailure: they cannot be had.
        """
        found = self._set_of(row).store.fetch([(name, offset, length)])[0]
        if isinstance(found, ReadFailure):
            raise found
        return found

    def hdf5_item(self, row: int, name: str, field: str, place: int) -> Any:
        """One item of a field of the HDF5 shard called `name` in the set of `row`; raises what h5py does."""
        part = self._set_of(row)
        path = self._hdf5_path(part, name)
        with _HDF5_LOCK:
            return self._hdf5_file(path)[field][place]

    def close(self) -> None:
        """Close the files that this process opened."""
        with _HDF5_LOCK:
            for file in self._hdf5.values():
                file.close()
            self._hdf5 = {}
        for part in self.sets:
            part.store.close()

    def _near(self, part: ShardSet, jobs: list[Job], check: bool, unread: list[Unread]) -> None:
        """Clip by clip; bare samples straight to where they are wanted."""
        for job in jobs:
            with _told(unread, part, job):
                name, offset, length = job.stretch(check)
                straight = job.raw and not check
                view = job.target.data.cast("B") if straight else self._scratch(length)
                found = part.store.read_into(name, offset, [view])
                if found != length:
                    raise ReadFailure("corrupt", f"{found} of {length} bytes are there")
                if not straight:
                    self.decode(part, job, view, check)

    def _far(self, part: ShardSet, jobs: list[Job], check: bool, unread: list[Unread]) -> None:
        """All clips' bytes under way at once, then decoded."""
        wanted = []
        for job in jobs:
            with _told(unread, part, job):
                # What a cache is to keep is asked for in the same pieces each time.
                wanted.append((job, job.stretch(check or part.store.keeps)))
        found = part.store.fetch([stretch for _, stretch in wanted])
        for (job, _), data in zip(wanted, found, strict=True):
            with _told(unread, part, job):
                if isinstance(data, ReadFailure):
                    raise data
                self.decode(part, job, memoryview(data), check)

    def _fill(self, part: ShardSet, job: Job, samples: NDArray[np.int16], check: bool) -> None:
        """Fill the job's target from the whole clip."""
        if len(samples) != job.samples:
            raise DecodeError("corrupt", f"{len(samples)} samples where the index says {job.samples}")
        if check:
            expected = part.index["sha256"][job.row].as_py()
            if expected and hashlib.sha256(samples.data).hexdigest() != expected:
                raise DecodeError("corrupt", "its samples are not those recorded")
        job.target[:] = samples[job.start : job.start + len(job.target)]

    def _scratch(self, length: int) -> memoryview:
        """`length` bytes that this thread may use until it asks again."""
        kept = getattr(self._local, "bytes", None)
        if kept is None or len(kept) < length:
            kept = self._local.bytes = memoryview(bytearray(max(length, 1 << 20)))
        return kept[:length]

    def _set_of(self, row: int) -> ShardSet:
        return self.sets[int(np.searchsorted(self.firsts, row, "right")) - 1]

    def _hdf5_path(self, part: ShardSet, name: str) -> Path:
        """Where the shard is on this machine, copied first where it is far: the library must wait for no store."""
        try:
            return part.store.local(name)
        except ShardError as error:
            raise (
                error.__cause__
                if isinstance(error.__cause__, ReadFailure)
                else ReadFailure("missing", str(error))
            ) from error

    def _hdf5_file(self, path: Path) -> Any:
        import h5py

        key = (os.getpid(), str(path))  # a forked process must not share its parent's handles
        if key not in self._hdf5:
            if len(self._hdf5) == _HDF5_FILES:
                self._hdf5.pop(next(iter(self._hdf5))).close()
            self._hdf5[key] = h5py.File(path, "r")
        return self._hdf5[key]


@contextmanager
def _told(unread: list[Unread], part: ShardSet, job: Job) -> Iterator[None]:
    """Whatever keeps this clip from being read goes on the list."""
    try:
        yield
    except (OSError, DecodeError) as error:
        reason = getattr(error, "reason", "unreadable")
        shard, key = part.store.path(job.name), part.index["key"][job.row].as_py()
        unread.append(Unread(job.place, key, shard, reason, str(error).removeprefix(f"{shard}: ")))


def _bare(file: bytes) -> memoryview:
    """The samples of a WAV file of 16 bits and one channel."""
    header = read_header(file[:_HEAD], len(file))
    if header is None or header.plain != "pcm16":
        raise DecodeError("corrupt", "is no WAV of 16 bits and one channel")
    return memoryview(file)[header.offset : header.offset + header.length]
