"""Random access to shards: any clip by its row in the index, with one read."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipmill.errors import ShardError
from clipmill.shards.index import Columns, Index
from clipmill.shards.locate import open_set
from clipmill.shards.places import ShardSet
from clipmill.shards.reader import Reader, Unread
from clipmill.shards.where import matching
from clipmill.stores import ReadFailure, open_store


class Shards:
    """Clips in one or several sets of shards, as their indexes list them; cheap to pickle, safe for threads.

    Attributes:
        sets: where the clips come from.
        columns: of the index, at the clips chosen.
        labels: class names of all sets; a class's id is its place.
        sample_rate: Hz.
        bins: values at each of a clip's places in time; None where clips are sound, of one.
        dtype: of the values.
        silence: what stands behind the end of a clip that is read into more room than it takes.
    """

    bins: int | None = None
    dtype: np.dtype[Any] = np.dtype(np.int16)
    silence: NDArray[Any] = np.zeros((), np.int16)

    def __init__(
        self,
        sets: Sequence[ShardSet],
        rows: NDArray[np.int64] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.sets = tuple(sets)
        self.columns = Columns([part.index for part in self.sets], rows)
        own = dict.fromkeys(label for part in self.sets for label in part.info["labels"])
        self.labels = list(own) if labels is None else list(labels)
        self.reader = Reader(self.sets)
        self._kept: dict[str, Any] = {}
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        where: str | Path | Sequence[str | Path],
        *,
        cache: Path | None = None,
        settings: dict[str, Any] | None = None,
        ours: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> Shards:
        """Open one set of shards, or several as one.

        A set is a folder of shards, one shard, or a brace range such as `a/b-{000000..000012}.tar`, here or at
        a URL that fsspec knows (s3://bucket/folder). Shards that others made are indexed first; `notes` says
        what that came to. `cache` is a folder that keeps what is read of far shards; `settings` are those of
        `stores.open_store`. `ours` refuses what others made; `say` hears how the indexing of it goes.

        Raises:
            ShardError: nothing is there, a set is not finished, or sets differ in their sample rate.
            TableError: a table there is damaged.
            ConfigError: the URL is of a kind that fsspec does not know.
        """
        wheres = [where] if isinstance(where, str | Path) else list(where)
        sets, firsts, chosen = [], 0, []
        for one in wheres:
            part, rows = open_set(str(one), cache, settings, ours, say)
            sets.append(part)
            chosen.append(rows + firsts)
            firsts += part.index.num_rows
        rates = {part.info["spec"]["sample_rate"]: part.store.place for part in sets}
        if len(rates) > 1:
            found = "; ".join(f"{place} at {rate} Hz" for rate, place in rates.items())
            raise ShardError(
                f"{found}: allowed is one rate; `pipeline shard --sample-rate` makes shards of another"
            )
        every = sum(map(len, chosen)) == firsts
        return cls(sets, None if every else np.concatenate(chosen))

    @classmethod
    def of(cls, folder: Path, info: dict[str, Any], index: pa.Table, files: Sequence[str] = ()) -> Shards:
        """The clips of an index in memory, in a folder of this machine."""
        return cls([ShardSet(open_store(str(folder)), info, Index(index), tuple(files))])

    def __len__(self) -> int:
        return self.columns.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {"sets": self.sets, "rows": self.columns.rows, "labels": self.labels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def take(self, rows: NDArray[np.integer] | Sequence[int]) -> Shards:
        """The clips at these rows, in this order; or those where a mask `[clips]` is true."""
        chosen = np.asarray(rows)
        if chosen.dtype == bool:
            chosen = np.flatnonzero(chosen)
        return self._like(self.columns.take(chosen.astype(np.int64)).rows, self.labels)

    def with_labels(self, labels: Sequence[str]) -> Shards:
        """The same clips with these classes, which must hold all of theirs: those of a run over more sets."""
        return self._like(self.columns.rows, labels)

    def _like(self, rows: NDArray[np.int64] | None, labels: Sequence[str]) -> Shards:
        """Other clips of the same sets."""
        other = type(self)(self.sets, rows, labels)
        other.reader = self.reader  # what it knows of files and places serves both
        return other

    def where(self, text: str) -> Shards:
        """The clips that fulfil an expression such as `silent < 0.9 and duration_s >= 1`, in the order they have.

        Raises:
            ConfigError: the expression cannot be read; see `where.matching`.
            ShardError: it keeps none of the clips.
        """
        kept = np.flatnonzero(self.fulfilling(text))
        if len(self) and not len(kept):
            raise ShardError(
                f"{self.place}: --where {text!r} keeps none of {len(self)} clips; "
                "`pipeline inspect` without it shows what the columns hold"
            )
        return self.take(kept)

    def fulfilling(self, text: str) -> NDArray[np.bool_]:
        """`[clips]`: whether a clip fulfils an expression; raises ConfigError where that cannot be read."""
        # Columns of its own: those that are only asked about here are not to be kept.
        return np.asarray(matching(Columns(self.columns.indexes, self.columns.rows), text))

    def light(self) -> Shards:
        """The same clips, knowing of the dataset only what reading them takes: for a worker among thousands."""
        part = self._only
        info = {name: part.info[name] for name in ("name", "labels", "spec")}
        return Shards([ShardSet(part.store, info, Index(self.index), part.files[:1])])

    @property
    def index(self) -> pa.Table:
        """All columns of the index at the clips chosen; kept once asked for, which of millions is much."""
        return self._once("index", self.columns.table)

    @property
    def _only(self) -> ShardSet:
        if len(self.sets) > 1:
            raise ShardError(f"{self.place}: are {len(self.sets)} sets of shards; allowed is one")
        return self.sets[0]

    @property
    def place(self) -> str:
        """Where the shards stand, for people: folders and URLs."""
        return ", ".join(part.store.place for part in self.sets)

    @property
    def far(self) -> bool:
        """Whether any set is not on this machine."""
        return not all(part.store.near for part in self.sets)

    @property
    def folder(self) -> Path:
        """The folder of the only set; raises ShardError where there are several, or where it is far."""
        part = self._only
        if not part.store.near:
            raise ShardError(
                f"{self.place}: is not on this machine, which this command needs; copy it here first"
            )
        return Path(part.store.place)

    @property
    def info(self) -> dict[str, Any]:
        """What dataset.json of the only set says; raises ShardError where there are several, or none of ours."""
        if "foreign" in self._only.info:
            raise ShardError(f"{self.place}: has no dataset.json, for others made these shards")
        return self._only.info

    @property
    def files(self) -> list[str]:
        """The file names of the only set's shards; raises ShardError where there are several."""
        return list(self._only.files)

    @property
    def notes(self) -> list[str]:
        """What a person should know of the sets: what was assumed of shards that others made."""
        return [note for part in self.sets for note in part.info.get("notes", [])]

    @property
    def whole(self) -> bool:
        """Whether these are all the shards of the dataset."""
        return all(len(part.files) == len(part.info["shards"]) for part in self.sets)

    @property
    def name(self) -> str:
        """The dataset's name; of several sets all of them."""
        return "+".join(dict.fromkeys(str(part.info["name"]) for part in self.sets))

    @property
    def root_sha256(self) -> str:
        """The hash of all that the shards hold; of several sets that of their hashes."""
        roots = [part.info["root_sha256"] for part in self.sets]
        return roots[0] if len(roots) == 1 else hashlib.sha256("".join(roots).encode()).hexdigest()

    @property
    def some_files(self) -> list[list[str] | None] | None:
        """For each set the shards that were asked for, None for all; None where all were of every set."""
        some = [
            None if len(part.files) == len(part.info["shards"]) else list(part.files) for part in self.sets
        ]
        return None if not any(some) else some

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return int(self.sets[0].info["spec"]["sample_rate"])

    @property
    def set_of(self) -> NDArray[np.int64]:
        """`[clips]`: which of `sets` a clip is of."""
        rows = np.arange(len(self)) if self.columns.rows is None else self.columns.rows
        return np.searchsorted(self.reader.firsts, rows, "right") - 1

    @property
    def samples(self) -> NDArray[np.int64]:
        """`[clips]`: length of each clip, a whole number of seconds."""
        return self._column("samples")

    @property
    def folds(self) -> NDArray[np.int64]:
        """`[clips]`: official cross-validation part, -1 where there is none."""
        return self._column("fold", -1).astype(np.int64)

    @property
    def splits(self) -> list[str]:
        """Every split that a clip is of: train, valid, eval, all."""
        return sorted(pc.unique(self.columns["split"]).to_pylist())

    def in_splits(self, *names: str) -> NDArray[np.bool_]:
        """`[clips]`: whether a clip is of one of these splits."""
        return pc.is_in(self.columns["split"], pa.array(names)).to_numpy()

    @property
    def groups(self) -> pa.ChunkedArray:
        """`[clips]`: what must not straddle folds; the clip's own key where no group is given."""
        keys = self.columns["key"]
        if len(self.sets) > 1:  # of one name they may still be different clips
            keys = pc.binary_join_element_wise(pa.array(self.set_of.astype(str), pa.string()), keys, "/")
        return pc.coalesce(self.columns["group"], keys)

    @property
    def label_counts(self) -> NDArray[np.int64]:
        """`[clips]`: how many classes each clip has."""
        return np.diff(self.label_ids[1])

    @property
    def label_ids(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Class ids `[entries]`, and `[clips + 1]`: clip k has those from the k-th place on, up to the next one's."""
        return self._once("label_ids", self._label_ids)

    @property
    def targets(self) -> NDArray[np.float32]:
        """`[clips, classes]`: 1 where a clip has a class, else 0. Of millions of clips take `targets_of` some."""
        return self._once("targets", lambda: self.targets_of(np.arange(len(self))))

    def targets_of(self, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """`[rows, classes]`: 1 where a clip has a class, else 0."""
        ids, counts = _entries_of(*self.label_ids, rows)
        targets = np.zeros((len(rows), len(self.labels)), np.float32)
        targets[np.repeat(np.arange(len(rows)), counts), ids] = 1.0
        return targets

    def keys_of(self, rows: NDArray[np.integer]) -> list[str]:
        """The clips' keys."""
        return self.columns.at("key", rows)

    def read_into(
        self,
        rows: NDArray[np.integer],
        out: NDArray[np.int16],
        starts: NDArray[np.int64] | None = None,
        *,
        check: bool = False,
    ) -> list[Unread]:
        """Fill `out`, `[rows, samples]` of `dtype`, or `[rows, places, bins]`; see `Reader.read_into`."""
        return self.reader.read_into(self.stored(rows), out, starts, check=check)

    def decode_into(
        self, rows: NDArray[np.integer], files: Sequence[bytes], out: NDArray[np.int16]
    ) -> list[Unread]:
        """Fill `out` `[rows, samples]` from sound files that are there already; see `Reader.decode_into`."""
        return self.reader.decode_into(self.stored(rows), files, out)

    def read(self, row: int) -> NDArray[np.int16]:
        """Decode one clip: int16 `[samples]`.

        Raises:
            ShardError: the shard is missing or damaged there; names the shard and the key.
        """
        out = np.empty((1, int(self.samples[row])), np.int16)
        for bad in self.read_into(np.array([row]), out):
            raise ShardError(
                f"{bad.shard}: clip {bad.key} cannot be read ({bad.message}); `pipeline verify` names all damage"
            )
        return out[0]

    def facts(self, row: int) -> dict[str, Any]:
        """What the shard itself says of one clip, beside its samples: a tar's `key.json`, HDF5's `facts`.

        Raises:
            ShardError: the shard is missing or damaged there; names the shard and the key.
        """
        shard, key = (self.columns[name][row].as_py() for name in ("shard", "key"))
        chosen = int(self.stored(np.array([row]))[0])
        try:
            if shard.endswith(".h5"):
                said = self.reader.hdf5_item(chosen, shard, "facts", self.columns["row"][row].as_py())
            else:
                # The member after the audio, which fills whole blocks: its header, then its bytes.
                offset, length = (self.columns[name][row].as_py() for name in ("offset", "length"))
                after = offset - (-length // 512) * 512
                header = self.reader.bytes_at(chosen, shard, after, 512)
                size = tarfile.TarInfo.frombuf(header, "utf-8", "strict").size
                said = self.reader.bytes_at(chosen, shard, after + 512, size)
            facts = json.loads(said)
            if facts["key"] == key:
                return facts
            error: Exception = KeyError(f"the facts there are those of {facts['key']}")
        except (
            OSError,
            KeyError,
            IndexError,
            ValueError,
            TypeError,
            tarfile.TarError,
            ReadFailure,
        ) as caught:
            error = caught
        raise ShardError(
            f"{self.folder / shard}: the facts of {key} cannot be read ({error}); `pipeline verify` names all damage"
        ) from error

    def close(self) -> None:
        """Close the files that this process opened."""
        self.reader.close()

    def stored(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """The rows of these clips in the indexes of all sets together."""
        chosen = np.asarray(rows, np.int64)
        return chosen if self.columns.rows is None else self.columns.rows[chosen]

    def _label_ids(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        place = {name: number for number, name in enumerate(self.labels)}
        parts = [part.index.label_lists() for part in self.sets]
        ids = np.concatenate(
            [np.array([place[n] for n in names], np.int32)[codes] for codes, _, names in parts]
        )
        counts = np.concatenate([np.diff(firsts) for _, firsts, _ in parts])
        firsts = np.concatenate([[0], np.cumsum(counts)])
        if self.columns.rows is not None:
            ids, counts = _entries_of(ids, firsts, self.columns.rows)
            firsts = np.concatenate([[0], np.cumsum(counts)])
        return ids, firsts

    def _column(self, name: str, null: Any = None) -> NDArray[Any]:
        def made() -> NDArray[Any]:
            column = self.columns[name]
            return (column if null is None else pc.fill_null(column, null)).to_numpy()

        return self._once(name, made)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once: threads that ask together would each hold a copy."""
        with self._lock:
            if name not in self._kept:
                self._kept[name] = make()
            return self._kept[name]


def _entries_of(
    ids: NDArray[np.int32], firsts: NDArray[np.int64], rows: NDArray[np.integer]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The entries of these rows of lists end to end, and how many each row has."""
    begins = firsts[rows]
    counts = firsts[rows + 1] - begins
    kind = np.int32 if len(ids) < 1 << 31 else np.int64  # of all clips' entries this is most of the memory
    places = np.arange(counts.sum(), dtype=kind)
    places += np.repeat((begins - np.cumsum(counts) + counts).astype(kind), counts)
    return ids[places], counts


def rows_by_value(values: NDArray[Any]) -> dict[Any, NDArray[np.int64]]:
    """Value -> the rows that have it, ascending."""
    order = np.argsort(values, kind="stable")
    found, firsts = np.unique(values[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, firsts[1:]), strict=True)) if len(found) else {}
