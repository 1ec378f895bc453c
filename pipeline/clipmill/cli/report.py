"""`pipeline report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipmill.cli import DONE, DONE_IN_PART, console

if TYPE_CHECKING:
    from clipmill.loader import Bad


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--shards",
    "where",
    multiple=True,
    metavar="SHARDS",
    help="Where the clips are; may be given again.  [default: the shards that the run was trained on]",
)
@click.option(
    "--hardest",
    type=click.IntRange(0, 100),
    default=12,
    show_default=True,
    help="Clips to listen to: those of the highest loss.",
)
@console.device_option
@console.reading_options
def command(
    run: Path,
    where: tuple[str, ...],
    hardest: int,
    device: str,
    workers: int | None,
    max_bad: float,
    check: bool,
    cache: Path | None,
    read_timeout: float,
) -> int:
    """Write a run's report.html: figures, curves, confusions, each class, and the hardest clips to listen to.

    The run's best weights are scored on the clips that it held out; all figures go into evaluation.json beside
    the page. The page is one file that needs no network. For a folder of runs with a crossval.json it is a page over
    all of them, and each evaluated run whose own page is missing or older than its weights gets that first. A run
    whose own page cannot be made is named, the others are gone on with, and the exit code is 3.

    \b
    Example:
      pipeline report runs/x
      pipeline report runs/x --shards data/esc10/shards/webdataset-flac-44100 --hardest 30
      pipeline report runs/esc50-crossval
    """
    from clipmill.errors import ClipmillError, ConfigError
    from clipmill.loader import Feed
    from clipmill.report.folds_page import write_folds_page
    from clipmill.report.own_shards import own_shards
    from clipmill.report.run_files import part_of
    from clipmill.report.run_page import is_old, write_run_page
    from clipmill.shards.read import Shards
    from clipmill.train.checkpoint import CROSSVAL, read_config
    from clipmill.train.crossval import refreshed
    from clipmill.train.device import default_workers, pick_device

    place = pick_device(device)
    bad: list[Bad] = []
    lost = 0

    def tell(one: Bad) -> None:
        bad.append(one)
        console.say(str(one))

    def write(one: Path) -> Path:
        clips = part_of(read_config(one), "clips").get("held_out")
        opening: dict[str, Any] = {
            "cache": cache,
            "settings": {"timeout_s": read_timeout},
            "say": console.say,
        }
        shards = Shards.open(where, **opening) if where else own_shards(one, **opening)
        console.say_of(shards)
        ahead = default_workers(place, far=shards.far) if workers is None else workers
        feed = Feed(ahead, max_bad=max_bad, check=check)
        total = clips if isinstance(clips, int) else 0
        with console.progress(f"scoring {one.name}", total, "clips") as update:
            return write_run_page(one, shards, place, feed=feed, hardest=hardest, update=update, tell=tell)

    if (run / CROSSVAL).is_file():
        for entry in refreshed(run)["runs"]:
            one = run / entry["run"]
            if not is_old(one):
                continue
            try:
                console.say(f"report: {write(one)}")
            except ConfigError:  # of a flag, and so of every run
                raise
            except (ClipmillError, OSError) as error:
                lost += 1
                console.say(f"no page: {error}")
        page = write_folds_page(run)
    else:
        page = write(run)
    click.echo(b"report: " + os.fsencode(page))
    return DONE_IN_PART if bad or lost else DONE
