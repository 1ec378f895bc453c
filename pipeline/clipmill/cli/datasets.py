"""`pipeline datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipmill.cli import console


@click.command("datasets")
@click.argument("name", required=False)
@console.root_option
@console.json_option
def command(name: str | None, root: Path, as_json: bool) -> None:
    """List the datasets that can be fetched, and those already fetched under --root.

    With NAME, all that is known of one: what it holds, its licence, how to cite and how to fetch it.

    \b
    Example:
      pipeline datasets
      pipeline datasets urbansound8k
      pipeline datasets --json
    """
    from clipmill.datasets import DATASETS
    from clipmill.errors import ConfigError
    from clipmill.fetch.fetched import facts_of, fetched_names

    if name is not None and name not in DATASETS:
        if name not in fetched_names(root):
            raise ConfigError(
                f"unknown dataset {name!r}; known: {', '.join((*DATASETS, *fetched_names(root)))}"
            )
        name = facts_of(root, name)["kind"]
    known = [_known(each) for each in ([name] if name else DATASETS)]
    if name is not None:
        console.print_json(known[0]) if as_json else _show(known[0])
        return
    fetched = [_fetched(root, each) for each in fetched_names(root)]
    if as_json:
        console.print_json({"datasets": known, "root": str(root), "fetched": fetched})
        return
    columns = ("name", "clips", "classes", "hours", "download", "licence", "fetching needs")
    console.print_table("Known", columns, [_row(each) for each in known])
    click.echo("\n`pipeline datasets NAME` shows one with its licence and citation.\n")
    if fetched:
        columns = ("name", "kind", "clips", "had", "failed", "skipped", "media")
        console.print_table(
            f"Fetched under {root}", columns, [[f[column] for column in columns] for f in fetched]
        )
    else:
        click.echo(f"Nothing fetched under {root} yet: try `pipeline fetch tones`.")


def _known(name: str) -> dict[str, Any]:
    """The facts of a dataset, with what is downloaded (bytes; None where the size is not known) and needed."""
    from clipmill_manifests import facts

    about = facts(name)
    sizes = [file.get("size") for file in about.get("files", ())]
    about.setdefault("bytes", sum(sizes) if sizes and None not in sizes else None)
    if "needs" not in about:
        if sizes:
            about["needs"] = f"{_size(about['bytes']) or 'a'} download"
        else:
            about["needs"] = "nothing: it is made here" if "clips" in about else "a folder of your own"
    return {"name": name, **about}


def _size(count: int | None) -> str:
    return "" if count is None else console.size(count)


def _row(known: dict[str, Any]) -> list[Any]:
    counts = [known.get("clips", "any"), known.get("classes", "any"), known.get("hours", "")]
    needs = known["needs"].strip().partition("\n")[0]
    return [known["name"], *counts, _size(known["bytes"]), known.get("licence", "its own"), needs]


def _show(known: dict[str, Any]) -> None:
    """Print one dataset in full."""
    from clipmill.cli.fetch import EXAMPLES

    click.echo(f"{known['name']}: {known['title']}\n\n{known['description'].strip()}\n")
    counts = ", ".join(
        f"{known[what]} {what}" for what in ("clips", "classes", "folds", "hours") if what in known
    )
    rows = {
        "holds": counts,
        "fetching needs": known["needs"].strip(),
        "licence": known.get("licence", "its own"),
        "terms": known.get("licence_url", ""),
        "homepage": known.get("homepage", ""),
    }
    for what, text in rows.items():
        if text:
            click.echo(f"{what + ':':16}{text}")
    for file in known.get("files", ()):
        click.echo(f"{'file:':16}{file['file']} ({_size(file.get('size')) or 'size not published'})")
        for url in file["urls"]:
            click.echo(f"{'':16}{url}")
    if known.get("citation"):
        click.echo(f"\nTo cite it:\n{known['citation'].strip()}")
    click.echo("\nTo fetch it:")
    for example in EXAMPLES.get(known["name"], ()):
        click.echo(f"  {example}")


def _fetched(root: Path, name: str) -> dict[str, Any]:
    from clipmill.errors import TableError
    from clipmill.fetch.fetched import load

    try:
        got = load(root, name, need_media=False)
    except TableError as error:
        console.say(f"error: {error}; fetch it again")
        unknown = dict.fromkeys(("clips", "had", "failed", "skipped"))
        return {"name": name, "kind": "?", **unknown, "media": "?"}
    media = "there" if got.media_root.is_dir() else "gone"
    said = {"name": got.name, "kind": got.kind, "clips": got.manifest.num_rows, **got.counts}
    return {**said, "media": media, "media_root": str(got.media_root)}
