"""`pipeline datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipmill.cli import console


@click.command("datasets")
@console.root_option
@console.json_option
def command(root: Path, as_json: bool) -> None:
    """List the datasets that can be fetched, and those already fetched under --root.

    \b
    Example:
      pipeline datasets
      pipeline datasets --json
    """
    from clipmill.datasets import DATASETS
    from clipmill.fetch.local import fetched_names
    from clipmill_manifests import facts

    known = [{"name": name, **facts(name)} for name in DATASETS]
    fetched = [_fetched(root, name) for name in fetched_names(root)]
    if as_json:
        console.print_json({"datasets": known, "root": str(root), "fetched": fetched})
        return
    rows = [
        [d["name"], d.get("clips", "any"), d.get("classes", "any"), d.get("licence", "its own"), d["title"]]
        for d in known
    ]
    console.print_table("Known", ["name", "clips", "classes", "licence", "title"], rows)
    click.echo()
    if fetched:
        columns = ("name", "kind", "clips", "had", "failed", "skipped", "media")
        console.print_table(
            f"Fetched under {root}", columns, [[f[column] for column in columns] for f in fetched]
        )
    else:
        click.echo(f"Nothing fetched under {root} yet: try `pipeline fetch tones`.")


def _fetched(root: Path, name: str) -> dict[str, Any]:
    from clipmill.errors import TableError
    from clipmill.fetch.local import load

    try:
        got = load(root, name, need_media=False)
    except TableError as error:
        console.say(f"error: {error}; fetch it again")
        return {
            "name": name,
            "kind": "?",
            "clips": None,
            "had": None,
            "failed": None,
            "skipped": None,
            "media": "?",
        }
    media = "there" if got.media_root.is_dir() else "gone"
    said = {"name": got.name, "kind": got.kind, "clips": got.manifest.num_rows, **got.counts}
    return {**said, "media": media, "media_root": str(got.media_root)}
