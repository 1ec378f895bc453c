"""`pipeline predict`."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from clipmill.cli import DONE, DONE_IN_PART, FAILED, console

if TYPE_CHECKING:
    from clipmill.train.inputs import Source
    from clipmill.train.listen import Prediction

TOP = 3
WIDEST = 80
"""Characters of a name that the table makes room for."""
LAST_WORDS, MOST_KEPT = 4000, 1_000_000
"""Bytes that are shown of what libraries print, and that are kept of it."""


@click.command("predict")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, metavar="INPUT...")
@click.option(
    "--files-from",
    metavar="LIST",
    help="Hear the files and folders in this list too, one a line; -: from stdin.",
)
@click.option(
    "--window",
    type=float,
    default=None,
    metavar="SECONDS",
    help="Say what is heard in each window of so many seconds.  [default: in the whole file]",
)
@click.option(
    "--hop",
    type=float,
    default=None,
    metavar="SECONDS",
    help="From one window's start to the next.  [default: --window]",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=None,
    help=f"Labels to name, likeliest first.  [default: {TOP}; with --threshold all]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=None,
    metavar="P",
    help="Name only labels of at least this probability.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "jsonl", "csv"]),
    default="table",
    show_default=True,
    help="A table for people, JSON one object a line, or CSV one label a line.",
)
@click.option("--all-labels", is_flag=True, help="With --format csv: a column for each label.")
@console.weights_option
@console.device_option
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=None,
    help="Threads that decode ahead; 0: none.  [default: by device and cores]",
)
def command(
    run: Path, inputs: tuple[str, ...], files_from: str | None, window: float | None, hop: float | None,
    top: int | None, threshold: float | None, form: str, all_labels: bool, weights: str, device: str,
    workers: int | None,
) -> int:  # fmt: skip
    """Say what is heard in sound files of any format and length.

    An INPUT is a sound file, a folder with such files at any depth, or - for the bytes of one on stdin.
    A file is heard in windows of 10 s (or what the network takes), of which the mean is told, or with --window
    each. Answers come in the order of the inputs, while others are still to be heard; but a window waits until
    enough of its length are there to be heard together, and files are read ahead of their turn.

    A file that cannot be heard is a row that says why; the exit code is then 3, or 1 when no file could be.

    \b
    Example:
      pipeline predict runs/x dog.ogg rain.mp3 recordings/
      pipeline predict runs/x night.flac --window 2 --hop 1 --threshold 0.5
      find /archive -name "*.wav" | pipeline predict runs/x --files-from - --format jsonl > heard.jsonl
      curl -s https://example.org/a.mp3 | pipeline predict runs/x -
    """  # fmt: skip
    _check(inputs, files_from, threshold, top, form, all_labels)
    from clipmill.train.device import default_workers, pick_device
    from clipmill.train.fused import read_tagger
    from clipmill.train.predict import predict_files

    place = pick_device(device)
    trained = read_tagger(run, place, weights)
    workers = max(default_workers(place), 1) if workers is None else workers
    # Every label above the threshold where one is given, else the likeliest few.
    top = TOP if top is None and threshold is None and not all_labels else top
    account = _Account()
    with _opened(files_from) as listed, tempfile.TemporaryDirectory() as spool, _codecs_silenced() as forget:
        predictions = predict_files(
            trained, _sources(inputs, listed, Path(spool)), place,
            window_s=window, hop_s=hop, workers=workers, heard=account.hear,
        )  # fmt: skip
        printers: dict[str, _Table | _Jsonl] = {"table": _Table(window is not None), "jsonl": _Jsonl()}
        printer = printers.get(form) or _Csv(trained.labels if all_labels else None)
        with closing(predictions):
            for prediction in predictions:
                printer.show(prediction, prediction.rows(trained.labels, top, threshold or 0.0))
                account.count(prediction)
                forget()
        console.say(account.words())
    if not account.heard:
        return FAILED
    return DONE_IN_PART if account.failed else DONE


def _check(
    inputs: tuple[str, ...],
    files_from: str | None,
    threshold: float | None,
    top: int | None,
    form: str,
    all_labels: bool,
) -> None:
    """Raise UsageError where flags and arguments do not go together."""
    if not inputs and files_from is None:
        raise click.UsageError("give sound files, folders, - or --files-from: there is nothing to hear")
    if inputs.count("-") + (files_from == "-") > 1:
        raise click.UsageError("stdin can be read only once: one - among the inputs, or --files-from -")
    if ("-" in inputs or files_from == "-") and sys.stdin is None:
        raise click.UsageError("- reads from stdin, which is closed here")
    if "-" in inputs and sys.stdin.isatty():
        raise click.UsageError("- reads a sound file's bytes from stdin, which is a terminal here")
    if threshold != threshold:
        raise click.UsageError("--threshold nan: allowed is 0 to 1")
    if all_labels and (form != "csv" or top is not None or threshold is not None):
        raise click.UsageError("--all-labels goes with --format csv, and without --top and --threshold")


def _sources(inputs: tuple[str, ...], listed: BinaryIO | None, spool: Path) -> Iterator[Source]:
    """What to hear, found while it is heard; what comes from stdin is kept in `spool`, for decoders must seek."""
    from clipmill.train.inputs import Source, find_sources, read_list

    for name in inputs:
        if name == "-":
            with open(spool / "stdin", "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
            yield Source("-", spool / "stdin")
        else:
            yield from find_sources([name])
    if listed is not None:
        yield from find_sources(read_list(listed, "-" if listed is sys.stdin.buffer else listed.name))


@contextmanager
def _opened(files_from: str | None) -> Iterator[BinaryIO | None]:
    """The list that --files-from names."""
    from clipmill.errors import ConfigError

    if files_from is None or files_from == "-":
        yield None if files_from is None else sys.stdin.buffer
        return
    try:
        file = open(files_from, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"--files-from {_plain(files_from)}: {error.strerror or error}") from error
    with file:
        yield file


class _Account:
    """What became of the files; on stderr every ten seconds how far it is."""

    def __init__(self) -> None:
        self.heard, self.reasons = 0, Counter[str]()
        self._sound_s = 0.0
        self._began = self._said = time.monotonic()

    @property
    def failed(self) -> int:
        return self.reasons.total()

    def hear(self, seconds: float) -> None:
        self._sound_s += seconds
        now = time.monotonic()
        if now - self._said >= console.PLAIN_EVERY_S:
            self._said = now
            pace = self._sound_s / (now - self._began)
            console.say(
                f"hearing: {self.heard} files heard, {self.failed} failed; {console.duration(self._sound_s)} of sound, "
                f"{pace:.0f} times as fast as it plays"
            )

    def count(self, prediction: Prediction) -> None:
        if prediction.reason is not None:
            self.reasons[prediction.reason] += 1
        elif not prediction.more:
            self.heard += 1

    def words(self) -> str:
        total = self.heard + self.failed
        if not total:
            return "0 in: --files-from lists nothing"
        why = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{total} in = {self.heard} heard + {self.failed} failed" + (f" ({why})" if why else "")


class _Table:
    """A table for people, printed as it comes; the first column grows with the longest name so far."""

    def __init__(self, windows: bool) -> None:
        self._columns = ("start_s", "end_s") if windows else ("seconds",)
        self._width = 0

    def show(self, prediction: Prediction, rows: list[dict[str, Any]]) -> None:
        if not self._width:
            self._width = max(len(_plain(prediction.file)), len("file"))
            self._line("file", self._columns, "heard")
        for row in rows:
            if prediction.reason is not None:
                cells, heard = ["-"] * len(self._columns), f"({row['reason']}) {row['message']}"
            else:
                cells = [f"{row[name]:.2f}" for name in self._columns]
                heard = ", ".join(f"{p['label']} {p['probability']:.3f}" for p in row["predictions"]) or "-"
            self._line(_plain(row["file"]), cells, _plain(heard))

    def _line(self, name: str, cells: tuple[str, ...] | list[str], heard: str) -> None:
        self._width = max(self._width, min(len(name), WIDEST))
        click.echo("  ".join([name.ljust(self._width), *(cell.rjust(8) for cell in cells), heard]))


class _Jsonl:
    """One JSON object a line: what `Prediction.rows` says."""

    def show(self, prediction: Prediction, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            # A name that is no UTF-8 can be had back from its escapes.
            whole = json.dumps(row, ensure_ascii=_shown(row["file"]) != row["file"])
            click.echo(whole.encode())


class _Csv:
    """One line a label, or a column a label; of what failed a line with the reason, of what has no label to name one.

    `labels`: the columns; None: one line a label.
    """

    def __init__(self, labels: list[str] | None) -> None:
        self._labels = labels
        columns = ["rank", "label", "probability"] if labels is None else labels
        self._line(["file", "start_s", "end_s", "reason", *columns])
        self._empty = [""] * len(columns)

    def show(self, prediction: Prediction, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            name = _shown(row["file"])
            if prediction.reason is not None:
                console.say(_plain(f"{row['file']}: {row['reason']}: {row['message']}"))
                self._line([name, "", "", row["reason"], *self._empty])
                continue
            place = [name, row.get("start_s", 0.0), row.get("end_s", row["seconds"]), ""]
            found = {p["label"]: f"{p['probability']:.6f}" for p in row["predictions"]}
            if self._labels is not None:
                self._line([*place, *(found[label] for label in self._labels)])
            elif not found:
                self._line([*place, *self._empty])
            else:
                for rank, (label, probability) in enumerate(found.items(), 1):
                    self._line([*place, rank, label, probability])

    def _line(self, cells: list[Any]) -> None:
        made = io.StringIO()
        csv.writer(made, lineterminator="\n").writerow(cells)
        click.echo(made.getvalue().encode(), nl=False)


def _shown(name: str) -> str:
    """A file's name as UTF-8 can hold it."""
    return name.encode(errors="backslashreplace").decode()


