"""A feature store: a folder of entries, found by feature, spec and shards."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from clipmill import tables
from clipmill.errors import ClipmillError, FeatureError, ShardError, TableError
from clipmill.features.spec import FeatureSpec
from clipmill.featurestore.entry import Entry, feature_of, is_entry_id
from clipmill.featurestore.files import ENTRY_FILE
from clipmill.shards.read import Shards


class FeatureStore:
    """The entries in a folder. Needs no sound, and no network.

    Args:
        folder: of the store.

    Raises:
        FeatureError: there is no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FeatureError(
                f"{self.folder}: is no feature store; `pipeline features build SHARDS --feature logmel --store DIR` "
                "makes one"
            )

    @property
    def ids(self) -> list[str]:
        """Names of the entries' folders, sorted, whatever state they are in."""
        found = (path for path in self.folder.iterdir() if path.is_dir() and is_entry_id(path.name))
        return sorted(path.name for path in found if (path / ENTRY_FILE).exists() or any(path.glob("*.h5")))

    def entries(self) -> list[Entry]:
        """The entries that are finished; `open` says what is wrong with another."""
        found = []
        for one in self.ids:
            try:
                entry = self.open(one)
            except TableError:
                continue
            if entry.finished:
                found.append(entry)
        return found

    def named(self, name: str | None, most: int | None = None) -> list[str]:
        """The ids of a feature's entries, or that id itself; of None all.

        Raises:
            FeatureError: there is none, or there are more than `most`.
        """
        ids = [id for id in self.ids if name in (None, id, feature_of(id))]
        if not ids:
            raise FeatureError(
                f"{self.folder}: has no {name or 'entry'}; it has {', '.join(self.ids) or 'nothing'}; "
                "`pipeline features build` computes more"
            )
        if most is not None and len(ids) > most:
            raise FeatureError(f"{self.folder}: {name} may be any of {', '.join(ids)}; name one of them")
        return ids

    def open(self, id: str) -> Entry:
        """The entry of that id, finished or not.

        Raises:
            TableError: there is none, or its entry.json is damaged.
        """
        return Entry.open(self.folder / id)

    def mend(self, id: str) -> str:
        """The command that mends an entry."""
        try:
            return f"{self.open(id).command} --check-hashes"
        except TableError:
            return f"the `pipeline features build` that made {self.folder / id}, with --check-hashes"

    def entry(
        self,
        name: str | None = None,
        spec: FeatureSpec | None = None,
        shards: Shards | None = None,
        seen: Mapping[str, Any] | None = None,
    ) -> Entry:
        """The finished entry of a feature, or of that id, or the only one; and that passes `Entry.check`.

        Raises:
            FeatureError: there is none; the spec of the only one differs, and in what; or several fit.
            ShardError: it is not finished, or of other shards.
            TableError: its entry.json is damaged.
        """
        ids = self.named(name)
        tried = [self._try(id, spec, shards, seen) for id in ids]
        fitting = [one for one in tried if isinstance(one, Entry)]
        problems = [one for one in tried if not isinstance(one, Entry)]
        if len(fitting) > 1:
            of = f" of {name}" if name else ""
            told = ", ".join(f"{entry.id} ({entry.words})" for entry in fitting)
            raise FeatureError(
                f"{self.folder}: has {len(fitting)} entries{of}; name one of them: {told}; train and evaluate "
                "take it as --features STORE/ENTRY"
            )
        if fitting:
            return fitting[0]
        if len(problems) > 1:
            raise type(problems[0])("; ".join(map(str, problems)))
        raise problems[0]

    def _try(
        self, id: str, spec: FeatureSpec | None, shards: Shards | None, seen: Mapping[str, Any] | None
    ) -> Entry | ClipmillError:
        """The entry, or why it is not the one."""
        try:
            entry = self.open(id)
            entry.check(spec, shards, seen)
        except ClipmillError as error:
            return error
        return entry

    def get(
        self, keys: Sequence[str], feature: str = "logmel", *, entry: str | None = None, stored: bool = False
    ) -> list[Tensor]:
        """The features of clips: `[bins, frames]` each, float32, or with `stored` of the number type they are kept in.

        Each call checks the entry's tables: a call for many clips takes little longer than for one.

        Args:
            keys: the clips', in the order that they are wanted.
            feature: its name, where the store has one entry of it.
            entry: the id of one, where it has several.
            stored: leave the numbers as they are kept.

        Raises:
            FeatureError: there is no such entry, or several.
            ShardError: no such clip, it has no feature, or is damaged.
        """
        clips = self.entry(entry or feature).clips
        rows = pc.index_in(pa.array(keys, pa.string()), clips.columns["key"].combine_chunks())
        if rows.null_count:
            unknown = [key for key, row in zip(keys, rows.to_pylist(), strict=True) if row is None]
            few = ", ".join(clips.keys_of(np.arange(min(3, len(clips)))))
            raise ShardError(
                f"{clips.place}: has no clip {', '.join(unknown[:3])}; it has {len(clips)} others, such as {few}"
            )
        found = []
        for row in rows.to_pylist():
            room = np.empty((1, int(clips.samples[row]), clips.bins), clips.dtype)
            for bad in clips.read_into(np.array([row]), room):
                raise ShardError(
                    f"{bad.shard}: the feature of {bad.key} cannot be read ({bad.reason}: {bad.message}); "
                    "`pipeline features verify` names all damage"
                )
            values = torch.from_numpy(room[0]).T.contiguous()
            found.append(values if stored else values.float())
        return found

    def drop(self, id: str) -> None:
        """Remove the entry of that id, in whatever state: it is gone at once, and stays gone where this is killed.

        Raises:
            FeatureError: there is none, or several of that feature.
            TableError: a run is writing to it.
        """
        for leftover in self.folder.glob(".*.dropped"):
            shutil.rmtree(leftover, ignore_errors=True)
        (id,) = self.named(id, most=1)
        folder = self.folder / id
        with tables.locked(folder):
            gone = self.folder / f".{id}.{uuid.uuid4().hex}.dropped"
            os.replace(folder, gone)
            shutil.rmtree(gone)
