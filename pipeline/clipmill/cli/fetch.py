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
        "pipeline fetch esc50 --from ESC-50-master --root data",
        "pipeline fetch esc50 --from ESC-50-master --subset esc10",
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
    """


def _subcommand(kind: str, dataset: type[Any]) -> click.Command:
    hints = get_type_hints(dataset)
    params: list[click.Parameter] = []
    for field in dataclasses.fields(dataset):
        settings = dict(field.metadata["click"])
        choices = settings.pop("choices", None)
        if field.default is dataclasses.MISSING:
            settings["required"] = True
        else:
            settings |= {"default": field.default, "show_default": field.default is not None}
        params.append(
            click.Option(
                [field.metadata["flag"] or "--" + field.name.replace("_", "-"), field.name],
                type=click.Choice(choices) if choices else _click_type(hints[field.name]),
                help=field.metadata["help"],
                **settings,
            )
        )

    def run(root: Path, **options: Any) -> int:
        return _fetch(kind, dataset(**options), root)

    first = (dataset.__doc__ or "").strip().splitlines()[0]
    examples = "\n".join(f"  {line}" for line in EXAMPLES[kind])
    made = click.Command(kind, params=params, callback=run, help=f"{first}\n\n\b\nExample:\n{examples}")
    return console.root_option(made)  # type: ignore[return-value]


def _click_type(hint: Any) -> click.ParamType:
    names = str(hint)
    if "Path" in names:
        return click.Path(path_type=Path)
    if "int" in names:
        return click.INT
    return click.FLOAT if "float" in names else click.STRING


def _fetch(kind: str, dataset: Any, root: Path) -> int:
    import pyarrow.compute as pc

    from clipmill.fetch.local import fetch

    got = fetch(kind, dataset, root)
    counts = got.counts
    labels = got.manifest["labels"]
    unlabelled = pc.sum(pc.equal(pc.list_value_length(labels), 0)).as_py()
    total = sum(counts.values())
    console.say(
        f"{got.name}: {total} in = {counts['had']} had + {counts['failed']} failed + {counts['skipped']} skipped; "
        f"{pc.count_distinct(pc.list_flatten(labels)).as_py()} classes; media in {got.media_root}"
    )
    console.say_losses(got.losses)
    if unlabelled:
        console.say(f"  note: {unlabelled} clips have no label")
    console.say(f"next: pipeline shard {got.name} --root {root}")
    return DONE_IN_PART if counts["failed"] else DONE
