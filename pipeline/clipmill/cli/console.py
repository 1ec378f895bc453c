"""What the commands share: how they show progress and tables, and the flags they have in common."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from clipmill.types import REASONS, Failure

PLAIN_EVERY_S = 10.0


def default_root() -> Path:
    """Where datasets live when --root is not given: $CLIPMILL_ROOT, else ./data."""
    return Path(os.environ.get("CLIPMILL_ROOT") or "data")


def root_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --root flag."""
    return click.option(
        "--root",
        type=click.Path(path_type=Path, file_okay=False),
        default=default_root,
        show_default="$CLIPMILL_ROOT or ./data",
        help="Folder that holds one folder for each dataset.",
    )(function)


def jobs_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --jobs flag."""
    return click.option(
        "--jobs",
        type=click.IntRange(min=1),
        default=lambda: len(os.sched_getaffinity(0)),
        show_default="all cores",
        help="Worker processes.",
    )(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --json flag."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(function)


def device_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --device flag."""
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")(
        function
    )


def weights_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --weights flag."""
    return click.option(
        "--weights",
        type=click.Choice(["best", "last"]),
        default="best",
        show_default=True,
        help="The averaged weights of the best evaluation, or of the last step.",
    )(function)


def say(text: str = "") -> None:
    """Print a line for a person; to stderr, so that stdout stays for results."""
    click.echo(text, err=True)


def say_losses(losses: Sequence[Failure], examples: int = 3, print_line: Callable[[str], None] = say) -> None:
    """Print how many clips were lost for each reason, and the first few of each."""
    by_reason: dict[str, list[Failure]] = {}
    for loss in losses:
        by_reason.setdefault(loss.reason, []).append(loss)
    for reason, some in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        print_line(f"  {reason} ({REASONS.get(reason, 'unknown reason')}): {len(some)}")
        for loss in some[:examples]:
            print_line(f"    {loss.source}: {loss.message}")
        if len(some) > examples:
            print_line(f"    and {len(some) - examples} more")


def print_json(value: Any) -> None:
    """Print a result as JSON on stdout."""
    click.echo(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on stdout; columns of numbers are right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [["" if cell is None else str(cell) for cell in row] for row in rows]
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for place, name in enumerate(columns):
        numbers = all(row[place][:1].isdigit() or row[place][:1] in "-" for row in rows)
        table.add_column(name, justify="right" if numbers and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Yield `update(done, facts)`: a live bar on a terminal, a plain line every ten seconds elsewhere.

    `facts` is a short text such as "had 12, failed 1" or "loss 0.31".
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]:.1f}/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
        )
        with bar:
            task = bar.add_task(what, total=total, rate=0.0, facts="")
            start = time.monotonic()
            first: list[int] = []

            def update(done: int, facts: str = "") -> None:
                first[:] = first or [done]
                rate = (done - first[0]) / max(time.monotonic() - start, 1e-9)
                bar.update(task, completed=done, rate=rate, facts=facts)

            yield update
        return

    started = last = time.monotonic()
    first_done: list[int] = []

    def plain(done: int, facts: str = "") -> None:
        nonlocal last
        first_done[:] = first_done or [done]
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S or (done >= total and now - started >= PLAIN_EVERY_S):
            rate = (done - first_done[0]) / max(now - started, 1e-9)
            left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
            say(f"{what}: {done}/{total} {unit}, {rate:.1f}/s{left}{', ' + facts if facts else ''}")
            last = now

    yield plain
