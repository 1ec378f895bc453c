"""`pipeline predict`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from clipmill.cli import DONE, DONE_IN_PART, FAILED, console


@click.command("predict")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--top", type=click.IntRange(min=1), default=3, show_default=True, help="Predictions for each file."
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=None,
    show_default="10, or what the network takes",
    help="Seconds heard at a time: longer files are cut, and the probabilities averaged.",
)
@console.weights_option
@console.device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead of a table.")
def command(
    run: Path, files: tuple[str, ...], top: int, window: int | None, weights: str, device: str, as_json: bool
) -> int:
    """Say what is heard in sound files of any format and length.

    A file that cannot be decoded becomes a row that says why; the exit code is then 3, or 1
    when no file could be.

    \b
    Example:
      pipeline predict runs/x dog.ogg rain.mp3
      pipeline predict runs/x *.wav --top 5 --json
    """  # fmt: skip
    from clipmill.train.checkpoint import read_run
    from clipmill.train.device import pick_device
    from clipmill.train.predict import predict_files

    place = pick_device(device)
    trained = read_run(run, place, weights)
    rows: list[tuple[str, str | None, str]] = []
    failed = 0
    for prediction in predict_files(trained, files, place, window_s=window):
        row = prediction.row(trained.labels, top)
        failed += prediction.reason is not None
        if as_json:
            click.echo(json.dumps(row, ensure_ascii=False))
        elif prediction.reason is not None:
            console.say(f"{row['file']}: {row['reason']}: {row['message']}")
            rows.append((row["file"], None, f"({row['reason']})"))
        else:
            heard = ", ".join(f"{p['label']} {p['probability']:.3f}" for p in row["predictions"])
            rows.append((row["file"], f"{row['seconds']:.2f}", heard))
    if not as_json:
        console.print_table("", ("file", "seconds", "heard"), rows)
    if failed == len(files):
        return FAILED
    return DONE_IN_PART if failed else DONE
