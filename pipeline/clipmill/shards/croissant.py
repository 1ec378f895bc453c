"""Metadata beside the shards, for tools and search engines: JSON-LD after Croissant 1.0.

https://docs.mlcommons.org/croissant. It is made of dataset.json and the index alone: equal
shards give equal metadata, without a date or a path.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipmill import tables
from clipmill.shards.card import COLUMNS, citations, globs, hub_licence, title
from clipmill.types import TRAIN_SPLITS

INDEX_FILE = "index.parquet"

_SPLIT_TERMS = {
    **dict.fromkeys(TRAIN_SPLITS, "cr:TrainingSplit"),
    "valid": "cr:ValidationSplit",
    "eval": "cr:TestSplit",
}
"""Split -> Croissant's word for it."""

_MEDIA_TYPES = {"webdataset": "application/x-tar", "hdf5": "application/x-hdf5"}

_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context that Croissant 1.0 prescribes, whole: validators compare it."""


def croissant(folder: Path, dataset: dict[str, Any], index: pa.Table) -> dict[str, Any]:
    """The metadata of a folder of shards, of what dataset.json says and of the index that is there already."""
    about = dataset["about"]
    said: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": dataset["name"],
        "alternateName": title(dataset),
        "description": " ".join(about.get("description", "").split()) or title(dataset),
        "version": version(dataset),
        "license": _croissant_licence(about),
        "citeAs": "\n\n".join(citations(about, index)),
        "url": about.get("homepage"),
        "distribution": _distribution(folder, dataset),
        "recordSet": _record_sets(dataset, index.schema),
    }
    return {name: value for name, value in said.items() if value}


def _croissant_licence(about: dict[str, Any]) -> str | dict[str, Any] | None:
    """A URL where one licence covers everything; else its words too, which a URL alone would belie."""
    licence, url = about.get("licence"), about.get("licence_url")
    if url and licence and hub_licence(about) is None:
        return {"@type": "sc:CreativeWork", "name": licence, "url": url}
    return url or licence


def version(dataset: dict[str, Any]) -> str:
    """The data bears no version of its own: what follows the plus names the shards' bytes."""
    return f"1.0.0+{dataset['root_sha256'][:12]}"


def _distribution(folder: Path, dataset: dict[str, Any]) -> list[dict[str, Any]]:
    """The index by its sha256, and the shards by their names; the record set `shards` has the sha256 of each.

    With a FileObject for each of AudioSet's 8,000 shards, validators take half a minute.
    """
    digest, size = tables.sha256_of(folder / INDEX_FILE)
    shards = dataset["spec"]["format"]
    return [
        {
            "@type": "cr:FileObject",
            "@id": INDEX_FILE,
            "name": INDEX_FILE,
            "description": "The index: one row a clip.",
            "contentUrl": INDEX_FILE,
            "contentSize": f"{size} B",
            "encodingFormat": "application/x-parquet",
            "sha256": digest,
        },
        {
            "@type": "cr:FileSet",
            "@id": "shard-files",
            "name": "shard-files",
            "description": f"{len(dataset['shards'])} {shards} shards; the record set `shards` has the sha256 of each.",
            "encodingFormat": _MEDIA_TYPES[shards],
            "includes": sorted({re.sub(r"\d{6}(\.\w+)$", r"*\1", s["shard"]) for s in dataset["shards"]}),
        },
    ]


def _record_sets(dataset: dict[str, Any], schema: pa.Schema) -> list[dict[str, Any]]:
    splits = [{"name": split, "url": _SPLIT_TERMS.get(split)} for split in globs(dataset)]
    labels = [{"name": label, "id": place} for place, label in enumerate(dataset["labels"])]
    shards = [
        {"name": s["shard"], **{k: s[k] for k in ("sha256", "bytes", "written")}} for s in dataset["shards"]
    ]
    sets = [
        _record_set("clips", "The index: one record a clip.", "key", [_column(field) for field in schema]),
        _listing("shards", "The shards: one record a file.", shards, {
            "name": ("sc:Text", "of the file, as in clips/shard"),
            "sha256": ("sc:Text", "of the file"),
            "bytes": ("sc:Integer", "its size"),
            "written": ("sc:Integer", "clips in it"),
        }),
        _listing("labels", "The classes.", labels, {
            "name": ("sc:Text", "the class, as in clips/labels"),
            "id": ("sc:Integer", "its place in the order of names, and in a vector of targets"),
        }) | {"dataType": "sc:Enumeration"},
        _listing("splits", "The splits.", splits, {
            "name": ("sc:Text", "the split, as in clips/split"),
            "url": ("sc:URL", "what it is for; null: for none of training, validation and test"),
        }) | {"dataType": "cr:Split"},
    ]  # fmt: skip
    return [said for said in sets if said.get("data") != []]


def _listing(
    name: str, description: str, rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """A record set that holds its own records; its key is `name`."""
    fields = [_field(f"{name}/{column}", *said) for column, said in columns.items()]
    data = [{f"{name}/{column}": value for column, value in row.items()} for row in rows]
    return _record_set(name, description, "name", fields) | {"data": data}


def _record_set(name: str, description: str, key: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "key": {"@id": f"{name}/{key}"},
        "field": fields,
    }


def _column(column: pa.Field) -> dict[str, Any]:
    """A column of the index as a field: a list is repeated, and structs have sub-fields."""
    name = f"clips/{column.name}"
    repeated = pa.types.is_list(column.type)
    kind = column.type.value_type if repeated else column.type
    said = _field(name, _croissant_type(kind), COLUMNS.get(column.name, ""))
    if repeated:
        said["repeated"] = True
    if column.name == "split":
        said["references"] = {"field": {"@id": "splits/name"}}
    source = {"fileObject": {"@id": INDEX_FILE}, "extract": {"column": column.name}}
    if not pa.types.is_struct(kind):
        return said | {"source": source}
    del said["dataType"]
    said["subField"] = [
        _field(f"{name}/{part.name}", _croissant_type(part.type), "")
        | {"source": source | {"transform": {"jsonPath": part.name}}}
        for part in kind
    ]
    return said


def _field(name: str, kind: str, description: str) -> dict[str, Any]:
    said = {"@type": "cr:Field", "@id": name, "name": name, "dataType": kind}
    return said | ({"description": description} if description else {})


def _croissant_type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"
