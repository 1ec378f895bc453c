"""The collections that clipmill knows: one file each, and this registry.

A dataset is a frozen dataclass whose fields are its options (each made by `option`,
so the CLI can offer it as a flag) and whose `prepare` finds or makes the media and
returns the manifest. To add one: a file here, a line in `DATASETS`, a TOML of facts
in `clipmill_manifests`, a test.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clipmill.errors import ConfigError
from clipmill.types import Failure

if TYPE_CHECKING:
    import pyarrow as pa

DATASETS = {
    "tones": "clipmill.datasets.tones:Tones",
    "folder": "clipmill.datasets.folder:Folder",
    "esc50": "clipmill.datasets.esc50:Esc50",
    "urbansound8k": "clipmill.datasets.urbansound8k:UrbanSound8K",
    "ravdess": "clipmill.datasets.ravdess:Ravdess",
    "speechcommands": "clipmill.datasets.speechcommands:SpeechCommands",
    "audioset": "clipmill.datasets.audioset:Audioset",
}
"""Name -> where its class is; imported only when asked for."""


@dataclass(frozen=True)
class Remote:
    """A file on the web that a dataset is made of, as `clipmill_manifests` states it.

    `urls`: the official one first, then mirrors. `checksum`: "sha256:<hex>" or "md5:<hex>".
    `size` in bytes. Where the publisher states neither, None: then `prepare` must be able
    to tell a whole file from half of one.
    """

    file: str
    urls: tuple[str, ...]
    size: int | None = None
    checksum: str | None = None


@dataclass(frozen=True)
class Prepared:
    """What `prepare` returns: the clips wanted, where their media is, and what is already lost.

    `manifest` has the columns of `clipmill.tables.MANIFEST`, sources relative to
    `media_root`. `failures` are clips of the manifest that cannot be had, and files
    found but never wanted (outcome "skipped"; their keys are not in the manifest). `lists`
    names the files whose passed-over rows are among them, as "NAME:line".
    """

    manifest: pa.Table
    media_root: Path
    failures: list[Failure] = field(default_factory=list)
    lists: tuple[str, ...] = ()


class Dataset(Protocol):
    """A collection with its options filled in.

    It may have `needs`, the `Remote` files that must be there before it is prepared;
    `hints()`, lines that whoever has fetched it should read; and `about()`, its own title,
    licence and the like in the place of those of its kind's TOML. A class
    with `by_segment = True` has no media to find: each clip is fetched by itself, `group` is
    the id of its video, and the ledger knows its `source` and `bytes`.
    """

    @property
    def name(self) -> str:
        """The name that the dataset's folder and shards get."""
        ...

    def prepare(self, dest: Path) -> Prepared:
        """Find the media (or make them under `dest`) and list the clips.

        Raises:
            FetchError: nothing can be had at all.
            ConfigError: the options contradict each other or the media.
            TableError: a labels file is malformed.
        """
        ...


def option(default: Any = dataclasses.MISSING, *, help: str, flag: str | None = None, **click: Any) -> Any:
    """A dataclass field that the CLI offers as a flag (`--field-name` unless `flag` is given).

    Without a default the flag is required. `click` goes to `click.option` as it is.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "click": click})


def dataset_class(name: str) -> type[Any]:
    """The class registered under `name`.

    Raises:
        ConfigError: the name is unknown.
    """
    try:
        module, _, attribute = DATASETS[name].partition(":")
    except KeyError:
        raise ConfigError(f"unknown dataset {name!r}; known: {', '.join(DATASETS)}") from None
    return getattr(import_module(module), attribute)
