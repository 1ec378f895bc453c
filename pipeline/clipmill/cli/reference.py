"""The CLI reference, docs/cli.md, made from the commands' own help: `make docs` writes it, a test compares."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from clipmill.cli import cli

_HEAD = """# The command line

Made from the commands' own help by `make docs`. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done in part (some clips failed; the report says which),
75 try again later, 130 interrupted (safe to run again).
"""


def every_command() -> Iterator[click.Context]:
    """A context of each command, subcommands and the root included, as the command line makes it."""
    yield from _walk(click.Context(cli, info_name="pipeline", terminal_width=100, **cli.context_settings))


def reference() -> str:
    """The whole reference as Markdown."""
    pages = [f"## {at.command_path}\n\n```\n{at.command.get_help(at)}\n```\n" for at in every_command()]
    return inspect.cleandoc(_HEAD) + "\n\n" + "\n".join(pages)


def _walk(context: click.Context) -> Iterator[click.Context]:
    yield context
    command = context.command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from _walk(click.Context(below, parent=context, info_name=name, **below.context_settings))


if __name__ == "__main__":
    print(reference(), end="")
