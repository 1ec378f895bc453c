"""`pipeline inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipmill.cli import console


@click.command("inspect")
@click.argument("shards")
@console.json_option
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw spectrograms and histograms into this file.",
)
@click.option(
    "--where",
    "keep",
    metavar="EXPRESSION",
    help="Only the clips that fulfil this, such as 'silent < 0.9 and duration_s >= 1'.",
)
def command(shards: str, as_json: bool, plot: Path | None, keep: str | None) -> None:
    """Say what shards hold: clips, hours, durations, labels, folds, quality, what failed and why.

    SHARDS is a folder, a shard, or a brace range such as a/b-{000000..000012}.tar.

    \b
    Example:
      pipeline inspect data/tones/shards/webdataset-flac-44100
      pipeline inspect data/tones/shards/webdataset-flac-44100 --plot tones.png
      pipeline inspect SHARDS --where "silent < 0.9 and duration_s >= 1"
      pipeline inspect SHARDS --where "'dog' in labels and fold in [1, 2] and not clipped > 0"
    """
    from clipmill.shards.summary import summarize

    said = summarize(shards, keep)
    if plot is not None:
        from clipmill.report.plots import plot_shards

        plot_shards(shards, plot, keep=keep)
        console.say(f"drawn: {plot}")
    if as_json:
        console.print_json(said)
    else:
        _show(said)


def _show(said: dict[str, Any]) -> None:
    from clipmill.shards.summary import NARROW_HZ
    from clipmill.types import Failure

    spec, counts = said["spec"], said["counts"]
    click.echo(f"{said['name']}: {said['about'].get('title', '')}".rstrip(": "))
    click.echo(f"  {said['folder']}")
    click.echo(
        f"  {said['shards']} {spec['format']} shards, {said['bytes'] / 1e6:.1f} MB, {spec['encoding']}, mono, "
        f"{spec['sample_rate']} Hz, 16 bit"
    )
    of = "" if said["whole"] else "of the whole dataset: "
    click.echo(f"  {of}root sha256 {said['root_sha256']}")
    click.echo(
        f"  {of}{counts['in']} in = {counts['written']} written + {counts['failed']} failed + "
        f"{counts['skipped']} skipped\n"
    )
    if said["stopped"]:
        click.echo(f"not all shards are built: {said['stopped']}; `pipeline shard` goes on\n")
    kept = ""
    if said["where"] is not None:
        click.echo(f"where {said['where']}:")
        kept = f" of {said['clips_of']}"
    click.echo(
        f"{said['clips']}{kept} clips, {said['hours']:.2f} hours ({said['padded_hours']:.2f} with padding), "
        f"{said['classes']} classes, {said['groups']} groups"
    )
    spreads = [
        ("duration (s)", said["duration_s"], 1, 2),
        ("loudness (LUFS)", said["loudness_lufs"], 1, 2),
        ("peak (dB)", said["peak_db"], 1, 2),
        ("RMS (dB)", said["rms_db"], 1, 2),
        ("DC (% of full scale)", said["dc"], 100, 3),
        ("clipped (% of samples)", said["clipped"], 100, 3),
        ("silent (% of time)", said["silent"], 100, 1),
        ("bandwidth (kHz)", said["bandwidth_hz"], 1e-3, 2),
    ]
    names = ["min", "q1", "median", "q3", "max", "mean"]
    rows = [
        [title, *(f"{round(spread[n] * scale, digits) + 0.0:.{digits}f}" for n in names)]
        for title, spread, scale, digits in spreads
        if spread
    ]
    if rows:
        console.print_table("", ["", *names], rows)
        click.echo()
    for name, what in (
        ("clipped", "clipped somewhere"),
        ("more_than_half_silent", "silent for more than half of their time"),
        ("narrow", f"without anything above {NARROW_HZ / 1000:g} kHz"),
    ):
        if count := said["quality"][name]:
            click.echo(f"{what}: {count} clip{'s' * (count > 1)} ({count / said['clips']:.1%})")
    for title, tally in (
        ("seconds after padding", said["padded_seconds"]),
        ("splits", said["splits"]),
        ("folds", said["folds"]),
        ("source rates (Hz)", said["source_rates"]),
        ("source channels", said["source_channels"]),
    ):
        if tally:
            click.echo(f"{title}: " + ", ".join(f"{value}: {count}" for value, count in tally.items()))
    click.echo()
    labels = sorted(said["labels"].items(), key=lambda item: (-item[1], item[0]))
    shown = labels if len(labels) <= 60 else labels[:30] + labels[-30:]
    console.print_table("Labels", ["label", "clips"], shown)
    if len(shown) < len(labels):
        click.echo(f"(the 30 most and 30 least of {len(labels)}; --json has all)")
    if said["unlabelled"]:
        click.echo(f"{said['unlabelled']} clips have no label")
    if said["failures"] and said["whole"]:
        click.echo(f"\nNot in the shards: {len(said['failures'])}")
        console.say_losses([Failure(stage="", **row) for row in said["failures"]], print_line=click.echo)
