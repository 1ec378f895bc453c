"""`pipeline verify`."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from clipmill.cli import DONE, DONE_IN_PART, FAILED, console


@click.command("verify")
@click.argument("shards")
@click.option(
    "--repair",
    is_flag=True,
    help="Build broken and missing shards anew, from the media or from what they were converted from.",
)
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="With --repair: the folder that holds the dataset.  [default: that around SHARDS, or as elsewhere]",
)
@console.limit_options
@console.jobs_option
@console.json_option
def command(
    shards: str,
    repair: bool,
    root: Path | None,
    clip_timeout: float,
    clip_memory: int,
    jobs: int,
    as_json: bool,
) -> int:
    """Check every shard's and every clip's sha256, every count, and the root hash.

    SHARDS is a folder, a shard, or a brace range such as a/b-{000000..000012}.tar. Ends
    with 1 and names each problem if anything is missing, damaged, extra or miscounted.
    With --repair (of a whole folder) broken shards and tables are made anew first, sound
    shards are left alone, and files that do not belong are moved to set-aside/.

    \b
    Example:
      pipeline verify data/tones/shards/webdataset-flac-44100
      pipeline verify data/tones/shards/webdataset-flac-44100 --repair
    """
    from clipmill.shards.prepare import Limits
    from clipmill.shards.read import Shards
    from clipmill.shards.verify import verify

    mended = _repair(Path(shards), root, Limits(clip_timeout, clip_memory), jobs) if repair else None
    total = len(Shards.open(shards, ours=True).files)
    with console.progress("verify", total, "shards") as update:
        verdict = verify(shards, jobs, update)
    if as_json:
        console.print_json(asdict(verdict) | {"sound": not verdict.problems, "repaired": mended})
    else:
        for problem in verdict.problems:
            click.echo(f"problem: {problem}")
        click.echo(
            f"{'UNSOUND' if verdict.problems else 'sound'}: {verdict.shards} shards, {verdict.clips} clips, "
            f"{verdict.bytes / 1e6:.1f} MB, {len(verdict.problems)} problems"
            + (f"; root sha256 {verdict.root_sha256}" if verdict.root_sha256 else "")
        )
        if verdict.problems and not repair:
            console.say("to mend: `pipeline verify --repair` builds just the broken shards anew")
    if mended and mended["not_built"]:
        return DONE_IN_PART
    return FAILED if verdict.problems or (mended and mended["other"]) else DONE


def _repair(folder: Path, root: Path | None, limits: Any, jobs: int) -> dict[str, Any]:
    from clipmill.errors import ConfigError
    from clipmill.shards.repair import ASIDE, repair

    if not folder.is_dir():
        raise ConfigError(f"--repair is of a whole folder of shards, and {folder} is none")
    around = folder.resolve().parents
    if root is None:
        is_ours = len(around) > 2 and (around[1] / "fetch.json").is_file()
        root = around[2] if is_ours else console.default_root()

    def rebuild(info: dict[str, Any], records: Any) -> dict[str, Any]:
        if "converted_from" in info["made_from"]:
            return _convert_again(folder, info, jobs)
        return _shard_again(root, folder, info, records, limits, jobs)

    done = repair(folder, rebuild, jobs)
    for name in done.rebuilt:
        console.say(f"rebuilt: {name}")
    for name in done.other:
        console.say(
            f"rebuilt, with other bytes than were recorded: {name}; the old one is in {folder / ASIDE}"
        )
    for name in done.not_built:
        console.say(f"could not be built: {name}; what was there is in {folder / ASIDE}")
    for name in done.extra:
        console.say(f"moved to {folder / ASIDE}: {name}")
    return asdict(done)


def _shard_again(
    root: Path, folder: Path, info: dict[str, Any], records: Any, limits: Any, jobs: int
) -> dict[str, Any]:
    """Build what is missing of just the clips that the shards were planned for, as `pipeline shard` did."""
    from dataclasses import replace

    import pyarrow as pa
    import pyarrow.compute as pc

    from clipmill import tables
    from clipmill.errors import TableError
    from clipmill.fetch.fetched import load
    from clipmill.run import Local
    from clipmill.shards.account import FAILURES_FILE
    from clipmill.shards.job import make_shards
    from clipmill.shards.plan import ShardSpec, read_layout
    from clipmill.types import Failure

    got, layout = load(root, info["name"]), read_layout(folder)
    planned = layout.table["key"].combine_chunks() if layout else pa.array([], pa.string())
    losses = [loss for loss in got.losses if loss.key not in set(planned.to_pylist())]
    with contextlib.suppress(TableError, OSError):
        rows = tables.read_jsonl(folder / FAILURES_FILE)
        if tables.sha256_of(folder / FAILURES_FILE)[0] == info["files"][FAILURES_FILE]:
            losses = [Failure(**row) for row in rows if row["stage"] != "shard"]
    # Clips that came since are left to --append; what was lost before is wanted, and stays lost.
    manifest = got.manifest.filter(pc.is_in(got.manifest["key"], planned))
    lost = sorted({loss.key for loss in losses if loss.key})
    rest = tables.manifest_table({"key": lost, "source": [""] * len(lost), "labels": [[]] * len(lost)})
    got = replace(got, manifest=pa.concat_tables([manifest, rest]), losses=losses)
    with console.progress(f"repair {info['name']}", got.manifest.num_rows, "clips") as update:
        return make_shards(
            info["name"], got.manifest, got.losses, got.media_root, folder, ShardSpec(**info["spec"]),
            about=info["about"], made_from=info["made_from"], engine=Local(jobs), limits=limits,
            mend=records, update=update,
        )  # fmt: skip


def _convert_again(folder: Path, info: dict[str, Any], jobs: int) -> dict[str, Any]:
    """Convert what is missing, from the shards that the others came from."""
    from clipmill.run import Local
    from clipmill.shards.convert import convert

    source = (folder / info["made_from"]["converted_from"]).resolve()
    return convert(source, folder, info["spec"]["format"], info["spec"]["encoding"], engine=Local(jobs))
