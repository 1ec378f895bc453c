"""The dataset card beside the shards: licence, citation, how they were made, what is in them, how to read them.

Markdown under YAML, as the Hugging Face Hub has it. It is made of dataset.json and the index
alone: equal shards give an equal card, without a date or a path.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from itertools import groupby
from string import Template
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.audio import SUFFIXES
from clipmill.shards.plan import FORMATS
from clipmill.types import REASONS

COLUMNS = {
    "key": "the clip's name, unique in the dataset",
    "shard": "file name of the shard that holds it",
    "row": "its position in the shard, from 0",
    "offset": "bytes from the start of the shard to the audio",
    "length": "bytes of the audio",
    "samples": "length in samples, after zero-padding to a whole number of seconds",
    "labels": "names of its classes; empty where it has none",
    "split": "train, balanced_train, unbalanced_train, valid, eval, noise (background to mix in), or all (no split)",
    "fold": "official cross-validation part; null where the dataset has none",
    "group": "what must not straddle folds (recording, actor, speaker, video); null where not known",
    "source": "the raw media file it was cut from",
    "start_s": "where it begins in the source, in seconds; null: at its beginning",
    "end_s": "where it ends in the source, in seconds; null: at its end",
    "sha256": "of the samples as int16 little-endian",
    "duration_s": "seconds before padding",
    "source_rate": "sample rate of the source in Hz",
    "source_channels": "channels of the source, before the mix to mono",
    "peak_db": "highest sample, in dB re full scale",
    "rms_db": "level before padding, in dB re full scale",
    "loudness_lufs": "integrated loudness (ITU-R BS.1770); null under 0.4 s or below the gate",
    "dc": "mean of the samples, full scale = 1",
    "clipped": "share of the samples, 0 to 1, that lie at the top or bottom of the scale in runs of two and more",
    "silent": "share of its time, 0 to 1, in which no sample reaches -60 dB re full scale",
    "bandwidth_hz": "highest frequency in Hz that stands 10 dB above the noise of 16-bit rounding; 0: none does",
    "events": "what sounds when, in seconds from the clip's start; null where the dataset does not say",
}
"""Column of the index -> what it holds."""

_PLACES = {"row", "offset", "length", "samples", "fold", "start_s", "end_s"}
"""Numbers that say where a clip is, and nothing of how it sounds."""

_TOP_CLASSES = 50
"""Classes the card lists, at most; AudioSet has 527."""

_HUB_LICENCES = {
    *(f"cc-by-{v}" for v in ("2.0", "2.5", "3.0", "4.0")),
    *(f"cc-by-sa-{v}" for v in ("3.0", "4.0")),
    *(f"cc-by-nc-{v}" for v in ("2.0", "3.0", "4.0")),
    *(f"cc-by-nc-sa-{v}" for v in ("2.0", "3.0", "4.0")),
    *(f"cc-by-nc-nd-{v}" for v in ("3.0", "4.0")),
    "cc-by-nd-4.0", "cc0-1.0", "apache-2.0", "mit",
}  # fmt: skip
"""The licences that the Hugging Face Hub has a name for, as far as audio comes under them."""


def card(dataset: dict[str, Any], index: pa.Table) -> str:
    """The text of the card, of what dataset.json says and of the index; anything may be absent from its `about`."""
    about, spec, counts = dataset["about"], dataset["spec"], dataset["counts"]
    hours = (pc.sum(index["duration_s"]).as_py() or 0.0) / 3600
    size = sum(shard["bytes"] for shard in dataset["shards"])
    parts = [
        _front_matter(dataset, index),
        f"# {_text(dataset['name'])}",
        f"**{_text(about['title'])}**" if about.get("title") else "",
        _text(about.get("description", "")),
        f"{index.num_rows} clips, {hours:.2f} hours, {len(dataset['labels'])} classes, in "
        f"{len(dataset['shards'])} {spec['format']} shards ({size / 1e6:.1f} MB): {spec['encoding']}, mono, 16 bit, "
        f"{spec['sample_rate']} Hz, each clip zero-padded to a whole number of seconds.",
        f"Homepage: <{about['homepage']}>" if about.get("homepage") else "",
        "## Licence",
        _licence_in_words(about),
        "## Citation",
        "\n\n".join(_fenced("bibtex", text) for text in citations(about, index)) or "Not stated.",
        "## How it was made",
        *_making(dataset),
        "### What became of every clip",
        f"{counts['in']} in = {counts['written']} written + {counts['failed']} failed + {counts['skipped']} skipped."
        + (" Each that is not here is a row of `failures.jsonl`." if counts["reasons"] else ""),
        _table(["reason", "clips", "meaning"], [[k, n, REASONS.get(k, "")] for k, n in counts["reasons"].items()]),
        "## What is in it",
        *_contents(dataset, index),
        "## How to read it",
        *_snippets(dataset, index),
        "## Columns of the index",
        "`index.parquet` has one row a clip, in the order of the shards.",
        _table(["column", "type", "nullable", "what it holds"], [
            [f"`{f.name}`", _kind(f.type), "yes" if f.nullable else "", COLUMNS.get(f.name, "")] for f in index.schema
        ]),
        "`croissant.json` says the same for tools ([Croissant](https://docs.mlcommons.org/croissant), record set "
        "`clips`); `dataset.json` has every setting, count and checksum.",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(dataset: dict[str, Any], index: pa.Table) -> str:
    """The card's YAML, of scalars and lists as JSON writes them, which YAML reads."""
    about = dataset["about"]
    licence, hub = about.get("licence", ""), hub_licence(about)
    said: dict[str, Any] = {
        "pretty_name": title(dataset),
        "license": hub or ("other" if licence else "unknown"),
        "task_categories": ["audio-classification"],
        "size_categories": [_size_category(index.num_rows)],
        "tags": ["audio", dataset["spec"]["format"], "croissant", "clipmill"],
    }
    if licence and not hub:
        said["license_name"] = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")
        if about.get("licence_url"):
            said["license_link"] = about["licence_url"]
    lines = []
    for name, value in said.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {_one_line(item)}" for item in value)]
        else:
            lines.append(f"{name}: {json.dumps(_one_line(value), ensure_ascii=False)}")
    return "\n".join(["---", *lines, "---"])


