"""The two shard formats: how clips are laid out in a tar, and in an HDF5 file.

Both are written so that equal clips give equal bytes: fixed owner, mode and time,
members in the order given, no timestamps.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clipmill.audio import SUFFIXES, encode
from clipmill.shards.hdf5 import Place, places

if TYPE_CHECKING:
    import h5py


class ShardWriter(Protocol):
    """Writes clips one after the other; `close` returns where the audio of each landed: (offset, length) in bytes."""

    @staticmethod
    def encoded(samples: NDArray[np.int16], rate: int, encoding: str) -> bytes:
        """A clip's int16 `[samples]` as the bytes that the shard keeps of it."""
        ...

    def add(self, key: str, audio: bytes | memoryview, facts: dict[str, Any]) -> None:
        """Append a clip: what `encoded` gave, and the facts that go with it (JSON-able)."""
        ...

    def close(self) -> list[Place]:
        """Finish the file."""
        ...


class TarShard:
    """A WebDataset shard: `key.flac` (or `key.wav`) and `key.json` next to each other, in plain USTAR.

    Headers are tarfile's; webdataset's TarWriter gives the same bytes, but imports torch: half a
    gigabyte in every worker. Members go straight to the file: tarfile copies them in small pieces,
    which takes three times as long.
    """

    def __init__(self, path: Path, rate: int, encoding: str, labels: tuple[str, ...]) -> None:
        self._encoding = encoding
        self._file = open(path, "wb")  # noqa: SIM115 - `close` closes it
        self._end = 0
        self._places: list[Place] = []

    @staticmethod
    def encoded(samples: NDArray[np.int16], rate: int, encoding: str) -> bytes:
        """A whole FLAC or WAV file."""
        return encode(samples, rate, encoding)

    def add(self, key: str, audio: bytes | memoryview, facts: dict[str, Any]) -> None:
        """Append a clip's two members."""
        self._places.append((self._end + tarfile.BLOCKSIZE, len(audio)))
        self._member(f"{key}.{SUFFIXES[self._encoding]}", audio)
        self._member(f"{key}.json", json.dumps(facts, sort_keys=True, ensure_ascii=False).encode())

    def _member(self, name: str, data: bytes | memoryview) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o444, 0
        info.uname = info.gname = "clipmill"
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        for part in (info.tobuf(tarfile.USTAR_FORMAT), data, padding):
            self._end += self._file.write(part)

    def close(self) -> list[Place]:
        """Finish the tar: two empty blocks, and more up to a whole record."""
        end = self._end + 2 * tarfile.BLOCKSIZE
        with self._file:
            self._file.write(bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - self._end))
        return self._places


class Hdf5Shard:
    """An HDF5 shard with the fields that PANNs' readers know.

    audio_name  bytes `[clips]`, the keys
    waveform    int16 `[clips]` of `[samples]` each (their lengths differ), with --encoding pcm16
    flac        uint8 `[clips]` of a whole FLAC file each, instead, with --encoding flac
    target      bool `[clips, classes]`
    facts       JSON text `[clips]`, as in a tar's `key.json`

    Attributes: sample_rate (Hz), labels (JSON list of the class names).
    """

    def __init__(self, path: Path, rate: int, encoding: str, labels: tuple[str, ...]) -> None:
        import h5py

        self._disk = Disk(path)
        # Samples that begin at even places in memory are copied faster when they are read.
        self._file = h5py.File(
            self._disk, "w", libver=("v110", "v110"), alignment_threshold=4096, alignment_interval=64
        )
        self._rate, self._encoding, self._labels = rate, encoding, labels
        self._ids = {label: place for place, label in enumerate(labels)}
        self._keys: list[str] = []
        self._facts: list[str] = []
        self._targets: list[NDArray[np.bool_]] = []
        name, kind = ("waveform", "<i2") if encoding == "pcm16" else ("flac", "u1")
        # No clip's length is known in advance: grow by chunks, and trim at the end.
        self._audio = self._file.create_dataset(
            name, (0,), h5py.vlen_dtype(np.dtype(kind)), maxshape=(None,), chunks=(256,)
        )

    @staticmethod
    def encoded(samples: NDArray[np.int16], rate: int, encoding: str) -> bytes:
        """A whole FLAC file, or the samples as they are."""
        return samples.tobytes() if encoding == "pcm16" else encode(samples, rate, encoding)

    def add(self, key: str, audio: bytes | memoryview, facts: dict[str, Any]) -> None:
        """Append a clip."""
        place = len(self._keys)
        if place == len(self._audio):
            self._audio.resize((place + 256,))
        self._audio[place] = np.frombuffer(audio, "<i2" if self._encoding == "pcm16" else "u1")
        self._disk.check()
        self._keys.append(key)
        self._facts.append(json.dumps(facts, sort_keys=True, ensure_ascii=False))
        target = np.zeros(len(self._labels), bool)
        target[[self._ids[label] for label in facts["labels"]]] = True
        self._targets.append(target)

    def close(self) -> list[Place]:
        """Write the small fields and finish the file; readers then need no HDF5 library for the audio."""
        try:
            self._finish()
            return list(self._disk.places())
        finally:
            self._disk.close_after(self._file)

    def _finish(self) -> None:
        import h5py

        self._disk.check()
        clips = len(self._keys)
        self._audio.resize((clips,))
        width = max((len(key) for key in self._keys), default=1)
        self._file["audio_name"] = np.array([key.encode() for key in self._keys], f"S{width}")
        self._file["target"] = np.array(self._targets, bool).reshape(clips, len(self._labels))
        self._file.create_dataset("facts", data=self._facts, shape=(clips,), dtype=h5py.string_dtype())
        self._file.attrs["sample_rate"] = self._rate
        self._file.attrs["labels"] = json.dumps(self._labels, ensure_ascii=False)
        self._file.close()


class Disk:
    """A file for HDF5 to write to that never fails under it: left to itself, HDF5 ends the process on a full disk.

    What cannot be written is dropped, and the error is raised by `check` and `close`.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w+b")  # noqa: SIM115 - `close` closes it
        self._error: OSError | None = None
        self.seek, self.tell = self._file.seek, self._file.tell
        self.read, self.readinto = self._file.read, self._file.readinto

    def write(self, data: memoryview) -> int:
        """Write, or remember why not."""
        self._try(lambda: self._file.write(data))
        return len(data)

    def flush(self) -> None:
        """Flush, or remember why not."""
        self._try(self._file.flush)

    def truncate(self, size: int) -> int:
        """Truncate, or remember why not."""
        self._try(lambda: self._file.truncate(size))
        return size

    def _try(self, do: Callable[[], Any]) -> None:
        if self._error is None:
            try:
                do()
            except OSError as error:
                self._error = error

    def check(self) -> None:
        """Raise the first error."""
        if self._error is not None:
            raise self._error

    def places(self) -> list[Place]:
        """Where the audio of each clip lies in the finished file; raises the first error."""
        self._try(self._file.flush)
        self.check()
        found = places(self._file)
        assert found is not None, "plain lists in one file always have places"
        return found

    def close_after(self, writer: h5py.File) -> None:
        """Close HDF5's file, if it still is open, and this one; raise the first error.

        HDF5 closes what was left open when the process ends, and crashes where there is no file under it any more.
        """
        try:
            writer.close()
        finally:
            self._try(self._file.close)
            self.check()


WRITERS: dict[str, type[TarShard] | type[Hdf5Shard]] = {"webdataset": TarShard, "hdf5": Hdf5Shard}
