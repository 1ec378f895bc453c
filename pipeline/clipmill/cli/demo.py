"""`pipeline demo`: the whole way, by the very commands a user would type."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import click

from clipmill.cli import DONE, DONE_IN_PART, FAILED, cli, console


@click.command("demo")
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Folder that everything is written to.",
)
@console.device_option
def command(root: Path, device: str) -> int:
    """Go the whole way on a synthetic collection: fetch, shard, verify, train, evaluate, predict.

    Needs no network and a few minutes on two CPU cores. Interrupted, it goes on where it was.

    \b
    Example:
      pipeline demo
      pipeline demo --root /tmp/demo --device cpu
    """
    from clipmill.datasets.tones import write_unseen

    start = time.monotonic()
    data, run = root / "data", root / "runs" / "tones"
    shards = data / "tones" / "shards" / "webdataset-flac-44100"
    _step("A collection is made: 300 clips in six formats, a few of them broken on purpose")
    _call("fetch", "tones", "--root", data)
    _step("It becomes shards: mono, 44.1 kHz, whole seconds; what cannot be had is accounted for")
    _call("shard", "tones", "--root", data)
    _step("Every byte is checked, and looked at")
    _call("verify", shards)
    _call("inspect", shards, "--plot", root / "tones.png")
    _step("A tagger is trained on folds 2 to 5")
    _call("train", "--shards", shards, "--fold", 1, "--out", run, "--device", device, "--resume")
    _step("It is scored on fold 1, which it was not trained on")
    _call("evaluate", run, "--shards", shards, "--device", device)
    _step("It listens to ten new files")
    unseen = write_unseen(root / "unseen")
    _call("predict", run, *(path for path, _ in unseen), "--device", device)
    return _last_screen(root, shards, run, unseen, device, time.monotonic() - start)


def _step(what: str) -> None:
    console.say(f"\n--- {what}")


def _call(*arguments: object) -> None:
    """Run a command as its user would, shown first; anything but done (in part) ends the demo."""
    words = [str(argument) for argument in arguments]
    console.say(f"$ pipeline {shlex.join(words)}\n")
    code = cli.main(words, standalone_mode=False)
    if code not in (None, DONE, DONE_IN_PART):
        raise SystemExit(code)


def _last_screen(
    root: Path, shards: Path, run: Path, unseen: list[tuple[Path, str]], device: str, seconds: float
) -> int:
    """What was made, how good it is, and what to try next."""
    from clipmill.shards.summary import summarize
    from clipmill.train.checkpoint import read_run
    from clipmill.train.device import pick_device
    from clipmill.train.predict import predict_files

    place = pick_device(device)
    trained = read_run(run, place, "best")
    said = summarize(shards)
    right = sum(
        prediction.rows(trained.labels, 1)[0]["predictions"][0]["label"] == label
        for prediction, (_, label) in zip(
            predict_files(trained, [path for path, _ in unseen], place), unseen, strict=True
        )
        if prediction.scores is not None
    )
    figures: dict[str, Any] = _figures(run)
    accuracy = figures["last"]["accuracy"]
    counts = said["counts"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts["reasons"].items())
    click.echo(f"""
================================================================================
 Done in {seconds:.0f} s. From {counts["in"]} raw files to a trained tagger:

   clips     {counts["written"]} written + {counts["failed"]} failed ({reasons})
   shards    {said["shards"]} tars, {said["bytes"] / 1e6:.0f} MB, {said["hours"] * 60:.0f} minutes of sound
   tagger    {trained.config["model"]}, trained on folds 2 to 5
   accuracy  {accuracy:.3f} on fold 1 at the last step ({figures["best"]["accuracy"]:.3f} at the best); chance is 0.100
   new files {right} of {len(unseen)} right

 Look at
   {root / "tones.png"}   spectrograms and histograms of the shards
   {shards / "failures.jsonl"}   which clips failed, and why
   tensorboard --logdir {run.parent}

 Try next: your own sounds, one subfolder for each label
   pipeline fetch folder --name mine --from ~/my/sounds
   pipeline shard mine
   pipeline train --shards data/mine/shards/webdataset-flac-44100
================================================================================""")
    return DONE if accuracy is not None and right > len(unseen) // 2 else FAILED


def _figures(run: Path) -> dict[str, Any]:
    """The best and the last evaluation of a run, from its metrics."""
    from clipmill import tables

    rows = [row for row in tables.read_jsonl(run / "metrics.jsonl") if "accuracy" in row]
    return {"best": max(rows, key=lambda row: row["accuracy"]), "last": rows[-1]}