def _plain(text: str) -> str:
    """What a terminal shows and does not obey: line ends, escape codes and the like are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def _codecs_silenced() -> Iterator[Callable[[], None]]:
    """What libraries print straight to file descriptor 2, from any thread, is kept back; what we say goes to stderr.

    libmpg123 has a line for every oddity of every file, which is told by its row already. But the last words of
    a library may be all that is known of an error that nobody foresaw: then they are shown. What a
    process leaves that is killed by a signal is lost. Yields what forgets them, once there are many.
    """
    from clipmill.errors import ClipmillError

    python = sys.__stderr__
    if python is None or python is not sys.stderr:  # closed, or a test's
        yield lambda: None
        return
    ours = os.dup(2)
    with tempfile.TemporaryFile("a+b", buffering=0) as kept:

        def forget() -> None:
            if os.fstat(kept.fileno()).st_size > MOST_KEPT:
                os.ftruncate(kept.fileno(), 0)

        said = os.fdopen(os.dup(ours), "w", encoding=python.encoding, errors=python.errors, buffering=1)
        try:
            sys.stderr = said
            os.dup2(kept.fileno(), 2)
            yield forget
        except (ClipmillError, click.ClickException, BrokenPipeError):
            raise
        except Exception:
            kept.seek(max(os.fstat(kept.fileno()).st_size - LAST_WORDS, 0))
            os.write(ours, kept.read())
            raise
        finally:
            sys.stderr = python
            os.dup2(ours, 2)
            said.close()
            os.close(ours)
