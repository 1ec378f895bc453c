"""The index of shards that others made: from what was found in them to the columns that ours have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.errors import ShardError

FOREIGN_INDEX = tables.INDEX.append(pa.field("codec", pa.string(), nullable=False))
"""The index, and how a clip is read: "flac" (a whole FLAC file) and "pcm16" (bare little-endian samples) are mono,
of 16 bits and at the set's rate, and may be shorter than `samples`, up to which they are filled with zeros; a dot and
an extension is a sound file to be decoded, mixed, resampled and padded; "hdf5" is to be read through h5py, its row
being `row`."""

_MANY_CLASSES = 1000
_FEW = 100  # clips, of which each may have a class of its own

_UNKNOWN = {
    "sha256": "",
    **dict.fromkeys(("peak_db", "rms_db", "dc", "clipped", "silent", "bandwidth_hz"), float("nan")),
}
"""What stands for columns that only decoding would give, where there may be no null: no comparison holds for nan."""


def own_keys(clips: pa.Table) -> tuple[pa.Table, list[str]]:
    """The clips, each with a key that no other has: shards often count theirs from 0."""
    keys = clips["key"]
    if pc.count_distinct(keys).as_py() == clips.num_rows:
        return clips, []
    shards = clips["shard"]
    stems = pc.replace_substring_regex(shards, r"\.[^.]+$", "")
    unique = pc.count_distinct(stems).as_py() == pc.count_distinct(shards).as_py()
    longer = pc.binary_join_element_wise(stems if unique else shards, keys, "/")
    clips = clips.set_column(clips.column_names.index("key"), "key", longer)
    return clips, [
        f"shards have keys in common; each key has its shard's name before it, as in {longer[0].as_py()}"
    ]


def at_rate(clips: pa.Table, rate: int, path: Callable[[str], str]) -> pa.Table:
    """The index of clips of which all is known (`FOUND`, and shard and row), when they are read at `rate` Hz.

    `path` tells where a shard lies, for the error.

    Raises:
        ShardError: HDF5 keeps bare samples at another rate.
    """
    frames, rates = (clips[name].to_numpy().astype(np.int64) for name in ("frames", "rate"))
    resampled = -(-frames * rate // rates)
    seconds = np.maximum(-(-resampled // rate), 1)
    hidden = pc.is_null(clips["offset"])
    same = pc.equal(clips["rate"], rate)
    bare = pc.equal(clips["suffix"], "")
    bad = clips.filter(pc.and_(bare, pc.invert(same)))
    if bad.num_rows:
        raise ShardError(
            f"{path(bad['shard'][0].as_py())}: is at {bad['rate'][0].as_py()} Hz, most clips are at {rate} Hz; "
            "HDF5 files of several rates are no one set: `pipeline shard` makes shards of one rate"
        )
    plain = pc.and_(pc.and_(pc.is_valid(clips["plain"]), same), pc.invert(hidden))
    file = pc.binary_join_element_wise(pa.scalar(""), clips["suffix"], ".")
    codec = pc.if_else(plain, clips["plain"], pc.if_else(hidden, "hdf5", file))
    rows = clips.num_rows
    columns = {
        **{
            name: clips[name]
            for name in ("key", "shard", "row", "labels", "split", "fold", "group", "source")
        },
        "offset": pc.if_else(plain, clips["plain_offset"], clips["offset"]),
        "length": pc.if_else(plain, clips["plain_length"], clips["length"]),
        "samples": seconds * rate,
        "duration_s": frames / rates,
        "source_rate": clips["rate"],
        "source_channels": clips["channels"],
        "codec": codec,
        **{
            name: pa.repeat(pa.scalar(value, FOREIGN_INDEX.field(name).type), rows)
            for name, value in _UNKNOWN.items()
        },
    }
    return pa.table(
        {field.name: columns.get(field.name, pa.nulls(rows, field.type)) for field in FOREIGN_INDEX},
        schema=FOREIGN_INDEX,
    ).combine_chunks()


def class_names(table: pa.Table, declared: list[str]) -> tuple[list[str], pa.Table, list[str]]:
    """Names of the classes: as the shards order them, then by number, then by name; and the index with no others."""
    found = set(pc.unique(pc.list_flatten(table["labels"])).to_pylist()) - set(declared)
    rows = table.num_rows
    if len(found) > max(_MANY_CLASSES, rows // 2) or len(found) > max(_FEW, 0.9 * rows):
        none = pa.array([[]] * table.num_rows, FOREIGN_INDEX.field("labels").type)
        table = table.set_column(table.column_names.index("labels"), FOREIGN_INDEX.field("labels"), none)
        what = (
            f"{len(found)} labels on {table.num_rows} clips are texts rather than classes, and are not used"
        )
        return declared, table, [what]

    def order(name: str) -> tuple[bool, int, str]:
        number = name.isascii() and name.isdigit()
        return not number, int(name) if number else 0, name

    return declared + sorted(found, key=order), table, []


def hash_of(table: pa.Table) -> str:
    """A hash of which clips there are, where they lie, and what is said of them."""
    digest = hashlib.sha256()
    for name in ("key", "shard", "split", "codec"):
        digest.update("\0".join(table[name].to_pylist()).encode())
    for name in ("offset", "length", "samples", "fold"):
        digest.update(pc.fill_null(table[name], -1).to_numpy().astype("<i8").tobytes())
    labels = table["labels"].combine_chunks()
    digest.update("\0".join(labels.flatten().to_pylist()).encode())
    digest.update(pc.list_value_length(labels).to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()
