"""Where each clip's bytes lie in an HDF5 file, so that one read of the file gives a clip.

HDF5 reads one thing at a time in a process; plain reads of the file run side by side, and far ones are range
requests. The layouts are those of the HDF5 File Format Specification: a list of variable length is a reference into
a global heap collection (III.E), whose objects follow each other; an array stands whole, or in chunks.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import h5py

Place = tuple[int, int]
"""Where a clip's audio begins in the file, and its length, both in bytes."""

AUDIO = ("waveform", "flac")
"""The datasets that audio is kept in, as samples or as whole FLAC files; a file has one of them."""

_WIDTH = 8  # bytes of an address and of a size in the file: what the library writes unless told otherwise
_REFERENCE = np.dtype([("items", "<u4"), ("address", "<u8"), ("object", "<u4")])
_COLLECTION = struct.Struct("<4sB3xQ")  # signature, version, size with this header
_OBJECT = struct.Struct("<HHIQ")  # index, count of references, reserved, bytes of data
_SIGNATURE, _VERSION = b"GCOL", 1


def places(file: BinaryIO) -> list[Place] | None:
    """Where the audio of each clip lies in an HDF5 file, in the order of its rows.

    Of `waveform` these are little-endian int16 samples, either lists of variable length `[clips]` or an array
    `[clips, samples]`; of `flac`, whole FLAC files. A clip without a single item has the place (0, 0).

    Args:
        file: an HDF5 file, whole on the disk; it can seek.

    Returns:
        None where a clip is no one stretch of the file that could be used as it is: compressed, of another
        number type, cut up by chunks, kept in another file, or not within this one. h5py reads those.

    Raises:
        OSError: it is no HDF5 file, or cannot be read.
        KeyError: it has neither `waveform` nor `flac`.
    """
    import h5py

    with h5py.File(file, "r") as opened:
        name = audio_name(opened)
        dataset = opened[name]
        if not _is_plain(opened, dataset):
            return None
        items = h5py.check_vlen_dtype(dataset.dtype)
        if (dataset.dtype if items is None else items) != np.dtype("<i2" if name == "waveform" else "u1"):
            return None
        found = _rows(dataset) if items is None else _lists(file, dataset, items.itemsize)
    size = file.seek(0, os.SEEK_END)
    return found if found is not None and all(start + length <= size for start, length in found) else None


def audio_name(file: h5py.File) -> str:
    """Which dataset of an HDF5 file holds the audio, one of `AUDIO`.

    Raises:
        KeyError: none does; says what there is.
    """
    name = next((name for name in AUDIO if name in file), None)
    if name is None:
        raise KeyError(f"holds {', '.join(file) or 'nothing'}, where `waveform` or `flac` is needed")
    return name


def _is_plain(file: h5py.File, dataset: h5py.Dataset) -> bool:
    """Whether the dataset's bytes stand unfiltered in this file, which has the usual addresses."""
    return (
        file.userblock_size == 0
        and file.id.get_create_plist().get_sizes() == (_WIDTH, _WIDTH)
        and dataset.id.get_create_plist().get_nfilters() == 0
        and not dataset.is_virtual
        and dataset.external is None
    )


def _rows(dataset: h5py.Dataset) -> list[Place] | None:
    """The rows of an array `[clips, samples]`, where each is one stretch."""
    if dataset.ndim != 2:
        return None
    clips, samples = dataset.shape
    length = samples * dataset.dtype.itemsize
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        return None if start is None else [(start + row * length, length) for row in range(clips)]
    rows, columns = dataset.chunks
    starts = _chunk_starts(dataset)
    if columns < samples or len(starts) < -(-clips // rows):
        return None
    stride = columns * dataset.dtype.itemsize
    return [(starts[row - row % rows] + row % rows * stride, length) for row in range(clips)]


def _chunk_starts(dataset: h5py.Dataset) -> dict[int, int]:
    """The first row of each chunk that was written -> where the chunk begins in the file."""
    starts: dict[int, int] = {}

    def note(chunk: Any) -> None:
        starts[chunk.chunk_offset[0]] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    return starts


def _lists(file: BinaryIO, dataset: h5py.Dataset, width: int) -> list[Place] | None:
    """The lists of a dataset `[clips]` of lists, whose items take `width` bytes each."""
    references = _references(file, dataset)
    if references is None:
        return None
    heap: dict[int, dict[int, Place]] = {}
    found: list[Place] = []
    for items, address, index in references.tolist():
        if not items:
            found.append((0, 0))
            continue
        if address not in heap:
            heap[address] = _objects(file, address)
        start, size = heap[address].get(index, (0, 0))
        if size != items * width:
            return None
        found.append((start, size))
    return found


def _references(file: BinaryIO, dataset: h5py.Dataset) -> NDArray[np.void] | None:
    """`[clips]`: the references that stand in the file for a dataset's lists."""
    if dataset.ndim != 1:
        return None
    clips = len(dataset)
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        if start is None:
            return None if clips else np.zeros(0, _REFERENCE)
        file.seek(start)
        parts = [file.read(clips * _REFERENCE.itemsize)]
    else:
        chunk = dataset.chunks[0]
        if dataset.id.get_num_chunks() < -(-clips // chunk):
            return None
        parts = [dataset.id.read_direct_chunk((first,))[1] for first in range(0, clips, chunk)]
    data = b"".join(parts)
    whole = len(data) - len(data) % _REFERENCE.itemsize
    references = np.frombuffer(data[:whole], _REFERENCE)
    return references[:clips] if len(references) >= clips else None


def _objects(file: BinaryIO, address: int) -> dict[int, Place]:
    """The objects of the global heap collection at `address`, by their index; none where there is no such thing."""
    found: dict[int, Place] = {}
    file.seek(address)
    head = file.read(_COLLECTION.size)
    if len(head) < _COLLECTION.size:
        return found
    signature, version, size = _COLLECTION.unpack(head)
    if (signature, version) != (_SIGNATURE, _VERSION):
        return found
    at, end = address + _COLLECTION.size, address + size
    while at + _OBJECT.size <= end:
        file.seek(at)
        header = file.read(_OBJECT.size)
        if len(header) < _OBJECT.size:
            break
        index, _, _, length = _OBJECT.unpack(header)
        at += _OBJECT.size
        if index == 0 or at + length > end:  # what is left over
            break
        found[index] = (at, length)
        at += length + -length % 8
    return found
