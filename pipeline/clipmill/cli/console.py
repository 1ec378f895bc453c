"""What the commands share: how they show progress and tables, and the flags they have in common."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipmill.types import REASONS, Failure

if TYPE_CHECKING:
    from clipmill.run import Engine
    from clipmill.shards.read import Shards

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


ENGINE_FIELDS = ("engine", "jobs", "address", "partition", "time", "mem", "max_jobs")
"""The flags of `engine_options`: what `clipmill.run.choose.choose` takes."""


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that say where units are worked on, --jobs among them."""
    for option in reversed((
        click.option("--engine", type=click.Choice(["local", "dask", "ray", "slurm"]), default="local",
                     show_default=True,
                     help="Where the work is done: this machine, a Dask or Ray cluster, or a Slurm job array."),
        click.option("--jobs", type=click.IntRange(min=1), default=None,
                     help="Worker processes; with slurm, of each task.  [default: all cores; slurm: 1]"),
        click.option("--address", metavar="URL", default=None,
                     help="The Dask or Ray cluster to use.  [default: one on this machine, started for the job]"),
        click.option("--partition", default=None, help="Slurm's partition.  [default: the cluster's]"),
        click.option("--time", metavar="[D-]HH:MM:SS", default=None,
                     help="Slurm's time limit of a task; one that reaches it goes on in another.  [default: 4:00:00]"),
        click.option("--mem", type=click.IntRange(min=500), metavar="MB", default=None,
                     help="Slurm's memory limit of a task.  [default: 4000 for each of --jobs]"),
        click.option("--max-jobs", type=click.IntRange(min=1), default=None,
                     help="Slurm tasks that run at once.  [default: 32]"),
    )):  # fmt: skip
        function = option(function)
    return function


def choose_engine(fields: dict[str, Any], folder: Path, *, fresh: bool = False) -> Engine:
    """The engine that the flags of `engine_options` speak of, for work whose results go to `folder`.

    Tasks of a Slurm driver that was killed are cancelled first, unless this one will wait for them: they would go on
    writing there. `fresh`: it will not, for all is to be made anew.
    """
    from clipmill import tables
    from clipmill.run.choose import choose
    from clipmill.run.slurm import cancel_leftovers

    logs = folder / "slurm"
    engine = choose(folder=logs, **fields)
    another = (fields["engine"] != "slurm" or fresh) and logs.is_dir()
    if another and not tables.is_locked(folder) and (cancelled := cancel_leftovers(logs)):
        say(f"cancelled {cancelled} Slurm tasks of an earlier run that were still there")
    return engine


def default_store() -> Path:
    """Where features live when --store is not given: $CLIPMILL_FEATURES, else ./features."""
    return Path(os.environ.get("CLIPMILL_FEATURES") or "features")


def store_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --store flag."""
    return click.option(
        "--store",
        type=click.Path(path_type=Path, file_okay=False),
        default=default_store,
        show_default="$CLIPMILL_FEATURES or ./features",
        help="Folder of the feature store.",
    )(function)


def limit_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --clip-timeout and --clip-memory flags."""
    for option in reversed((
        click.option("--clip-timeout", type=click.FloatRange(min=1), default=120.0, show_default=True,
                     metavar="SECONDS", help="A clip that takes longer to prepare fails."),
        click.option("--clip-memory", type=click.IntRange(min=100), default=2000, show_default=True,
                     metavar="MB", help="A clip that needs more memory to prepare fails."),
    )):  # fmt: skip
        function = option(function)
    return function


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --json flag."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(function)


def shards_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --shards flag of what reads clips, once or more; its argument is `where`."""
    return click.option(
        "--shards",
        "where",
        required=True,
        multiple=True,
        metavar="SHARDS",
        help="Folder of shards, one shard, or a range; here or at a URL; may be given again.",
    )(function)


def clips_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --shards and --features flags of what learns from sound or from stored features: see `open_clips`."""
    for option in reversed((
        click.option("--shards", "where", multiple=True, metavar="SHARDS",
                     help="Folder of shards, one shard, or a range; here or at a URL; may be given again."),
        click.option("--features", type=click.Path(path_type=Path, file_okay=False), metavar="STORE",
                     help="Feature store, or an entry's folder, to read in place of sound; with --shards, of these."),
    )):  # fmt: skip
        function = option(function)
    return function


