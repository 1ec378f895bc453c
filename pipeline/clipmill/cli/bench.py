"""`pipeline bench`: how fast things are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipmill.cli import DONE, console


@click.group("bench")
def command() -> None:
    """Measure this machine.

    \b
    Example:
      pipeline bench models
      pipeline bench models --model erann-1-6,cnn14 --batch 1,32 --dtype bf16 --compile
      pipeline bench loader SHARDS
    """


def _listed(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in (value or "").split(",") if part.strip())
    if value is not None and not parts:
        raise click.BadParameter(f"{value!r}: allowed is one or more, with commas between")
    return parts


def _counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    parts = _listed(context, parameter, value)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r}: allowed are whole numbers from 1 up, such as 1,32")
    return tuple(int(part) for part in parts)


@command.command("models")
@click.option(
    "--model",
    "models",
    metavar="NAMES",
    callback=_listed,
    help="Networks, with commas between.  [default: erann-1-6,cnn14, and ast where it is installed]",
)
@click.option(
    "--batch",
    "batches",
    metavar="SIZES",
    callback=_counts,
    default="1,32",
    show_default=True,
    help="Clips in a call, with commas between.",
)
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=10.0, show_default=True, help="Length of a clip."
)
@console.device_option
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="True float32, or bfloat16 by autocast.",
)
@click.option("--compile", "compiled", is_flag=True, help="Compile front end and network together first.")
@click.option(
    "--frontend",
    type=click.Choice(["on", "off"]),
    default="on",
    show_default=True,
    help="on: from sound at 44.1 kHz; off: from what the network itself takes.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=None,
    help="Turns that each network has.  [default: 50; on a CPU 5]",
)
@console.json_option
def models_command(
    models: tuple[str, ...], batches: tuple[int, ...], seconds: float, device: str, dtype: str,
    compiled: bool, frontend: str, rounds: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Time networks side by side, and set them beside the figures that their papers print.

    All of them take turns in one process. audios/s is clips a second; share is what the
    network makes of the device's own rate at a large product of matrices. A network that does
    not fit says OOM.

    \b
    Example:
      pipeline bench models
      pipeline bench models --model erann-1-6,erann-2-5,cnn14,ast --dtype bf16 --compile
      pipeline bench models --model erann-1-6 --batch 1 --frontend off --device cpu --json
    """  # fmt: skip
    from clipmill.train.bench import BenchSettings, bench_models, default_models
    from clipmill.train.device import pick_device

    place = pick_device(device)
    chosen = models or default_models()
    settings = BenchSettings(chosen, batches, seconds, dtype, compiled, frontend == "on", rounds or 0).on(
        place
    )
    with console.progress("bench", settings.rounds * len(settings.batches), "rounds") as update:
        report = bench_models(settings, place, update)
    if as_json:
        console.print_json(report)
        return DONE
    _show(report)
    return DONE


def _show(report: dict[str, Any]) -> None:
    columns: dict[str, list[str | None]] = {
        "model": [row["model"] for row in report["rows"]],
        "batch": [str(row["batch"]) for row in report["rows"]],
        "audios/s": [
            "OOM" if row["out_of_memory"] else f"{row['audios_per_s']:.1f}" for row in report["rows"]
        ],
        "ms": _column(report, "median_ms", "{:.1f}"),
        "p10": _column(report, "p10_ms", "{:.1f}"),
        "p90": _column(report, "p90_ms", "{:.1f}"),
        "params": _column(report, "parameters", "{:.1f} M", 1e6),
        "mult-adds": _column(report, "multiply_adds", "{:.1f} G", 1e9),
        "TFLOP/s": _column(report, "tflops", "{:.3g}"),
        "share": _column(report, "share_of_matrix_rate", "{:.0%}"),
        "GB": _column(report, "memory_bytes", "{:.2f}", 1e9),
        "paper": _column(report, "paper_audios_per_s", "{:.0f}"),
        "x paper": _column(report, "times_paper", "{:.2f}"),
        "x ast": _column(report, "times_ast", "{:.2f}"),
        "x cnn14": _column(report, "times_cnn14", "{:.2f}"),
    }
    # Memory on a CPU, a network that is not in this run: a column that says nothing is left out.
    said = {name: cells for name, cells in columns.items() if any(cells)}
    how = [report["dtype"], *(["compiled"] if report["compile"] else []),
           "from sound at 44.1 kHz" if report["frontend"] else "without the front end",
           f"clips of {report['seconds']:g} s", f"{report['rounds']} rounds"]  # fmt: skip
    console.print_table(
        f"{report['device']}, torch {report['torch']}: {', '.join(how)}",
        list(said),
        zip(*said.values(), strict=True),
    )
    rate, threads = report["matrix_tflops"], report["threads"]
    click.echo(f"\nmatrix rate {rate:.3g} TFLOP/s; {threads} CPU thread{'s' * (threads > 1)}")
    for line in report["protocol"]:
        click.echo(f"- {line}")


