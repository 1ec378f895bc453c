"""`pipeline lock`."""

from __future__ import annotations

from pathlib import Path

import click

from clipmill.cli import DONE, FAILED, console


class LockGroup(click.Group):
    """`pipeline lock NAME` is short for `pipeline lock make NAME`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the command in where a dataset's name stands in its place."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["make", *args]
        return super().parse_args(ctx, args)


@click.group("lock", cls=LockGroup)
def command() -> None:
    """Write down which clips of a dataset are had, or compare two such locks.

    Clips vanish: two labs that fetch AudioSet a year apart hold different ones. A lock is a
    small text file of the clips that are had (keys, hashes of their content, the date), to
    publish beside results. `pipeline fetch --lock` and `pipeline shard --lock` take just
    those, and say which are missing or hold something else.

    \b
    Example:
      pipeline lock audioset --out audioset-2026.lock
      pipeline lock diff ours.lock theirs.lock
    """


@command.command("make")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True,
              help="File to write; gzipped where it ends in .gz.")  # fmt: skip
@console.root_option
@console.jobs_option
@console.json_option
def make(name: str, out: Path, root: Path, jobs: int, as_json: bool) -> int:
    """Write the lock of the clips of NAME that are had now.

    \b
    Example:
      pipeline lock audioset --out audioset-2026.lock
      pipeline lock make audioset --out audioset-2026.lock.gz
    """
    from clipmill.fetch.fetched import load
    from clipmill.fetch.lock import make_lock, write_lock

    got = load(root, name)
    with console.progress(f"lock {name}", got.counts["had"], "files") as update:
        lock, left_out = make_lock(got, jobs, update)
    write_lock(lock, out)
    if as_json:
        console.print_json(
            {
                "name": name,
                "as_of": lock.as_of,
                "clips": len(lock),
                "id": lock.id,
                "file": str(out),
                "left_out": left_out,
            }
        )
    console.say(f"{out}: {len(lock)} clips of {name}, as of {lock.as_of}, id {lock.id[:12]}")
    if left_out:
        console.say(
            f"  {len(left_out)} clips that were had are left out, since their media are gone or cannot be read: "
            f"{', '.join(left_out[:3])}{' ...' if len(left_out) > 3 else ''}; see `pipeline fetch ... --recheck`"
        )
    if got.left:
        console.say(f"  note: {got.left} clips are not fetched yet; the lock holds what is had so far")
    return DONE


@command.command("diff")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@console.json_option
def diff(first: Path, second: Path, as_json: bool) -> int:
    """Say how two locks differ; ends with 1 where they do, as diff does.

    \b
    Example:
      pipeline lock diff ours.lock theirs.lock
      pipeline lock diff ours.lock theirs.lock --json | jq .only_second
    """
    from dataclasses import asdict

    from clipmill.fetch.lock import compare, read_any_lock

    locks = [read_any_lock(path) for path in (first, second)]
    found = compare(*locks)
    if as_json:
        console.print_json(asdict(found) | {"ids": [lock.id for lock in locks]})
        return FAILED if found else DONE
    for path, lock in zip((first, second), locks, strict=True):
        click.echo(f"{path}: {len(lock)} clips of {lock.name}, as of {lock.as_of}, id {lock.id[:12]}")
    if locks[0].name != locks[1].name:
        console.say(f"note: these are locks of two datasets, {locks[0].name} and {locks[1].name}")
    parts = (
        (f"only in {first}", found.only_first),
        (f"only in {second}", found.only_second),
        ("other content", found.other_content),
    )
    rows = [
        [what, len(keys), ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")] for what, keys in parts
    ]
    console.print_table("", ["what", "clips", "such as"], [["the same", found.same, ""], *rows])
    return FAILED if found else DONE
