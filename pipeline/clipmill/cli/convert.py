"""`pipeline convert`."""

from __future__ import annotations

from pathlib import Path

import click

from clipmill.cli import DONE, DONE_IN_PART, console


@click.command("convert")
@click.argument("shards")
@click.option(
    "--format",
    type=click.Choice(["webdataset", "hdf5"]),
    default=None,
    help="Of the new shards.  [default: the one that SHARDS do not have]",
)
@click.option(
    "--encoding",
    type=click.Choice(["flac", "pcm16"]),
    default=None,
    help="How samples are kept.  [default: flac in webdataset, pcm16 in hdf5]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of the new shards.  [default: FORMAT-ENCODING-RATE beside SHARDS]",
)
@click.option("--overwrite", is_flag=True, help="Convert all shards anew, whatever is there.")
@console.engine_options
@console.json_option
def command(
    shards: str,
    format: str | None,
    encoding: str | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    **engine_fields: object,
) -> int:
    """Convert shards between WebDataset and HDF5, sample for sample.

    SHARDS is a folder. Shards keep their names but for the extension, clips their place, facts
    and samples; what was lost when the shards were made stays in the account. Interrupted, the
    same command goes on.

    \b
    Example:
      pipeline convert data/tones/shards/webdataset-flac-44100
      pipeline convert data/tones/shards/hdf5-pcm16-44100 --format webdataset --encoding pcm16
    """
    from clipmill.run.choose import choose
    from clipmill.shards.convert import convert
    from clipmill.shards.plan import DEFAULT_ENCODING
    from clipmill.shards.read import Shards

    source = Shards.open(shards, ours=True)
    format = format or next(name for name in DEFAULT_ENCODING if name != source.info["spec"]["format"])
    encoding = encoding or DEFAULT_ENCODING[format]
    out = out or source.folder.resolve().parent / f"{format}-{encoding}-{source.sample_rate}"
    engine = choose(folder=out / "slurm", **engine_fields)  # type: ignore[arg-type]
    with console.progress(f"convert {source.name}", len(source), "clips") as update:
        made = convert(shards, out, format, encoding, engine=engine, overwrite=overwrite, update=update)
    size = sum(entry["bytes"] for entry in made["shards"])
    console.say(
        f"{source.name}: {made['counts']['written']} clips in {len(made['shards'])} {format} shards, "
        f"{size / 1e6:.1f} MB, in {out}"
    )
    if as_json:
        said = ("name", "counts", "root_sha256", "stopped")
        console.print_json({"folder": str(out), **{k: made[k] for k in said}})
    if made["stopped"]:
        console.say(f"stopped: {made['stopped']}; the same command goes on")
        return DONE_IN_PART
    console.say(f"next: pipeline inspect {out}")
    return DONE