def _size_category(clips: int) -> str:
    """The Hub's word for how many clips there are."""
    words = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    place = max(len(str(clips)) - 3, 0)
    return f"{words[place - 1]}<n<{words[place]}" if place else "n<1K"


def hub_licence(about: dict[str, Any]) -> str | None:
    """The Hub's name of a licence that covers everything; None for one with ifs and buts, or none."""
    name = "-".join(about.get("licence", "").lower().split())
    return name if name in _HUB_LICENCES else None


def _licence_in_words(about: dict[str, Any]) -> str:
    if not about.get("licence"):
        return "Not stated."
    url = about.get("licence_url")
    return _text(about["licence"]) + (f" (<{url}>)" if url else "")


def citations(about: dict[str, Any], index: pa.Table) -> list[str]:
    """What to cite, in BibTeX; the strong labels have a paper of their own."""
    names = ["citation"]
    if index["events"].null_count < index.num_rows:
        names.append("strong_citation")
    return [about[name].strip() for name in names if about.get(name, "").strip()]


def _making(dataset: dict[str, Any]) -> list[str]:
    about = dataset["about"]
    lock = ""
    if about.get("lock_id"):
        day = about.get("lock_as_of", "no stated day")
        lock = f"The clips are those of the lock `{about['lock_id']}`, as of {day}."
    return [
        "Each clip was decoded, mixed to mono, resampled, zero-padded to a whole number of seconds and packed by "
        "clipmill's `pipeline shard`. The same media, settings and versions give the same bytes.",
        lock,
        _table(["setting", "value"], [[f"`{name}`", value] for name, value in dataset["spec"].items()]),
        _table(["made with", "version"], dataset["versions"].items()),
        f"The root sha256 of all shards is `{dataset['root_sha256']}`: that of the lines `<sha256>  <file name>`, as "
        "sha256sum prints them, in order of name. `pipeline verify .` checks it, every shard and every clip.",
    ]


def _contents(dataset: dict[str, Any], index: pa.Table) -> list[str]:
    seconds = index.group_by("split").aggregate([("duration_s", "sum"), ("key", "count")]).sort_by("split")
    ranges = globs(dataset)
    splits = [
        [
            row["split"],
            row["key_count"],
            f"{row['duration_s_sum'] / 3600:.2f}",
            ", ".join(f"`{glob}`" for glob in ranges[row["split"]]),
        ]
        for row in seconds.to_pylist()
    ]
    clips = _tally(pc.list_flatten(index["labels"]))
    ids = {label: place for place, label in enumerate(dataset["labels"])}
    classes = sorted(ids, key=lambda label: (-clips.get(label, 0), label))
    shown = [[ids[label], _text(label), clips.get(label, 0)] for label in classes[:_TOP_CLASSES]]
    unlabelled = pc.sum(pc.equal(pc.list_value_length(index["labels"]), 0)).as_py() or 0
    spreads = [
        [f"`{f.name}`", *(f"{round(value, 4) + 0:g}" for value in spread)]
        for f in index.schema
        if f.name not in _PLACES and (pa.types.is_floating(f.type) or pa.types.is_integer(f.type))
        if (spread := pc.quantile(index[f.name], [0, 0.25, 0.5, 0.75, 1]).to_pylist())[0] is not None
    ]
    folds = sorted(_tally(pc.drop_null(index["fold"])).items())
    groups = pc.count_distinct(index["group"]).as_py()
    return [
        _table(["split", "clips", "hours", "shards"], splits),
        _table(["fold", "clips"], folds),
        f"{groups} groups: what must not straddle folds (`group` in the index)." if groups else "",
        f"The {len(shown)} most frequent of {len(classes)} classes:" if len(shown) < len(classes) else "",
        _table(["id", "class", "clips"], shown),
        f"{unlabelled} clips have no label." if unlabelled else "",
        "What the clips measure:" if spreads else "",
        _table(["", "least", "lower quartile", "median", "upper quartile", "greatest"], spreads),
    ]


