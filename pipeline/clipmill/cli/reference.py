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


def every_command() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The words of each command, subcommands and the root included, and the command."""
    yield from _walk(("pipeline",), cli)


def reference() -> str:
    """The whole reference as Markdown."""
    pages = []
    for words, command in every_command():
        context = click.Context(command, info_name=" ".join(words), max_content_width=100, terminal_width=100)
        pages.append(f"## {' '.join(words)}\n\n```\n{command.get_help(context)}\n```\n")
    return inspect.cleandoc(_HEAD) + "\n\n" + "\n".join(pages)


def _walk(words: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from _walk((*words, name), below)


if __name__ == "__main__":
    print(reference(), end="")
