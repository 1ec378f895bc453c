"""The two shard formats: how clips are laid out in a tar, and in an HDF5 file.

Both are written so that equal clips give equal bytes: fixed owner, mode and time,
members in the order given, no timestamps.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clipmill.audio import SUFFIXES, encode


class ShardWriter(Protocol):
    """Writes clips one after the other; `close` returns where each landed: (offset, length) or (None, None)."""

    def add(self, key: str, samples: NDArray[np.int16], facts: dict[str, Any]) -> None:
        """Append a clip: int16 `[samples]`, and the facts that go with it (JSON-able)."""
        ...

    def close(self) -> list[tuple[int | None, int | None]]:
        """Finish the file."""
        ...


class TarShard:
    """A WebDataset shard: `key.flac` (or `key.wav`) and `key.json` next to each other, in plain USTAR.

    Written by tarfile rather than webdataset's TarWriter, which gives the same bytes but
    imports torch: half a gigabyte in every worker.
    """

    def __init__(self, path: Path, rate: int, encoding: str, labels: tuple[str, ...]) -> None:
        self._rate, self._encoding = rate, encoding
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - `close` closes it
        self._places: list[tuple[int | None, int | None]] = []

    def add(self, key: str, samples: NDArray[np.int16], facts: dict[str, Any]) -> None:
        """Append a clip's two members."""
        audio = encode(samples, self._rate, self._encoding)
        self._member(f"{key}.{SUFFIXES[self._encoding]}", audio)
        # The tar's position is now past the audio and its padding to whole blocks of 512.
        self._places.append((self._tar.offset - -(-len(audio) // 512) * 512, len(audio)))
        self._member(f"{key}.json", json.dumps(facts, sort_keys=True, ensure_ascii=False).encode())

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o444, 0
        info.uname = info.gname = "clipmill"
        self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> list[tuple[int | None, int | None]]:
        """Finish the tar."""
        self._tar.close()
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

        # Built in memory: HDF5 itself, when the disk fills up under it, ends the whole process.
        self._path, self._bytes = path, io.BytesIO()
        self._file = h5py.File(self._bytes, "w", libver=("v110", "v110"))
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

    def add(self, key: str, samples: NDArray[np.int16], facts: dict[str, Any]) -> None:
        """Append a clip."""
        place = len(self._keys)
        if place == len(self._audio):
            self._audio.resize((place + 256,))
        pcm = self._encoding == "pcm16"
        self._audio[place] = samples if pcm else np.frombuffer(encode(samples, self._rate, "flac"), np.uint8)
        self._keys.append(key)
        self._facts.append(json.dumps(facts, sort_keys=True, ensure_ascii=False))
        target = np.zeros(len(self._labels), bool)
        target[[self._ids[label] for label in facts["labels"]]] = True
        self._targets.append(target)

    def close(self) -> list[tuple[int | None, int | None]]:
        """Write the small fields and finish the file."""
        import h5py

        clips = len(self._keys)
        self._audio.resize((clips,))
        width = max((len(key) for key in self._keys), default=1)
        self._file["audio_name"] = np.array([key.encode() for key in self._keys], f"S{width}")
        self._file["target"] = np.array(self._targets, bool).reshape(clips, len(self._labels))
        self._file.create_dataset("facts", data=self._facts, shape=(clips,), dtype=h5py.string_dtype())
        self._file.attrs["sample_rate"] = self._rate
        self._file.attrs["labels"] = json.dumps(self._labels, ensure_ascii=False)
        self._file.close()
        self._path.write_bytes(self._bytes.getbuffer())
        return [(None, None)] * clips


WRITERS: dict[str, type[TarShard] | type[Hdf5Shard]] = {"webdataset": TarShard, "hdf5": Hdf5Shard}
