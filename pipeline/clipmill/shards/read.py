"""Random access to shards: any clip by its row in the index, with one read."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from braceexpand import braceexpand
from numpy.typing import NDArray

from clipmill import tables
from clipmill.audio import decode_bytes
from clipmill.errors import DecodeError, ShardError
from clipmill.shards.account import DATASET_FILE, INDEX_FILE, read_dataset
from clipmill.shards.plan import FORMATS, PLAN_FILE
from clipmill.shards.where import matching


class Shards:
    """Clips in shards, as the index lists them; cheap to pickle, files open on first use in each process.

    Attributes:
        folder: where the shards stand.
        files: the shards' file names.
        info: what dataset.json says.
        index: the rows chosen, with the columns of `tables.INDEX`.
    """

    def __init__(
        self, folder: Path, info: dict[str, Any], index: pa.Table, files: Sequence[str] = ()
    ) -> None:
        self.folder, self.info, self.index, self.files = folder, info, index, list(files)
        self._columns: dict[str, Any] = {}
        self._files: dict[str, Any] = {}
        self._pid = os.getpid()

    @classmethod
    def open(cls, where: str | Path) -> Shards:
        """Open a folder of shards, one shard, or a brace range such as `a/b-{000000..000012}.tar`.

        Raises:
            ShardError: nothing is there, or no index stands beside it.
            TableError: a table there is damaged.
        """
        folder, names = _resolve(str(where))
        if not (folder / DATASET_FILE).is_file():
            unfinished = (folder / PLAN_FILE).is_file()
            why = (
                "the shard job there has not finished: run it again"
                if unfinished
                else "`pipeline shard` makes one"
            )
            raise ShardError(f"{folder}: holds no {DATASET_FILE}; {why}")
        info = read_dataset(folder)
        if not (folder / INDEX_FILE).is_file():
            raise ShardError(
                f"{folder}: its {INDEX_FILE} is missing; `pipeline verify --repair` puts it together"
            )
        index = tables.read_table(folder / INDEX_FILE, tables.INDEX)
        known = [shard["shard"] for shard in info["shards"]]
        strange = set(pc.unique(pc.list_flatten(index["labels"])).to_pylist()) - set(info["labels"])
        if strange:
            raise ShardError(
                f"{folder}: index.parquet has the label {min(strange)!r}, which dataset.json does not"
            )
        if names is not None:
            if unknown := sorted(set(names) - set(known)):
                raise ShardError(
                    f"{folder / unknown[0]}: is not in the index beside it ({len(known)} shards)"
                )
            index = index.filter(pc.is_in(index["shard"], pa.array(names)))
        return cls(folder, info, index, names or known)

    def __len__(self) -> int:
        return int(self.index.num_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "info": self.info, "index": self.index, "files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def take(self, rows: NDArray[np.integer]) -> Shards:
        """The clips at these rows, in this order."""
        return Shards(self.folder, self.info, self.index.take(pa.array(rows, pa.int64())), self.files)

    def where(self, text: str) -> Shards:
        """The clips that fulfil an expression such as `silent < 0.9 and duration_s >= 1`, in the order they have.

        Raises:
            ConfigError: the expression cannot be read; see `where.matching`.
            ShardError: it keeps none of the clips.
        """
        index = self.index.filter(matching(self.index, text))
        if len(self) and not index.num_rows:
            raise ShardError(
                f"{self.folder}: --where {text!r} keeps none of {len(self)} clips; "
                "`pipeline inspect` without it shows what the columns hold"
            )
        return Shards(self.folder, self.info, index, self.files)

    def light(self) -> Shards:
        """The same clips, knowing of the dataset only what reading them takes: for a worker among thousands."""
        info = {name: self.info[name] for name in ("name", "labels", "spec")}
        return Shards(self.folder, info, self.index, self.files[:1])

    @property
    def whole(self) -> bool:
        """Whether these are all the shards of the dataset."""
        return len(self.files) == len(self.info["shards"])

    @property
    def name(self) -> str:
        """The dataset's name."""
        return str(self.info["name"])

    @property
    def labels(self) -> list[str]:
        """Class names; a class's id is its place."""
        return list(self.info["labels"])

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return int(self.info["spec"]["sample_rate"])

    @property
    def samples(self) -> NDArray[np.int64]:
        """`[clips]`: length of each clip, a whole number of seconds."""
        return self._column("samples")

    @property
    def folds(self) -> NDArray[np.int64]:
        """`[clips]`: official cross-validation part, -1 where there is none."""
        return self._column("fold", -1).astype(np.int64)

    @property
    def splits(self) -> NDArray[Any]:
        """`[clips]`: train, valid, eval or all."""
        return self._column("split")

    @property
    def groups(self) -> NDArray[Any]:
        """`[clips]`: what must not straddle folds; the clip's own key where no group is given."""
        if "groups" not in self._columns:
            groups = pc.coalesce(self.index["group"], self.index["key"])
            self._columns["groups"] = groups.to_numpy()
        return self._columns["groups"]

    @property
    def targets(self) -> NDArray[np.float32]:
        """`[clips, classes]`: 1 where a clip has a class, else 0."""
        if "targets" not in self._columns:
            labels = self.index["labels"].combine_chunks()
            rows = pc.list_parent_indices(labels).to_numpy()
            ids = pc.index_in(pc.list_flatten(labels), pa.array(self.labels, pa.string())).to_numpy()
            targets = np.zeros((len(self), len(self.labels)), np.float32)
            targets[rows, ids] = 1.0
            self._columns["targets"] = targets
        return self._columns["targets"]

    def read(self, row: int) -> NDArray[np.int16]:
        """Decode one clip: int16 `[samples]`.

        Raises:
            ShardError: the shard is missing or damaged there; names the shard and the key.
        """
        shard, key = self._column("shard")[row], self._column("key")[row]
        try:
            samples = self._read_hdf5(shard, row) if shard.endswith(".h5") else self._read_tar(shard, row)
        except (OSError, KeyError, IndexError, DecodeError) as error:
            raise ShardError(
                f"{self.folder / shard}: clip {key} cannot be read ({error}); `pipeline verify` names all damage"
            ) from error
        if len(samples) != self.samples[row]:
            found = f"{len(samples)} samples where the index says {self.samples[row]}"
            raise ShardError(
                f"{self.folder / shard}: clip {key} has {found}; `pipeline verify` names all damage"
            )
        return samples

    def facts(self, row: int) -> dict[str, Any]:
        """What the shard itself says of one clip, beside its samples: a tar's `key.json`, HDF5's `facts`.

        Raises:
            ShardError: the shard is missing or damaged there; names the shard and the key.
        """
        shard, key = self._column("shard")[row], self._column("key")[row]
        try:
            if shard.endswith(".h5"):
                said = self._open(shard)["facts"][int(self._column("row")[row])]
            else:
                # The member after the audio, which fills whole blocks: its header, then its bytes.
                after = int(self._column("offset")[row]) - (-int(self._column("length")[row]) // 512) * 512
                member = tarfile.TarInfo.frombuf(os.pread(self._open(shard), 512, after), "utf-8", "strict")
                said = os.pread(self._open(shard), member.size, after + 512)
            facts = json.loads(said)
            if facts["key"] == key:
                return facts
            error: Exception = KeyError(f"the facts there are those of {facts['key']}")
        except (OSError, KeyError, IndexError, ValueError, TypeError, tarfile.TarError) as caught:
            error = caught
        raise ShardError(
            f"{self.folder / shard}: the facts of {key} cannot be read ({error}); `pipeline verify` names all damage"
        ) from error

    def _read_tar(self, shard: str, row: int) -> NDArray[np.int16]:
        offset, length = int(self._column("offset")[row]), int(self._column("length")[row])
        return decode_bytes(os.pread(self._open(shard), length, offset))[0]

    def _read_hdf5(self, shard: str, row: int) -> NDArray[np.int16]:
        file = self._open(shard)
        place = int(self._column("row")[row])
        if "waveform" in file:
            return file["waveform"][place]
        return decode_bytes(file["flac"][place].tobytes())[0]

    def _open(self, shard: str) -> Any:
        """The shard's file: a descriptor for a tar, an h5py.File for HDF5; one for each process."""
        if self._pid != os.getpid():  # a forked worker must not share its parent's HDF5 handles
            self._files, self._pid = {}, os.getpid()
        if shard not in self._files:
            path = self.folder / shard
            if shard.endswith(".h5"):
                import h5py

                self._files[shard] = h5py.File(path, "r")
            else:
                self._files[shard] = os.open(path, os.O_RDONLY)
        return self._files[shard]

    def close(self) -> None:
        """Close the files that this process opened."""
        if self._pid == os.getpid():
            for file in self._files.values():
                os.close(file) if isinstance(file, int) else file.close()
        self._files = {}

    def _column(self, name: str, null: Any = None) -> NDArray[Any]:
        if name not in self._columns:
            column = self.index[name] if null is None else pc.fill_null(self.index[name], null)
            self._columns[name] = column.to_numpy()
        return self._columns[name]


def rows_by_value(values: NDArray[Any]) -> dict[Any, NDArray[np.int64]]:
    """Value -> the rows that have it, ascending."""
    order = np.argsort(values, kind="stable")
    found, firsts = np.unique(values[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, firsts[1:]), strict=True)) if len(found) else {}


def _resolve(where: str) -> tuple[Path, list[str] | None]:
    """The folder of the shards, and the file names asked for (None: all of them)."""
    if Path(where).is_dir():
        return Path(where), None
    try:
        paths = [Path(path) for path in braceexpand(where)]
    except ValueError as error:
        raise ShardError(f"{where}: {error}; a range looks like name-{{000000..000012}}.tar") from error
    folders = {path.parent for path in paths}
    if len(folders) > 1:
        raise ShardError(f"{where}: names shards in {len(folders)} folders; allowed is one")
    for path in paths:
        if not path.is_file():
            raise ShardError(
                f"{path}: no such shard; SHARDS is a folder, a shard, or a range like b-{{000000..000012}}.tar"
            )
        if path.suffix.lstrip(".") not in FORMATS.values():
            raise ShardError(
                f"{path}: is no shard; shards end in {', '.join('.' + e for e in FORMATS.values())}"
            )
    return folders.pop(), [path.name for path in paths]