def _column(report: dict[str, Any], field: str, shape: str, unit: float = 1) -> list[str | None]:
    return [None if row[field] is None else shape.format(row[field] / unit) for row in report["rows"]]


@command.command("loader")
@click.argument("where", nargs=-1, required=True, metavar="SHARDS...")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Clips in a batch.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="For so long batches are taken, after the first.",
)
@click.option(
    "--clips",
    type=click.IntRange(min=1),
    default=None,
    help="Take batches of this many clips, after the first, instead of for --seconds.",
)
@click.option(
    "--crop-s",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Seconds cut from each clip at a random place; 0: whole clips.",
)
@click.option(
    "--sampling",
    type=console.SAMPLING,
    default="shuffled",
    show_default=True,
    help="Which clips come in which order.",
)
@console.access_option
@console.reading_options
@console.device_option
@console.json_option
def loader_command(
    where: tuple[str, ...], batch: int, seconds: float, clips: int | None, crop_s: float, sampling: str, access: str,
    workers: int | None, max_bad: float, check: bool, cache: Path | None, read_timeout: float, device: str,
    as_json: bool,
) -> int:  # fmt: skip
    """Time how fast batches of clips come to the device, and say what bounds that.

    SHARDS are what `pipeline train` takes: folders, shards or ranges, here or at URLs, ours or
    others'. First the loader runs as it does in training. Then decoding, reading and copying
    are each timed alone, with as many threads and clips of the same run: the floors. The
    slowest of them bounds the loader, or the loader itself does. Without --workers there is
    one thread for each core, 8 at most.

    \b
    Example:
      pipeline bench loader data/esc10/shards/webdataset-flac-44100
      pipeline bench loader SHARDS --crop-s 5 --sampling balanced --workers 4 --seconds 30
      pipeline bench loader s3://bucket/audioset --access stream --clips 2000 --json
    """
    from clipmill.loader import Feed
    from clipmill.loader.bench import LoaderSettings, bench_loader, default_workers
    from clipmill.train.device import pick_device

    place = pick_device(device)
    feed = Feed(default_workers() if workers is None else workers, access, max_bad=max_bad, check=check)
    settings = LoaderSettings(where, batch, seconds, clips or 0, crop_s, sampling, feed, cache, read_timeout)
    report = bench_loader(settings, place, opened=console.say_of, say=console.say)
    if as_json:
        console.print_json(report)
        return DONE
    _show_loader(report)
    return DONE


def _show_loader(report: dict[str, Any]) -> None:
    crop = f"crops of {report['crop_s']:g} s" if report["crop_s"] else "whole clips"
    order = report["sampling"] if report["access"] == "random" else "streamed"
    workers = f"{report['workers']} thread{'s' * (report['workers'] != 1)} of {report['cores']} cores"
    how = f"{order}, {crop}, batches of {report['batch']}, {workers}, {report['device']}"
    bad = ", ".join(f"{count} {reason}" for reason, count in sorted(report["bad_reasons"].items()))
    rows = [
        ("clips/s", f"{report['clips_per_s']:.1f}"),
        ("x real time", f"{report['times_real_time']:.0f}"),
        ("read", _mb(report["read_mb_per_s"])),
        ("int16", _mb(report["delivered_mb_per_s"])),
        ("CPU ms per clip", f"{report['cpu_ms_per_clip']:.2f}"),
        ("s to open", f"{report['open_s']:.3f}"),
        ("s to first batch", f"{report['first_batch_s']:.3f}"),
        ("memory", f"{console.size(report['memory_bytes'])}, {_grown(report['memory_growth_bytes'])} since the "
                   f"first batch, {console.size(report['peak_memory_bytes'])} at most"),
        ("bad clips", f"{report['bad_clips']}{f' ({bad})' if bad else ''}"),
        *((_FLOORS[name][0], f"{floor['clips_per_s']:.1f} clips/s, {_mb(floor['mb_per_s'])}, CPU "
                             f"{floor['cpu_ms_per_clip']:.2f} ms per clip; {_FLOORS[name][1]}")
          for name, floor in sorted(report["floors"].items())),
    ]  # fmt: skip
    click.echo(f"{report['clips']} clips in {report['seconds']:.2f} s: {how}")
    for name, found in rows:
        click.echo(f"  {name:<18}{found}")
    click.echo(report["bound"])
    if report["advice"]:
        click.echo(report["advice"])


_FLOORS = {
    "decode": ("decoding alone", "from memory"),
    "store": ("reading alone", "from the page cache, the disk or afar, as they come"),
    "device": ("copying alone", "pinned memory to the device"),
}
"""What each floor is called, and where its bytes come from."""


def _mb(rate: float | None) -> str:
    return "the HDF5 library does not say how many MB/s" if rate is None else f"{rate:.1f} MB/s"


def _grown(count: int) -> str:
    return f"{'-' if count < 0 else '+'}{console.size(abs(count))}"