SAMPLING = click.Choice(["shuffled", "balanced", "weighted", "sequential"])
"""The values of --sampling."""


def access_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --access flag."""
    return click.option(
        "--access",
        type=click.Choice(["random", "stream"]),
        default="random",
        show_default=True,
        help="random: any clip, exactly; stream: whole tars in turn, for stores where each read is dear.",
    )(function)


def _number(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if value != value:
        raise click.BadParameter("nan: allowed is 0 to 1")
    return value


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of what reads many clips: how, and what becomes of those that cannot be read."""
    for option in reversed((
        click.option("--workers", type=click.IntRange(min=0), default=None,
                     help="Threads that read ahead; 0: none.  [default: by device and cores]"),
        click.option("--max-bad", type=click.FloatRange(0, 1), default=0.01, show_default=True, callback=_number,
                     help="Share of the clips that may be unreadable; more is an error."),
        click.option("--check-hashes", "check", is_flag=True,
                     help="Compare each clip's samples with the sha256 in the index."),
        click.option("--cache", type=click.Path(path_type=Path, file_okay=False), default=None,
                     help="Folder that keeps what is read of shards at a URL."),
        click.option("--read-timeout", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True,
                     help="Seconds for a clip of shards at a URL, all tries together."),
    )):  # fmt: skip
        function = option(function)
    return function


def scored_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The --fold, --split and --where flags of what scores clips; the last one's argument is `keep`."""
    for option in reversed((
        click.option("--fold", type=int, default=None,
                     help="Score this fold.  [default: the clips held out in training]"),
        click.option("--split", default=None,
                     help="Score this split: train, valid, eval, or all (clips without one)."),
        click.option("--where", "keep", metavar="EXPRESSION",
                     help="Score only clips that fulfil this.  [default: for the clips held out, as in training]"),
    )):  # fmt: skip
        function = option(function)
    return function


def numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    """Numbers with commas between, for a flag's callback."""
    try:
        return None if value is None else tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: allowed are numbers with commas between, such as 3,1") from None


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


def words_again(context: click.Context, without: Iterable[str]) -> list[str]:
    """The flags that a command was given, but for some parameters by name: words that say the same again."""
    words: list[str] = []
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if not isinstance(parameter, click.Option) or name in set(without) or not given:
            continue
        if parameter.is_flag:
            words.append((parameter.opts if value else parameter.secondary_opts)[-1])
        elif parameter.multiple and value:
            words += [word for one in value for word in (parameter.opts[-1], str(one))]
        else:
            words += [
                parameter.opts[-1],
                ",".join(map(str, value)) if isinstance(value, tuple) else str(value),
            ]
    return words


def say(text: str = "") -> None:
    """Print a line for a person; to stderr, so that stdout stays for results."""
    click.echo(text, err=True)


def say_unfinished(info: dict[str, Any], tell: Callable[[str], None] = say) -> None:
    """Warn where a job has not built all shards that dataset.json's contents speak of."""
    if info.get("stopped"):
        tell(f"note: not all shards of {info['name']} are built: {info['stopped']}; `pipeline shard` goes on")


def say_of(shards: Shards, tell: Callable[[str], None] = say) -> None:
    """What a person should know of shards before they are used."""
    for part in shards.sets:
        say_unfinished(part.info, tell)
    for note in shards.notes:
        tell(note)


def open_clips(
    where: Sequence[str],
    features: Path | None,
    feature: str | None,
    cache: Path | None,
    read_timeout: float,
    tell: Callable[[str], None] = say,
    seen: dict[str, Any] | None = None,
) -> Shards:
    """The clips that `clips_options` speak of: sound, or of a store the feature that is named ("auto": the only one).

    `seen` is the feature that a network was trained on, as its config.json has it.

    Raises:
        ConfigError: neither flag is given.
        FeatureError: the store lacks the feature, or holds that of other shards.
    """
    from clipmill.errors import ConfigError
    from clipmill.featurestore import Entry, FeatureStore
    from clipmill.featurestore.files import ENTRY_FILE
    from clipmill.shards.read import Shards

    if not where and features is None:
        raise ConfigError("--shards SHARDS says where the clips are; or --features STORE, where features are")
    settings = {"timeout_s": read_timeout}
    shards = Shards.open(where, cache=cache, settings=settings, say=tell) if where else None
    if features is None:
        assert shards is not None
        return shards
    if (features / ENTRY_FILE).is_file():
        entry = Entry.open(features)
        entry.check(shards=shards, seen=seen)
    else:
        named = None if feature in (None, "auto") else feature
        entry = FeatureStore(features).entry(named, shards=shards, seen=seen)
    return entry.clips


