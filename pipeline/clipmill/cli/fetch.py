"""`pipeline fetch NAME`: one subcommand for each dataset, its flags made from the dataset's fields."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import click

from clipmill.cli import DONE, DONE_IN_PART, console

EXAMPLES = {
    "tones": ["pipeline fetch tones --root data"],
    "folder": [
        "pipeline fetch folder --name birds --from ~/birds",
        "pipeline fetch folder --name esc10 --from esc10/audio --labels esc10.csv \\\n"
        "          --label-column category --fold-column fold --group-column src_file",
    ],
    "esc50": [
        "pipeline fetch esc50 --root data",
        "pipeline fetch esc50 --from ESC-50-master --subset esc10",
    ],
    "urbansound8k": [
        "pipeline fetch urbansound8k --root data",
        "pipeline fetch urbansound8k --archive UrbanSound8K.tar.gz",
    ],
    "ravdess": ["pipeline fetch ravdess --root data"],
    "speechcommands": ["pipeline fetch speechcommands --keep-archive"],
    "audioset": [
        "pipeline fetch audioset --split eval --limit 20",
        "pipeline fetch audioset --split balanced_train --labels 'Dog,Speech' --rate 200",
        "pipeline fetch audioset --split unbalanced_train --from /data/audioset --offline",
        "pipeline fetch audioset --status",
        "pipeline fetch audioset --retry network,timeout",
    ],
}


class FetchGroup(click.Group):
    """Makes a dataset's subcommand when it is asked for, from the fields of its class."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The registered datasets."""
        from clipmill.datasets import DATASETS

        return list(DATASETS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The subcommand of one dataset."""
        from clipmill.datasets import DATASETS, dataset_class

        return _subcommand(name, dataset_class(name)) if name in DATASETS else None


@click.command("fetch", cls=FetchGroup)
def command() -> None:
    """Get a dataset's media and list its clips, into ROOT/NAME.

    Writes manifest.parquet (the clips wanted), ledger.sqlite (what became of each) and
    fetch.json (how it was made). Run again, it goes on where it was, or lists anew.

    \b
    Example:
      pipeline fetch tones
      pipeline fetch folder --name birds --from ~/birds
      pipeline fetch audioset --split eval --limit 20
    """


def _subcommand(kind: str, dataset: type[Any]) -> click.Command:
    one_by_one = getattr(dataset, "by_segment", False)
    own = [field.name for field in dataclasses.fields(dataset)]

    def run(root: Path, **options: Any) -> int:
        wanted = dataset(**{name: options.pop(name) for name in own})
        return _fetch_segments(kind, wanted, root, **options) if one_by_one else _fetch(kind, wanted, root)

    first = (dataset.__doc__ or "").strip().splitlines()[0]
    examples = "\n".join(f"  {line}" for line in EXAMPLES[kind])
    made = click.Command(
        kind, params=_options_of(dataset), callback=run, help=f"{first}\n\n\b\nExample:\n{examples}"
    )
    if one_by_one:
        made = _segment_flags(made)
    return console.root_option(made)  # type: ignore[return-value]


def _options_of(dataset: type[Any]) -> list[click.Parameter]:
    hints = get_type_hints(dataset)
    params: list[click.Parameter] = []
    for field in dataclasses.fields(dataset):
        settings = dict(field.metadata["click"])
        choices = settings.pop("choices", None)
        if field.default is dataclasses.MISSING:
            settings["required"] = True
        else:
            settings |= {"default": field.default, "show_default": field.default not in (None, (), False)}
        settings |= {"is_flag": True} if hints[field.name] is bool else {}
        settings |= {"multiple": True} if str(hints[field.name]).startswith("tuple") else {}
        params.append(
            click.Option(
                [field.metadata["flag"] or "--" + field.name.replace("_", "-"), field.name],
                type=click.Choice(choices) if choices else _click_type(hints[field.name]),
                help=field.metadata["help"],
                **settings,
            )
        )
    return params


def _click_type(hint: Any) -> click.ParamType:
    names = str(hint)
    if "Path" in names:
        return click.Path(path_type=Path)
    if "bool" in names:
        return click.BOOL
    if "int" in names:
        return click.INT
    return click.FLOAT if "float" in names else click.STRING


def _segment_flags(command: Any) -> Any:
    """The flags of datasets whose clips are fetched one by one."""
    folder = click.Path(path_type=Path)
    flags = (
        click.option(
            "--from", "from_dirs", type=folder, multiple=True,
            help="Folder of media already here: files named by id, Parquet with video_id and audio, or tars of files "
            "named by id. They are checked and used in place, not fetched again. May be repeated.",
        ),
        click.option("--offline", is_flag=True, help="Adopt what --from holds, and fetch nothing."),
        click.option("--recheck", is_flag=True, help="First look whether the media that were had are still there."),
        click.option("--lock", "lock_file", type=folder, help="Take just the clips of this lock (`pipeline lock`)."),
        click.option(
            "--url-template", default="https://www.youtube.com/watch?v={id}", show_default=True,
            help="Where a video is: any page or file that yt-dlp can read.",
        ),
        click.option("--jobs", type=click.IntRange(1, 64), default=4, show_default=True, help="Worker processes."),
        click.option(
            "--rate", type=click.FloatRange(min=0), default=None,
            help="Clips asked for an hour, over all workers; 0: no limit.  [default: 300 from YouTube, else no limit]",
        ),
        click.option("--cookies", type=folder, help="cookies.txt, as browsers export it, to ask as somebody."),
        click.option("--cookies-from-browser", metavar="NAME", help="Take a browser's cookies: firefox, chrome ..."),
        click.option("--proxy", multiple=True, metavar="URL", help="Ask through this proxy; several: in turn."),
        click.option("--retries", type=click.IntRange(min=0), default=2, show_default=True,
                     help="Further tries of a clip within this run, where another may help."),
        click.option("--retry", metavar="REASONS", default="",
                     help="Redo the failures of these reasons alone, as in network,timeout; all: of any."),
        click.option("--timeout", type=click.FloatRange(min=1), default=120.0, show_default=True,
                     help="Seconds that one clip may take."),
        click.option("--pause", type=click.FloatRange(min=0.01), default=60.0, show_default=True,
                     help="Seconds of the first pause when the site refuses us; each further one is twice as long."),
        click.option("--max-pauses", type=click.IntRange(min=0), default=6, show_default=True,
                     help="Pauses with no answer in between, before it stops with exit code 75."),
        click.option("--allow-short", type=click.FloatRange(min=0), default=0.5, show_default=True,
                     help="Seconds by which a clip may be shorter than asked."),
        click.option("--keep-silent", is_flag=True, help="Keep clips of which every sample is zero."),
        click.option("--believe-gone", is_flag=True,
                     help="Go on where not one of the first clips is there, which looks like a wrong address."),
        click.option("--dry-run", is_flag=True, help="Say how many clips, hours and bytes it would be."),
        click.option("--status", "tell", is_flag=True, help="Say how far it has come, and end; also while it runs."),
        console.json_option,
    )  # fmt: skip
    for flag in flags:
        command = flag(command)
    return command


def _watch(watcher: console.Watcher) -> Any:
    from clipmill.fetch.watch import Watch

    return Watch(watcher.begin, watcher.update, watcher.say)


def _fetch(kind: str, dataset: Any, root: Path) -> int:
    import pyarrow.compute as pc

    from clipmill.fetch.job import fetch

    with console.watching() as watcher:
        got = fetch(kind, dataset, root, watch=_watch(watcher))
    labels = got.manifest["labels"]
    unlabelled = pc.sum(pc.equal(pc.list_value_length(labels), 0)).as_py()
    classes = pc.count_distinct(pc.list_flatten(labels)).as_py()
    console.say(f"{got.name}: {_account(got.counts, 0)}; {classes} classes; media in {got.media_root}")
    console.say_losses(got.losses)
    if unlabelled:
        console.say(f"  note: {unlabelled} clips have no label")
    for hint in getattr(dataset, "hints", list)():
        console.say(hint)
    console.say(f"next: pipeline shard {got.name} --root {root}")
    return DONE_IN_PART if got.counts["failed"] else DONE


def _account(counts: dict[str, int], left: int) -> str:
    total = sum(counts.values()) + left
    more = f" + {left} left" if left else ""
    return f"{total} in = {counts['had']} had + {counts['failed']} failed + {counts['skipped']} skipped{more}"


def _fetch_segments(
    kind: str, dataset: Any, root: Path, *,
    tell: bool, as_json: bool, dry_run: bool, lock_file: Path | None, retry: str, **fields: Any,
) -> int:  # fmt: skip
    from clipmill.errors import FetchError
    from clipmill.fetch.foresee import foresee
    from clipmill.fetch.job import fetch
    from clipmill.fetch.lock import compare, in_words, known_lock, read_lock
    from clipmill.fetch.options import SegmentOptions
    from clipmill.fetch.status import status

    if tell:
        return _tell(status(root, dataset.name), as_json)
    reasons = tuple(reason.strip() for reason in retry.split(",") if reason.strip())
    options = SegmentOptions(**fields, retry=reasons)
    lock = read_lock(lock_file, dataset.name) if lock_file else None
    if lock is not None:
        dataset = dataset.for_splits(lock.splits)
    if dry_run:
        with console.watching() as watcher:
            plan = foresee(kind, dataset, root, options, lock, _watch(watcher))
        return _say_plan(plan, as_json)
    try:
        with console.watching() as watcher:
            got = fetch(kind, dataset, root, options, lock, _watch(watcher))
    except (FetchError, KeyboardInterrupt):
        _say_so_far(root, dataset.name, as_json)
        raise
    stands = status(root, dataset.name)
    if as_json:
        console.print_json(stands.as_json())
    console.say(f"{got.name}: {_account(got.counts, got.left)}; media in {got.media_root}")
    if lock is not None:
        console.say(in_words(lock, compare(lock, known_lock(got))))
    console.say_losses(got.losses)
    if stands.may_heal:
        console.say(f"  {stands.may_heal} of these may heal: the same command tries them again")
    for hint in dataset.hints():
        console.say(hint)
    console.say(f"next: pipeline shard {got.name} --root {root}")
    return DONE_IN_PART if got.counts["failed"] or got.left else DONE


def _say_so_far(root: Path, name: str, as_json: bool) -> None:
    """What an interrupted fetch has come to, where it has come to anything."""
    from clipmill.errors import ClipmillError
    from clipmill.fetch.status import status

    try:
        stands = status(root, name)
    except ClipmillError:
        return
    if as_json:
        console.print_json(stands.as_json())
    console.say(f"{name}: {stands.had} had, {stands.failed} failed, {stands.left} left of {stands.wanted}")


def _say_plan(plan: Any, as_json: bool) -> int:
    if as_json:
        console.print_json(dataclasses.asdict(plan))
        return DONE
    rows = [
        ["clips wanted", plan.wanted], ["  had already", plan.had], ["  to adopt from --from", plan.adopt],
        ["  to fetch", plan.ask], ["rate", f"{plan.per_hour:.0f}/h" if plan.per_hour else "no limit"],
        ["time to fetch", "not known yet" if plan.hours is None else console.duration(plan.hours * 3600)],
        ["disk to fetch", console.size(plan.bytes)], ["disk free", console.size(plan.free_bytes)],
    ]  # fmt: skip
    console.print_table("Would fetch", ["what", "how much"], rows)
    return DONE


def _tell(stands: Any, as_json: bool) -> int:
    if as_json:
        console.print_json(stands.as_json())
        return DONE
    total = stands.wanted + stands.skipped
    click.echo(
        f"{stands.name}: {total} in = {stands.had} had + {stands.failed} failed + {stands.skipped} skipped "
        f"+ {stands.left} left; {console.size(stands.bytes)}"
    )
    if stands.left or stands.running:
        click.echo("a fetch is running" if stands.running else "no fetch is running")
    if stands.pausing_s:
        click.echo(f"pausing for another {console.duration(stands.pausing_s)}: {stands.pausing_why}")
    if stands.tried_per_hour:
        eta = f"; what is left takes {console.duration(stands.eta_s)}" if stands.left and stands.eta_s else ""
        click.echo(f"rate in the last run: {stands.tried_per_hour:.0f} clips an hour{eta}")
    rows = []
    for s in stands.splits:
        papers = ", ".join(f"{paper} {share:.1%}" for paper, share in s.papers.items())
        rows.append(
            [
                s.split,
                s.wanted,
                s.had,
                s.failed,
                s.left,
                "" if s.share_had is None else f"{s.share_had:.1%}",
                papers,
            ]
        )
    columns = ["split", "wanted", "had", "failed", "left", "share had of those tried", "had by papers"]
    console.print_table("Splits", columns, rows)
    if stands.reasons:
        from clipmill.types import REASONS

        rows = [[reason, n, REASONS.get(reason, "")] for reason, n in stands.reasons.items()]
        console.print_table("Lost", ["reason", "clips", "meaning"], rows)
        click.echo(f"{stands.may_heal} of these may heal: running the fetch again tries them again")
    if stands.labels:
        rows = [[s.label, s.lost, s.wanted, f"{s.lost / s.wanted:.1%}"] for s in stands.labels]
        console.print_table("Labels that lost most", ["label", "lost", "wanted", "share"], rows)
    return DONE
