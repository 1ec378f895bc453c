"""What goes beside the shards for others to read: a dataset card, and Croissant metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from clipmill import tables
from clipmill.errors import TableError
from clipmill.shards.card import card
from clipmill.shards.croissant import INDEX_FILE, croissant, version

CARD_FILE, CROISSANT_FILE = "README.md", "croissant.json"


def write_metadata(folder: Path, dataset: dict[str, Any], index: pa.Table) -> None:
    """Write README.md and croissant.json into a folder of shards, atomically.

    Args:
        folder: the shards' folder; index.parquet is there already, as croissant.json has its sha256.
        dataset: what dataset.json says, or will. Anything may be absent from its `about`.
        index: what index.parquet holds.

    Raises:
        OSError: there is no index.parquet, or the disk is full or does not let us write.
    """
    with tables.atomic_write(folder / CARD_FILE, "w") as file:
        file.write(card(dataset, index))
    tables.write_json(folder / CROISSANT_FILE, croissant(folder, dataset, index))


def check_metadata(folder: Path, dataset: dict[str, Any]) -> list[str]:
    """What is wrong with the card and the metadata of a folder of shards: nothing, where they are of these shards."""
    again = "`pipeline shard`, run again, writes it anew"
    problems = [
        f"{name}: is missing; {again}"
        for name in (CARD_FILE, CROISSANT_FILE)
        if not (folder / name).is_file()
    ]
    if (folder / CROISSANT_FILE).is_file():
        try:
            said = tables.read_json(folder / CROISSANT_FILE, "version", "distribution")
            digests = {part["@id"]: part.get("sha256") for part in said["distribution"]}
            if digests[INDEX_FILE] != tables.sha256_of(folder / INDEX_FILE)[0]:
                problems.append(f"{CROISSANT_FILE}: its sha256 of {INDEX_FILE} is not the file's; {again}")
            if said["version"] != version(dataset):
                problems.append(
                    f"{CROISSANT_FILE}: is that of other shards (version {said['version']}); {again}"
                )
        except (TableError, KeyError, TypeError, AttributeError, OSError) as error:
            problems.append(f"{CROISSANT_FILE}: cannot be read ({error}); {again}")
    return problems
