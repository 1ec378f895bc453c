"""What clips one shard of others holds, and where: a tar by its headers, an HDF5 file by its fields."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from clipmill.audio.header import Header, read_header
from clipmill.shards.foreign.described import TEXTS, Described, described
from clipmill.shards.foreign.tars import Member, members
from clipmill.shards.hdf5 import Place, audio_name, places
from clipmill.types import NO_SPLIT, SOUND_SUFFIXES

if TYPE_CHECKING:
    import h5py

FOUND = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("source", pa.string()),  # the member's name, or what HDF5 calls the clip
        pa.field("offset", pa.int64()),  # of the whole sound file in the shard; null: h5py finds it
        pa.field("length", pa.int64()),
        pa.field("suffix", pa.string()),  # of the sound file, in lower case; empty: bare samples
        pa.field("labels", pa.list_(pa.string())),
        pa.field("split", pa.string()),
        pa.field("fold", pa.int32()),
        pa.field("group", pa.string()),
        pa.field("rate", pa.int32()),  # Hz; null, as the next two: only decoding tells
        pa.field("channels", pa.int32()),
        pa.field("frames", pa.int64()),
        pa.field("plain", pa.string()),  # "flac" or "pcm16": mono of 16 bits, to be read from plain_offset on
        pa.field("plain_offset", pa.int64()),
        pa.field("plain_length", pa.int64()),
    ]
)
"""The clips of one shard, as `scan` finds them."""

HDF5_SUFFIXES = (".h5", ".hdf5")
_TEXT_BYTES = 1 << 20  # more than any label
_HEAD = 512  # bytes of a FLAC file in HDF5 that hold its header
_PANNS_RATE = 32_000  # Hz: PANNs' own files say it nowhere
_RATE_ATTRIBUTES = ("sample_rate", "sr")
_CLASS_ATTRIBUTES = ("labels", "classes")


@dataclass
class Scanned:
    """What a shard holds.

    table: its clips, `FOUND`. classes: names in the order of their numbers, where the shard says so. lost: why
    the shard gives no clip at all. notes: what a person should know -> how often it came up, and with what first.
    """

    shard: str
    table: pa.Table = field(default_factory=FOUND.empty_table)
    classes: tuple[str, ...] = ()
    lost: str | None = None
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def note(self, what: str, where: str) -> None:
        """Count one more clip or shard of which there is something to say."""
        count, first = self.notes.get(what, (0, where))
        self.notes[what] = count + 1, first


class _Found(NamedTuple):
    """One clip, before it is a row."""

    key: str
    source: str
    place: tuple[int | None, int | None]
    suffix: str
    said: Described
    header: Header | None


def scan(file: BinaryIO, shard: str, classes: Sequence[str] = ()) -> Scanned:
    """Find the clips of a shard that others made.

    A tar's members are grouped as the webdataset library does, but wherever they stand in it: the key is the path up
    to the first dot of the file's name. Of several sounds with one key the first counts.

    Args:
        file: the shard, open and able to seek.
        shard: its file name.
        classes: names of classes by their number, where they are known.

    Raises:
        OSError: the file cannot be read.
    """
    result = Scanned(shard)
    found = _hdf5 if shard.endswith(HDF5_SUFFIXES) else _tar
    clips = list(found(file, result, classes))
    if not clips:
        result.lost = result.lost or "holds no clip that can be read"
    elif result.lost is not None:
        result.note(f"is damaged and was used up to there: {result.lost}", shard)
        result.lost = None
    result.table = _table(clips)
    return result


def _table(clips: Sequence[_Found]) -> pa.Table:
    def of(name: str) -> list[Any]:
        return [None if clip.header is None else getattr(clip.header, name) for clip in clips]

    starts = [clip.place[0] for clip in clips]
    within = of("offset")
    columns = {
        "key": [clip.key for clip in clips],
        "source": [clip.source for clip in clips],
        "offset": starts,
        "length": [clip.place[1] for clip in clips],
        "suffix": [clip.suffix for clip in clips],
        "labels": [clip.said.labels for clip in clips],
        "split": [clip.said.split for clip in clips],
        "fold": [clip.said.fold for clip in clips],
        "group": [clip.said.group for clip in clips],
        **{name: of(name) for name in ("rate", "channels", "frames", "plain")},
        "plain_offset": [
            None if a is None or b is None else a + b for a, b in zip(starts, within, strict=True)
        ],
        "plain_length": of("length"),
    }
    return pa.table(columns, schema=FOUND)


def _tar(file: BinaryIO, result: Scanned, classes: Sequence[str]) -> Iterator[_Found]:
    sounds: dict[str, tuple[Member, str]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    others: Counter[str] = Counter()
    try:
        for member in members(file):
            key, suffix = _key(member.name)
            if key and f".{suffix}" in SOUND_SUFFIXES:
                if key in sounds:
                    result.note("more sounds of a key that has one are left out", member.name)
                sounds.setdefault(key, (member, suffix))
            elif key and suffix in TEXTS and member.size <= _TEXT_BYTES:
                texts.setdefault(key, {}).setdefault(suffix, _contents(file, member))
            else:
                others[suffix] += 1
    except tarfile.ReadError as error:
        result.lost = str(error) if sounds else _no_tar(file, error)
    if not sounds and result.lost is None:
        kinds = Counter(kind for one in texts.values() for kind in one) + others
        what = ", ".join(f"{count} .{kind}" for kind, count in kinds.most_common(5)) or "nothing"
        result.lost = f"holds no sound: {what}"
    for key, (member, suffix) in sounds.items():
        said = described(texts.get(key, {}), classes)
        for strange in said.strange:
            result.note(f"clips have {strange}, which is not used", key)
        header = read_header(member.head, member.size)
        yield _Found(key, member.name, (member.offset, member.size), suffix, said, header)
    if alone := texts.keys() - sounds.keys():
        for _ in alone:
            result.note("samples have no sound and are left out", min(alone))


def _no_tar(file: BinaryIO, error: tarfile.ReadError) -> str:
    file.seek(0)
    packed = file.read(2) == b"\x1f\x8b"
    return "is compressed, and no clip can be read alone: unpack it" if packed else f"is no tar: {error}"


def _key(name: str) -> tuple[str, str]:
    """A member's key and the last part of its extension; the key is empty where webdataset would pass it over."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    suffix = extension.rpartition(".")[2].lower()
    return (folder + slash + stem if stem and dot else ""), suffix


