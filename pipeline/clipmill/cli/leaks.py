"""`pipeline leaks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from clipmill.cli import DONE, FAILED, console

_EXAMPLES = 3


@click.command("leaks")
@click.argument("shards", nargs=-1, required=True, metavar="SHARDS...")
@click.option("--exact-only", is_flag=True, help="Look for equal samples alone; decodes nothing.")
@console.jobs_option
@console.json_option
def command(shards: tuple[str, ...], exact_only: bool, jobs: int, as_json: bool) -> int:
    """Find groups, copies and near copies that stand in more than one fold, split or dataset.

    SHARDS are folders, shards, or brace ranges such as a/b-{000000..000012}.tar. Near copies
    are clips with one recording in them, found by acoustic fingerprints: re-encoded, louder or
    softer, resampled, shifted, trimmed or noisy copies, and stretches that overlap. The
    fingerprints are kept beside the shards, in fingerprints.parquet.

    Ends with 1 if anything leaks. Copies on one side of every border are told, and are no failure.
    docs/leaks.md says what is found, and what is not.

    \b
    Example:
      pipeline leaks data/esc50/shards/webdataset-flac-44100
      pipeline leaks data/esc50/shards/webdataset-flac-44100 data/urbansound8k/shards/hdf5-pcm16-44100
      pipeline leaks SHARDS --exact-only --json
    """
    from clipmill.shards.leaks import Collection, find_leaks

    whole = Collection.open(shards)
    if exact_only:
        found = find_leaks(whole, exact_only=True, say=console.say)
    else:
        with console.progress("fingerprint", whole.clips.num_rows, "clips") as update:
            found = find_leaks(whole, jobs=jobs, say=console.say, update=update)
    if as_json:
        console.print_json(found)
    else:
        _show(found)
    return FAILED if found["leaks"] else DONE


def _show(found: dict[str, Any]) -> None:
    groups, exact, near = found["groups"], found["exact"], found["near"]
    for part in found["shards"]:
        click.echo(f"{part['dataset']}: {part['clips']} clips in {part['shards']} shards; {part['folder']}")
    click.echo(f"\ngroups: {groups['groups']} of {groups['clips']} clips; {len(groups['leaks'])} leak")
    for leak in groups["leaks"][:_EXAMPLES]:
        where = ", ".join(f"{place['clips']} in {_place(place)}" for place in leak["where"])
        click.echo(f"  {leak['group']}, across {_and(leak['across'])}: {where}")
    _more(groups["leaks"])
    click.echo(
        f"\nexact copies: {exact['clips']} clips compared"
        + (f", {found['silent']} silent ones not" if found["silent"] else "")
        + f"; {len(exact['leaks'])} sets of equal samples leak, {len(exact['harmless'])} do not"
    )
    _show_copies(exact, lambda copies: "" if copies["labels_agree"] else "; their labels differ")
    if near is None:
        return
    click.echo(
        f"\nnear copies: {near['fingerprinted']} clips compared"
        + (f" ({near['reused']} fingerprints kept from before)" if near["reused"] else "")
        + f", {len(near['not_fingerprinted'])} too short, too quiet or too steady"
        + f"; {len(near['leaks'])} pairs leak, {len(near['harmless'])} do not"
    )
    _show_copies(
        near,
        lambda copies: (
            f"; {copies['similarity']:.0%} alike over {copies['overlap_s']:.1f} s, {copies['offset_s']:+.2f} s apart"
            + ("" if copies["labels_agree"] else ", their labels differ")
        ),
    )
    if near["crowded_keys"]:
        click.echo(
            f"  {near['crowded_keys']} keys are shared by so many clips that not all pairs of them were compared"
        )


def _show_copies(section: dict[str, Any], facts: Callable[[dict[str, Any]], str]) -> None:
    for kind, said in (("leaks", "across {}: "), ("harmless", "on one side: ")):
        for copies in section[kind][:_EXAMPLES]:
            clips = copies["clips"]
            names = " = ".join(f"{clip['key']} ({_place(clip)})" for clip in clips[:_EXAMPLES])
            rest = f" and {len(clips) - _EXAMPLES} more" if len(clips) > _EXAMPLES else ""
            click.echo(f"  {said.format(_and(copies['across']))}{names}{rest}{facts(copies)}")
        _more(section[kind])


def _more(listed: list[Any]) -> None:
    if len(listed) > _EXAMPLES:
        click.echo(f"  and {len(listed) - _EXAMPLES} more; --json has all")


def _place(clip: dict[str, Any]) -> str:
    fold = "" if clip["fold"] is None else f" fold {clip['fold']}"
    return f"{clip['dataset']} {clip['split']}{fold}"


def _and(names: list[str]) -> str:
    return " and ".join(f"{name}s" for name in names)
