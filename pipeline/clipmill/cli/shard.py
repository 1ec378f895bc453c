"""`pipeline shard`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipmill.cli import DONE, DONE_IN_PART, console

_PASSING = {"missing", "unreadable", "timeout", "memory", "crash", "tool-error"}
"""Reasons that may be the machine's and not the clip's."""


@click.command("shard")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@console.root_option
@click.option(
    "--format",
    type=click.Choice(["webdataset", "hdf5"]),
    default="webdataset",
    show_default=True,
    help="Plain WebDataset tars, or HDF5 as PANNs lays it out.",
)
@click.option(
    "--encoding",
    type=click.Choice(["flac", "pcm16"]),
    default=None,
    help="How samples are kept: both are lossless 16 bit; flac is smaller, pcm16 needs no decoding.  "
    "[default: flac in webdataset, pcm16 in hdf5]",
)
@click.option(
    "--sample-rate", type=click.IntRange(1000, 384000), default=44100, show_default=True, help="Hz."
)
@click.option(
    "--clips-per-shard",
    type=click.IntRange(1, 1_000_000),
    default=256,
    show_default=True,
    help="Clips planned for each shard; those that fail leave it shorter.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the order of clips over the shards.",
)
@click.option(
    "--decoder",
    type=click.Choice(["auto", "ffmpeg"]),
    default="auto",
    show_default=True,
    help="auto decodes in process; ffmpeg runs a process of its own for each clip.",
)
@click.option("--keep-silent", is_flag=True, help="Keep clips of which every sample is zero.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of the shards.  [default: ROOT/NAME/shards/FORMAT-ENCODING-RATE]",
)
@click.option(
    "--lock",
    "lock_file",
    type=click.Path(path_type=Path),
    default=None,
    help="Take just the clips that this lock names (`pipeline lock`).",
)
@click.option("--append", is_flag=True, help="Put clips that came since into new shards, after those there.")
@click.option(
    "--retry",
    metavar="REASONS",
    default="",
    help="Build those shards anew that lost clips for one of these reasons, such as timeout,memory.",
)
@click.option("--overwrite", is_flag=True, help="Build all shards anew, whatever is there.")
@console.limit_options
@console.engine_options
@console.json_option
def command(
    names: tuple[str, ...],
    root: Path,
    out: Path | None,
    lock_file: Path | None,
    clip_timeout: float,
    clip_memory: int,
    retry: str,
    as_json: bool,
    **fields: Any,
) -> int:
    """Decode, mix to mono, resample, zero-pad to whole seconds and pack clips into shards.

    NAME is a dataset fetched under --root; without one, all of them are sharded. One bad
    clip never ends the job: it becomes a row of failures.jsonl. Interrupted or killed, the
    same command goes on: finished shards are not touched, and the bytes come out the same
    from every engine and any number of jobs.

    \b
    Example:
      pipeline shard esc10 --format webdataset --encoding flac --jobs 2
      pipeline shard --format hdf5
      pipeline shard audioset --append
      pipeline shard audioset --engine slurm --partition cpu --time 4:00:00 --mem 4000 --max-jobs 64
    """  # fmt: skip
    from clipmill.errors import ConfigError, FetchError
    from clipmill.fetch.fetched import fetched_names
    from clipmill.shards.plan import DEFAULT_ENCODING, ShardSpec
    from clipmill.shards.prepare import Limits
    from clipmill.types import REASONS

    how = {name: fields.pop(name) for name in ("append", "overwrite")}
    how["retry"] = set(filter(None, retry.split(",")))
    if unknown := sorted(how["retry"] - set(REASONS)):
        raise ConfigError(f"--retry {unknown[0]}: no such reason; known: {', '.join(REASONS)}")
    how["limits"] = Limits(clip_timeout, clip_memory)
    engine_fields = {name: fields.pop(name) for name in console.ENGINE_FIELDS}
    spec = ShardSpec(**{**fields, "encoding": fields["encoding"] or DEFAULT_ENCODING[fields["format"]]})
    chosen = list(names) or fetched_names(root)
    if not chosen:
        raise FetchError(f"nothing has been fetched under {root}: try `pipeline fetch tones --root {root}`")
    for flag, given, what in (("--out", out, "one folder"), ("--lock", lock_file, "of one dataset")):
        if given is not None and len(chosen) > 1:
            raise ConfigError(f"{flag} is {what}, but {len(chosen)} are asked for: {', '.join(chosen)}")
    made = [_shard(name, root, out, spec, lock_file, engine_fields, how) for name in chosen]
    if as_json:
        console.print_json(made)
    return DONE_IN_PART if any(m["counts"]["failed"] or m["stopped"] for m in made) else DONE


def _shard(
    name: str,
    root: Path,
    out: Path | None,
    spec: Any,
    lock_file: Path | None,
    engine_fields: dict[str, Any],
    how: dict[str, Any],
) -> dict[str, Any]:
    from dataclasses import replace

    from clipmill import tables
    from clipmill.fetch.fetched import load, restricted, state_of
    from clipmill.fetch.lock import read_lock
    from clipmill.shards.job import make_shards, unchanged

    folder, made_from = out or root / name / "shards" / spec.folder, state_of(root, name)
    lock = None
    if lock_file is not None:
        lock = read_lock(lock_file, name)
        made_from["lock"] = lock.id
    if not how["overwrite"] and not how["retry"] and (dataset := unchanged(folder, spec, made_from)):
        console.say(f"{name}: all shards are there, and nothing has changed since")
        return _told(name, folder, dataset)
    got = load(root, name)
    if lock is not None:
        got = restricted(got, lock.keys, f"stands in {Path(str(lock_file)).name}, and was not fetched")
        got = replace(got, about={**got.about, "lock_id": lock.id, "lock_as_of": lock.as_of})
    elif got.left:
        console.say(
            f"note: {got.left} clips of {name} are not fetched yet; the shards hold what is had so far"
        )
    engine = console.choose_engine(engine_fields, folder, fresh=how["overwrite"])
    with console.progress(f"shard {name}", got.counts["had"], "clips") as update:
        dataset = make_shards(
            name, got.manifest, got.losses, got.media_root, folder, spec,
            about=got.about, made_from=made_from, engine=engine, update=update, **how,
        )  # fmt: skip
    if lock is not None and not dataset["stopped"]:
        lost = {row["key"] for row in tables.read_jsonl(folder / "failures.jsonl")}
        _account_for(lock, got, folder, lost, engine_fields["jobs"] or 1)
    return _told(name, folder, dataset)


def _told(name: str, folder: Path, dataset: dict[str, Any]) -> dict[str, Any]:
    """Print the account of the shards of a dataset."""
    from clipmill import tables
    from clipmill.types import Failure

    counts = dataset["counts"]
    size = sum(shard["bytes"] for shard in dataset["shards"])
    console.say(
        f"{name}: {counts['in']} in = {counts['written']} written + {counts['failed']} failed + "
        f"{counts['skipped']} skipped; {len(dataset['shards'])} shards, {size / 1e6:.1f} MB, in {folder}"
    )
    path = folder / "failures.jsonl"
    rows = tables.read_jsonl(path) if path.is_file() and "files" in dataset else []
    console.say_losses([Failure(**row) for row in rows])
    if rows:
        console.say(f"  all of them: {path}")
    if again := sorted({row["reason"] for row in rows if row["stage"] == "shard"} & _PASSING):
        console.say(f"  what may have passed by now: --retry {','.join(again)} has another try at these")
    if dataset["stopped"]:
        console.say(f"stopped: {dataset['stopped']}; the same command goes on")
    else:
        console.say(f"next: pipeline inspect {folder}")
    return {"folder": str(folder), **{k: dataset[k] for k in ("name", "counts", "root_sha256", "stopped")}}


def _account_for(lock: Any, got: Any, folder: Path, lost: set[str], jobs: int) -> None:
    """Say which clips of the lock the shards hold as it names them, and write it down beside them."""
    from clipmill import tables
    from clipmill.fetch.lock import compare, in_words, make_lock

    found = compare(lock, make_lock(got, jobs)[0].without(lost))
    account = {
        "id": lock.id,
        "as_of": lock.as_of,
        "clips": len(lock),
        "same": found.same,
        "other_content": found.other_content,
        "absent": found.only_first,
    }
    tables.write_json(folder / "lock.json", account)
    console.say(f"{in_words(lock, found)}; which: {folder / 'lock.json'}")
