"""`pipeline datasets`."""

from __future__ import annotations

from pathlib import Path

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
    from clipmill.fetch.local import fetched_names, load
    from clipmill_manifests import facts

    known = [{"name": name, **facts(name)} for name in DATASETS]
    fetched = []
    for name in fetched_names(root):
        got = load(root, name)
        fetched.append(
            {
                "name": name,
                "kind": got.kind,
                "clips": got.manifest.num_rows,
                "media_root": str(got.media_root),
                **got.counts,
            }
        )
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
        rows = [[f["name"], f["kind"], f["clips"], f["had"], f["failed"], f["skipped"]] for f in fetched]
        console.print_table(
            f"Fetched under {root}", ["name", "kind", "clips", "had", "failed", "skipped"], rows
        )
    else:
        click.echo(f"Nothing fetched under {root} yet: try `pipeline fetch tones`.")