def globs(dataset: dict[str, Any]) -> dict[str, list[str]]:
    """Split -> its shards, as names and brace ranges as WebDataset takes them: one, unless some were not built."""
    pattern = re.compile(re.escape(dataset["name"]) + r"-(\w+)-(\d{6})\.(\w+)")
    numbers: dict[str, list[int]] = defaultdict(list)
    for shard in dataset["shards"]:
        if match := pattern.fullmatch(shard["shard"]):
            numbers[match[1]].append(int(match[2]))
    return {
        split: [
            f"{dataset['name']}-{split}-{_range([n for _, n in run])}.{FORMATS[dataset['spec']['format']]}"
            for _, run in groupby(enumerate(sorted(numbers[split])), key=lambda pair: pair[1] - pair[0])
        ]
        for split in sorted(numbers)
    }


def _range(numbers: list[int]) -> str:
    """Numbers that follow each other, as they stand in shards' names."""
    first, last = f"{numbers[0]:06d}", f"{numbers[-1]:06d}"
    return first if first == last else f"{{{first}..{last}}}"


def _snippets(dataset: dict[str, Any], index: pa.Table) -> list[str]:
    """Python that reads these very shards, run from their folder."""
    if not index.num_rows:
        return ["There is no clip to read."]
    spec = dataset["spec"]
    if spec["format"] == "webdataset":
        split = max(sorted(_tally(index["split"]).items()), key=lambda item: item[1])[0]
        title, reader = (
            "In order, with webdataset:",
            _WEBDATASET.substitute(
                shards="::".join(globs(dataset)[split]), suffix=SUFFIXES[spec["encoding"]]
            ),
        )
    else:
        template = _H5PY_FLAC if spec["encoding"] == "flac" else _H5PY_PCM
        title, reader = "With h5py:", template.substitute(shard=index["shard"][0].as_py())
    return [
        "From the folder of the shards.",
        title,
        _fenced("python", reader),
        "Any clip at random, with clipmill:",
        _fenced("python", _CLIPMILL),
        "The index alone:",
        _fenced("python", _INDEX),
    ]


_WEBDATASET = Template("""
import io
import json

import soundfile
import webdataset

for sample in webdataset.WebDataset("$shards", shardshuffle=False):
    wave, rate = soundfile.read(io.BytesIO(sample["$suffix"]), dtype="int16")
    print(sample["__key__"], json.loads(sample["json"])["labels"], len(wave) / rate, "s")
""")

_H5PY_PCM = Template("""
import json

import h5py

with h5py.File("$shard") as file:
    labels = json.loads(file.attrs["labels"])
    for key, wave, target in zip(file["audio_name"], file["waveform"], file["target"]):
        print(key.decode(), [labels[i] for i in target.nonzero()[0]], len(wave) / file.attrs["sample_rate"], "s")
""")

_H5PY_FLAC = Template("""
import io
import json

import h5py
import soundfile

with h5py.File("$shard") as file:
    labels = json.loads(file.attrs["labels"])
    for key, flac, target in zip(file["audio_name"], file["flac"], file["target"]):
        wave, rate = soundfile.read(io.BytesIO(flac.tobytes()), dtype="int16")
        print(key.decode(), [labels[i] for i in target.nonzero()[0]], len(wave) / rate, "s")
""")

_CLIPMILL = """
from clipmill.shards.read import Shards

shards = Shards.open(".")
wave = shards.read(len(shards) - 1)
print(shards.index["key"][-1], shards.index["labels"][-1], len(wave) / shards.sample_rate, "s")
"""

_INDEX = """
import pyarrow.parquet as pq

print(pq.read_table("index.parquet", columns=["key", "labels", "duration_s", "loudness_lufs"]).slice(0, 3).to_pylist())
"""


def title(dataset: dict[str, Any]) -> str:
    """What the dataset is called by those who made it, or else by us."""
    return " ".join(dataset["about"].get("title", "").split()) or str(dataset["name"])


def _tally(values: pa.ChunkedArray) -> dict[Any, int]:
    """Value -> how often it stands there."""
    return {row["values"]: row["counts"] for row in pc.value_counts(values).to_pylist()}


def _kind(kind: pa.DataType) -> str:
    """A column's type as NumPy and Arrow users know it, for a table."""
    plain = re.sub(r"\b(element|item): | not null", "", str(kind))
    return f"`{plain.replace('float', 'float32').replace('double', 'float64')}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _text(text: str) -> str:
    """Words that Markdown shows as they are, on one line: what would format, link or end a cell is escaped."""
    return re.sub(r"[\\`*<>\[\]|~&$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", _one_line(text))


def _fenced(language: str, text: str) -> str:
    """A block of code, in a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _table(heads: list[str], rows: Any) -> str:
    """A Markdown table, or nothing where there are no rows; the cells are Markdown already."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    rule = "|" + " --- |" * len(heads)
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *lines]) if lines else ""
