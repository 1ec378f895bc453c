"""Where the clips of a set of shards lie, and which of their samples are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipmill.errors import DecodeError
from clipmill.shards.index import Index
from clipmill.stores import Store

_WAV_HEADER = 44  # bytes before the samples of the WAVs that `audio.encode` makes


@dataclass(frozen=True)
class ShardSet:
    """One folder of shards.

    Attributes:
        store: where its files lie.
        info: what dataset.json says, or what stands for it where others made the shards.
        index: of all clips of the folder.
        files: names of the shards that were asked for.
    """

    store: Store
    info: dict[str, Any]
    index: Index
    files: tuple[str, ...]


class Job(NamedTuple):
    """One clip to read.

    Attributes:
        place: in the batch.
        row: in its set's index.
        name: of its shard.
        offset, length: of its bytes there; -1 where only the HDF5 library finds them.
        samples: how many it has, before zeros that the reader adds.
        codec: "pcm16" (bare samples) or "flac", mono, of 16 bits and at the set's rate; "hdf5"; or a dot and
            the extension of any sound file.
        start: the first sample that is wanted.
        target: int16, to be filled from there.
    """

    place: int
    row: int
    name: str
    offset: int
    length: int
    samples: int
    codec: str
    start: int
    target: NDArray[np.int16]

    @property
    def raw(self) -> bool:
        """Whether its bytes are its samples."""
        return self.codec == "pcm16" and self.offset >= 0

    def stretch(self, whole: bool) -> tuple[str, int, int]:
        """Name, offset and length of the bytes to read: of bare samples those wanted alone, unless all are.

        Raises:
            DecodeError: there are not as many bytes as samples need.
        """
        if not self.raw:
            return self.name, self.offset, self.length
        if self.length != 2 * self.samples:
            raise DecodeError(
                "corrupt", f"{self.length} bytes, where {self.samples} samples take {2 * self.samples}"
            )
        if whole:
            return self.name, self.offset, self.length
        return self.name, self.offset + 2 * self.start, 2 * len(self.target)


@dataclass(frozen=True)
class Places:
    """Where the clips of one set lie, as arrays over its whole index; offset -1: only the HDF5 library finds it.

    `samples` are those that are there, without zeros that the reader adds.
    """

    names: list[str]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    samples: NDArray[np.int64]
    codecs: list[str]
    codec: NDArray[np.int32]

    @classmethod
    def of(cls, part: ShardSet) -> Places:
        """Read from the index; the keys too, which are wanted when something is wrong, and the index perhaps gone."""
        index = part.index
        index["key"]
        file, names = index.coded("shard")
        offset, length = (index.read(name).fill_null(-1).to_numpy() for name in ("offset", "length"))
        samples = index.read("samples").to_numpy()
        if "codec" in index.column_names:
            codec, codecs = index.coded("codec")
            # Ours end in the zeros that `samples` counts; what others keep as it is ends where its sound does.
            frames = np.rint(index.read("duration_s").to_numpy() * part.info["spec"]["sample_rate"]).astype(
                np.int64
            )
            plain = np.isin(codec, [k for k, name in enumerate(codecs) if name in ("flac", "pcm16")])
            return cls(names, file, offset, length, np.where(plain, frames, samples), codecs, codec)
        spec = part.info["spec"]
        if spec["encoding"] == "pcm16" and spec["format"] == "webdataset":
            # Header and samples, as they were written: anything else is read as damage.
            offset, length = offset + _WAV_HEADER, length - _WAV_HEADER
        return cls(names, file, offset, length, samples, [spec["encoding"]], np.zeros(len(file), np.int32))

    def jobs(
        self,
        places: NDArray[np.int64],
        rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        out: NDArray[np.int16],
    ) -> list[Job]:
        """The clips at `rows`, each from its start on, to go to `places` of `out` `[batch, samples]`.

        What lies behind a clip's end is zeros already.
        """
        counts = np.clip(self.samples[rows] - starts, 0, out.shape[1])
        columns = (self.file, self.offset, self.length, self.samples, self.codec)
        jobs = []
        for place, row, start, count, file, offset, length, samples, codec in zip(
            *(array.tolist() for array in (places, rows, starts, counts)),
            *(column[rows].tolist() for column in columns),
            strict=True,
        ):
            out[place, count:] = 0
            jobs.append(
                Job(
                    place,
                    row,
                    self.names[file],
                    offset,
                    length,
                    samples,
                    self.codecs[codec],
                    start,
                    out[place, :count],
                )
            )
        return jobs