def say_losses(losses: Sequence[Failure], examples: int = 3, print_line: Callable[[str], None] = say) -> None:
    """Print how many clips were lost for each reason, and the first few of each."""
    by_reason: dict[str, list[Failure]] = {}
    for loss in losses:
        by_reason.setdefault(loss.reason, []).append(loss)
    for reason, some in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        print_line(f"  {reason} ({REASONS.get(reason, 'unknown reason')}): {len(some)}")
        for loss in some[:examples]:
            print_line(f"    {loss.source or loss.key}: {loss.message}")
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


class Watcher:
    """Shows how work goes: a plain line every ten seconds; `LiveWatcher` shows a bar on a terminal."""

    def __init__(self) -> None:
        self._what, self._total, self._unit = "", 0, ""
        self._began = self._last = 0.0
        self._first: int | None = None

    def begin(self, what: str, total: int, unit: str) -> None:
        """A new piece of work, of `total` units; 0: nobody knows how many."""
        self._what, self._total, self._unit = what, total, unit
        self._began = self._last = time.monotonic()
        self._first = None

    def update(self, done: int, facts: str = "") -> None:
        """So many units are done; `facts` is a short text such as "had 12, failed 1" or "loss 0.31"."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        finished = done >= self._total and now - self._began >= PLAIN_EVERY_S
        if now - self._last >= PLAIN_EVERY_S or finished:
            rate = (done - self._first) / max(now - self._began, 1e-9)
            self._show(done, rate, facts)
            self._last = now

    def _show(self, done: int, rate: float, facts: str) -> None:
        left = f", {duration((self._total - done) / rate)} left" if rate > 0 and done < self._total else ""
        total = f"/{self._total}" if self._total else ""
        said = f", {facts}" if facts else ""
        say(f"{self._what}: {done}{total} {self._unit}, {pace(rate)}{left}{said}")

    def say(self, text: str) -> None:
        """A line for a person, that stays."""
        say(text)


class LiveWatcher(Watcher):
    """A live bar on stderr; to be used in a `with` over `bar`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def begin(self, what: str, total: int, unit: str) -> None:
        """A bar of its own for each piece of work."""
        super().begin(what, total, unit)
        self._task = self.bar.add_task(what, total=total or None, unit=unit, rate="", facts="")

    def update(self, done: int, facts: str = "") -> None:
        """Move the bar."""
        if self._first is None:  # a run that goes on is no faster for what was done before
            self._first = done
            self.bar.reset(self._task, completed=done)
        rate = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        self.bar.update(self._task, completed=done, rate=pace(rate), facts=facts)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.bar.console.print(text, markup=False, highlight=False)


@contextmanager
def watching() -> Iterator[Watcher]:
    """Yield a `Watcher` that suits where stderr goes."""
    if sys.stderr.isatty():
        live = LiveWatcher()
        with live.bar:
            yield live
    else:
        yield Watcher()


@contextmanager
def progress(what: str, total: int, unit: str, *, shown: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Yield `update(done, facts)` for one piece of work; see `Watcher`. Where another process shows it, nothing is."""
    if not shown:
        yield lambda done, facts: None
        return
    with watching() as watcher:
        watcher.begin(what, total, unit)
        yield watcher.update


def pace(per_second: float) -> str:
    """A rate as one would say it: "12.3/s", or "288/h" where it is slow."""
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{per_second * 3600:.0f}/h"


def duration(seconds: float) -> str:
    """A time span as one would say it: "40 s", "12 min", "7.5 h", "81 days"."""
    for unit, size, digits in (("s", 1, 0), ("min", 60, 0), ("h", 3600, 1)):
        if seconds < {"s": 100, "min": 6000, "h": 172_800}[unit]:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def size(count: int) -> str:
    """So many bytes as one would say it: "512 kB", "3.4 MB", "1.2 TB"."""
    value, unit = count / 1e3, "kB"
    for larger in ("MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1e3, larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "kB" else f"{value:.1f} {unit}"
