"""Stored features as clips: what `Shards` is for sound, with frames in the place of samples."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipmill.errors import DecodeError, ShardError
from clipmill.features import FRAMES_PER_S
from clipmill.features.spec import FeatureSpec
from clipmill.featurestore.files import TABLE, TABLE_FILE
from clipmill.shards.index import Index
from clipmill.shards.places import ShardSet
from clipmill.shards.read import Shards
from clipmill.shards.reader import Reader, Unread
from clipmill.stores import ReadFailure, Store


class StoredClips(Shards):
    """The clips of one or several entries: a stored feature is a clip of 128 "samples" a second, each of `bins` values.

    Labels, folds, groups, splits and keys are those of the sound, from the entry's copy of its index. `Entry.clips`
    makes one; the constructor joins the sets of several.

    Attributes:
        bins: values in a frame.
        dtype: of the values.
        silence: `[bins]` of `dtype`, what the feature makes of silence.

    Raises:
        ShardError: the sets hold different features.
    """

    bins: int

    def __init__(
        self,
        sets: Sequence[ShardSet],
        rows: NDArray[np.int64] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(sets, rows, labels)
        for part in self.sets[1:]:
            if other := _made(part).difference(_made(self.sets[0])):
                raise ShardError(
                    f"{part.store.place} does not hold the feature of {self.sets[0].store.place}: {other}"
                )
        self.silence = silence_of(self.sets[0])
        self.bins, self.dtype = len(self.silence), self.silence.dtype
        self.reader: FeatureReader = FeatureReader(self.sets)

    @property
    def spec(self) -> FeatureSpec:
        """Of the features; of several sets it is that of the first, and only the sound of the others may differ."""
        return FeatureSpec(**self.sets[0].info["features"]["spec"])

    @property
    def sound(self) -> list[str]:
        """Where the shards of sound lay that the features were computed from."""
        return [part.info["features"]["lineage"]["shards"] for part in self.sets]

    @property
    def sample_rate(self) -> int:
        """Frames a second."""
        return FRAMES_PER_S

    @property
    def samples(self) -> NDArray[np.int64]:
        """`[clips]`: length of each clip, in frames."""
        return self._once("samples", lambda: self.reader.frames(self.stored(np.arange(len(self)))))

    def light(self) -> StoredClips:
        """See `Shards.light`."""
        part = self._only
        info = {name: part.info[name] for name in ("name", "labels", "spec", "features")}
        rows = np.arange(len(self)) if self.columns.rows is None else self.columns.rows
        return StoredClips([ShardSet(part.store, info, part.index, part.files)], rows, self.labels)

    def decode_into(
        self, rows: NDArray[np.integer], files: Sequence[bytes], out: NDArray[Any]
    ) -> list[Unread]:
        """Raises ShardError: there are no sound files."""
        raise self._no_sound()

    def read(self, row: int) -> NDArray[Any]:
        """Raises ShardError: there is no sound."""
        raise self._no_sound()

    def facts(self, row: int) -> dict[str, Any]:
        """Raises ShardError: facts stand beside the sound."""
        raise self._no_sound()

    def _no_sound(self) -> ShardError:
        return ShardError(
            f"{self.place}: holds features, and this needs sound: `pipeline features show` says of which shards"
        )


class Chunk(NamedTuple):
    """Where a clip's feature lies.

    Attributes:
        file: name of its file.
        offset, length: of its bytes there; -1 where it has none.
        frames: how many it has.
        crc32: of its bytes.
        reason: why it has none; None where it has one.
    """

    file: str
    offset: int
    length: int
    frames: int
    crc32: int
    reason: str | None


class FeatureReader(Reader):
    """Reads stored features; in all else as `Reader`."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        super().__init__(sets)
        self._chunks: list[_Chunks | None] = [None] * len(self.sets)

    def read_into(
        self,
        rows: NDArray[np.int64],
        out: NDArray[Any],
        starts: NDArray[np.int64] | None = None,
        *,
        check: bool = False,
    ) -> list[Unread]:
        """Fill `out` `[clips, frames, bins]` with features from `starts` on (frames), silence behind a clip's end.

        Each clip is read whole, by one read, and its checksum compared, whatever `check` says. A clip that cannot be
        read leaves its place undefined and comes back with the reason; nothing is raised for it.
        """
        unread = []
        begins = np.zeros(len(rows), np.int64) if starts is None else starts
        for place, (row, start) in enumerate(zip(rows.tolist(), begins.tolist(), strict=True)):
            number = int(np.searchsorted(self.firsts, row, "right")) - 1
            part, chunks, own = self.sets[number], self._chunks_of(number), row - int(self.firsts[number])
            chunk = chunks.at(own)
            try:
                self._read(part.store, chunks, chunk, out[place], start)
            except (OSError, DecodeError) as error:
                path, key = part.store.path(chunk.file), part.index["key"][own].as_py()
                message = str(error).removeprefix(f"{path}: ")
                unread.append(Unread(place, key, path, getattr(error, "reason", "unreadable"), message))
        return unread

    def frames(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """`[clips]`: how many frames each clip has."""
        every = np.concatenate([self._chunks_of(number).frames for number in range(len(self.sets))])
        return every[rows]

    def _read(self, store: Store, chunks: _Chunks, chunk: Chunk, out: NDArray[Any], start: int) -> None:
        """Fill `out` `[frames, bins]` from a frame of a clip on.

        Raises:
            DecodeError: the clip has no feature, or is damaged.
            ReadFailure: its file is not there, or ends too early.
        """
        if chunk.reason is not None:
            raise DecodeError(chunk.reason, "has no feature; failures.jsonl beside it says why")
        bins, dtype = len(chunks.silence), chunks.silence.dtype
        if chunk.length != chunk.frames * bins * dtype.itemsize:
            raise DecodeError("corrupt", f"{chunk.length} bytes are not {chunk.frames} frames")
        count = min(max(chunk.frames - start, 0), len(out))
        target = out[:count]
        straight = count == chunk.frames and out.dtype == dtype and target.flags.c_contiguous
        view = target.reshape(-1).view(np.uint8).data if straight else self._scratch(chunk.length)
        found = store.read_into(chunk.file, chunk.offset, [view])
        if found != chunk.length:
            raise ReadFailure("corrupt", f"{found} of {chunk.length} bytes are there")
        if zlib.crc32(view) != chunk.crc32:
            raise DecodeError("corrupt", "its bytes are not those that were written")
        if not straight:
            target[:] = np.frombuffer(view, dtype).reshape(chunk.frames, bins)[start : start + count]
        out[count:] = chunks.silence

    def _chunks_of(self, number: int) -> _Chunks:
        with self._lock:
            chunks = self._chunks[number] = self._chunks[number] or _Chunks(self.sets[number])
            return chunks


class _Chunks:
    """Where the features of one entry lie, as arrays over its whole table.

    Attributes:
        frames: int64 `[clips]`.
        silence: `[bins]`, of the number type that values are kept in.
    """

    def __init__(self, part: ShardSet) -> None:
        self.silence = silence_of(part)
        index = Index(part.store.local(TABLE_FILE), TABLE)
        part.index["key"]  # wanted when something is wrong, and the index perhaps gone
        self._file, self._names = index.coded("file")
        self.frames: NDArray[np.int64] = index.read("frames").to_numpy()
        self._offset, self._length = (
            index.read(name).fill_null(-1).to_numpy() for name in ("offset", "length")
        )
        self._crc32 = index.read("crc32").fill_null(0).to_numpy()
        reasons = index.read("reason")
        lost = np.flatnonzero(reasons.is_valid().to_numpy())
        self._reasons = dict(zip(lost.tolist(), reasons.take(lost).to_pylist(), strict=True))

    def at(self, row: int) -> Chunk:
        return Chunk(
            self._names[self._file[row]],
            int(self._offset[row]),
            int(self._length[row]),
            int(self.frames[row]),
            int(self._crc32[row]),
            self._reasons.get(row),
        )


def silence_of(part: ShardSet) -> NDArray[Any]:
    """What the feature of a set makes of silence: `[bins]`, of the number type that its values are kept in."""
    stored = part.info["features"]
    return np.array(stored["silence"], np.dtype(stored["spec"]["dtype"]).newbyteorder("<"))


def _made(part: ShardSet) -> FeatureSpec:
    """What the features of a set are, whatever sound they are of."""
    return FeatureSpec(**{**part.info["features"]["spec"], "sound": {}})
