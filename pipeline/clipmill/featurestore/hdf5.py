"""The HDF5 file of one shard's features: clips of one length are one dataset, whose chunks are the clips.

    feature_640   float16 or float32 [clips, frames, bins], here of 640 frames; a chunk is a clip, and is not compressed
    key_640       bytes [clips], their keys

Attributes: feature, unit, frames_per_s, spec (canonical JSON). Any HDF5 reader reads it; `StoredClips` reads a chunk
from its place in the file, without the library. Equal features give equal bytes: no times are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipmill.features import FRAMES_PER_S
from clipmill.features.spec import FeatureSpec
from clipmill.shards.formats import Disk

if TYPE_CHECKING:
    import h5py

FEATURE, KEY = "feature_", "key_"
"""What the datasets' names begin with; the frames follow."""


class FeatureFile:
    """Writes one; clips of one length come one after the other.

    Args:
        path: of the file.
        spec: of the feature; its dtype is that of the values.
        unit: of the values.
        bins: values in a frame.
    """

    def __init__(self, path: Path, spec: FeatureSpec, unit: str, bins: int) -> None:
        import h5py

        self._disk = Disk(path)
        # Values that begin at even places in memory are copied faster when they are read.
        self._file = h5py.File(
            self._disk, "w", libver=("v110", "v110"), alignment_threshold=4096, alignment_interval=64
        )
        said = {"feature": spec.feature, "unit": unit, "frames_per_s": FRAMES_PER_S, "spec": spec.json}
        for name, value in said.items():
            self._file.attrs[name] = value
        self._dtype, self._bins = np.dtype(spec.dtype).newbyteorder("<"), bins
        self._keys: dict[int, list[str]] = {}

    def add(self, keys: Sequence[str], values: NDArray[Any]) -> None:
        """Append clips of one length: `[clips, frames, bins]`, contiguous.

        Raises:
            OSError: the disk is full, or does not let us write.
        """
        frames = values.shape[1]
        if frames not in self._keys:
            self._keys[frames] = []
            # How many can be had is not known in advance.
            made = self._file.create_dataset(
                f"{FEATURE}{frames}",
                (0, frames, self._bins),
                self._dtype,
                maxshape=(None, frames, self._bins),
                chunks=(1, frames, self._bins),
            )
            for axis, name in zip(made.dims, ("clip", "frame", "bin"), strict=True):
                axis.label = name
        dataset, first = self._file[f"{FEATURE}{frames}"], len(self._keys[frames])
        dataset.resize(first + len(keys), axis=0)
        for place, clip in enumerate(values, first):
            dataset.id.write_direct_chunk((place, 0, 0), clip)
            self._disk.check()
        self._keys[frames] += keys

    def close(self) -> dict[str, int]:
        """Finish the file; returns for each clip's key where its bytes begin.

        Raises:
            OSError: the disk is full, or does not let us write.
        """
        try:
            self._disk.check()
            places: dict[str, int] = {}
            for frames, keys in self._keys.items():
                places |= dict(zip(keys, chunk_places(self._file[f"{FEATURE}{frames}"]), strict=True))
                width = max(map(len, keys), default=1)
                self._file[f"{KEY}{frames}"] = np.array([key.encode() for key in keys], f"S{width}")
            self._file.close()
            return places
        finally:
            self._disk.close_after(self._file)


def chunk_places(dataset: h5py.Dataset) -> list[int]:
    """Where each chunk of a dataset `[clips, frames, bins]` begins in the file, in the order of its clips."""
    places: dict[int, int] = {}

    def note(chunk: Any) -> None:
        places[chunk.chunk_offset[0]] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    return [places[clip] for clip in range(len(dataset))]