def _contents(file: BinaryIO, member: Member) -> bytes:
    if member.size <= len(member.head):
        return member.head[: member.size]
    file.seek(member.offset)
    return file.read(member.size)


def _hdf5(file: BinaryIO, result: Scanned, classes: Sequence[str]) -> Iterator[_Found]:
    import h5py

    try:
        found = places(file)
        with h5py.File(file, "r") as opened:
            yield from _hdf5_clips(file, opened, found, result, classes)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        result.lost = f"cannot be read as HDF5: {str(error).strip(chr(34))}"


def _hdf5_clips(
    file: BinaryIO, opened: h5py.File, found: list[Place] | None, result: Scanned, classes: Sequence[str]
) -> Iterator[_Found]:
    name = audio_name(opened)
    dataset = opened[name]
    names = _names(opened, len(dataset))
    said = _said(opened, result, classes, len(dataset))
    rate = next((int(opened.attrs[one]) for one in _RATE_ATTRIBUTES if one in opened.attrs), None)
    if rate is None and name == "waveform":
        rate = _PANNS_RATE
        result.note(
            f"says nowhere at what rate it is (attribute {_RATE_ATTRIBUTES[0]}): {rate} Hz, as PANNs' are",
            result.shard,
        )
    seen: set[str] = set()
    for row, clip in enumerate(names):
        key = _key(clip)[0] or clip
        if key in seen:
            result.note("more sounds of a key that has one are left out", clip)
            continue
        seen.add(key)
        place = (None, None) if found is None else found[row]
        header = _hdf5_header(file, dataset, row, place, rate)
        if header is None:
            result.note("clips are left out: empty, or their length is not stated", clip)
            continue
        yield _Found(key, clip, place, "flac" if name == "flac" else "", said[row], header)


def _hdf5_header(
    file: BinaryIO,
    dataset: h5py.Dataset,
    row: int,
    place: tuple[int | None, int | None],
    rate: int | None,
) -> Header | None:
    """What a clip in HDF5 is; None: it has no samples, or does not say how many."""
    import h5py

    start, length = place
    if rate is not None and dataset.name == "/waveform":
        items = h5py.check_vlen_dtype(dataset.dtype)
        kind = dataset.dtype if items is None else items
        if kind != np.int16 and kind.kind != "f":
            raise ValueError(f"waveform is of {kind}; allowed are int16, and floats from -1 to 1")
        if items is None and dataset.ndim != 2:
            raise ValueError(f"waveform has the shape {dataset.shape}; allowed is [clips, samples]")
        frames = dataset.shape[1] if items is None else len(dataset[row]) if length is None else length // 2
        return Header(rate, 1, frames, "pcm16" if length else None, 0, length or 0) if frames else None
    if start is None or length is None:
        data = dataset[row].tobytes()
        header = read_header(data[:_HEAD], len(data))
        return None if header is None else header._replace(plain=None)
    file.seek(start)
    return read_header(file.read(min(length, _HEAD)), length)


def _names(opened: h5py.File, clips: int) -> list[str]:
    """What the clips are called; their rows' numbers where the file does not say."""
    if "audio_name" not in opened:
        return [f"{row:06d}" for row in range(clips)]
    names = opened["audio_name"][:].tolist()
    if len(names) != clips:
        raise ValueError(f"audio_name has {len(names)} entries for {clips} clips")
    return [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names]


def _said(opened: h5py.File, result: Scanned, classes: Sequence[str], clips: int) -> list[Described]:
    """Labels, fold, split and group of each clip: from `facts`, JSON texts as our own files have, or from `target`."""
    result.classes = _classes(opened)
    if "facts" in opened:
        return [described({"json": text}) for text in opened["facts"][:].tolist()]
    if "target" not in opened:
        return [Described()] * clips
    target = opened["target"][:]
    if target.ndim != 2 or len(target) != clips:
        raise ValueError(f"target has the shape {target.shape}; allowed is [{clips} clips, classes]")
    width = target.shape[1]
    if len(result.classes) != width:
        result.classes = tuple(classes) if len(classes) == width else tuple(map(str, range(width)))
    labels: list[list[str]] = [[] for _ in range(clips)]
    for row, number in zip(*(at.tolist() for at in np.nonzero(target)), strict=True):
        labels[row].append(result.classes[number])
    return [Described(tuple(sorted(names)), NO_SPLIT) for names in labels]


def _classes(opened: h5py.File) -> tuple[str, ...]:
    """The names of the classes by the file's attributes: a list, or one as JSON; none where it does not say."""
    value = next((opened.attrs[name] for name in _CLASS_ATTRIBUTES if name in opened.attrs), None)
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except ValueError:
            return ()
    if value is None or np.ndim(value) != 1:
        return ()
    return tuple(one.decode() if isinstance(one, bytes) else str(one) for one in value)
