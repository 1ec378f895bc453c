"""The `pipeline` command: a skin over the library, one file a command.

Command modules import only click and each other at their top, and the library inside
their functions, so that `pipeline --help` never waits for torch.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done in part (some clips failed; the
report says which), 75 try again later, 130 interrupted (safe to run again).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib import import_module

import click

from clipmill import __version__
from clipmill.errors import ClipmillError

COMMANDS = (
    "datasets",
    "fetch",
    "lock",
    "shard",
    "inspect",
    "verify",
    "features",
    "leaks",
    "convert",
    "models",
    "recipes",
    "train",
    "evaluate",
    "report",
    "predict",
    "fuse",
    "export",
    "bench",
    "demo",
)
"""The commands in the order that a clip travels; each is `command` in its module of this package."""

DONE, FAILED, DONE_IN_PART, INTERRUPTED = 0, 1, 3, 130

_AGAIN_S = 0.05
"""Until an interrupt that was lost comes once more."""


class LazyGroup(click.Group):
    """A group that imports a command's module only when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order that a clip travels."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import and return a command, or None when there is none of that name."""
        if name not in COMMANDS:
            return None
        return import_module(f"clipmill.cli.{name}").command


@click.command(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="pipeline")
def cli() -> None:
    """From raw audio to GPU-ready shards and trained audio taggers.

    \b
    Example: the whole way on a built-in collection
      pipeline fetch tones
      pipeline shard tones
      pipeline train --shards data/tones/shards/webdataset-flac-44100 --fold 1 --out runs/tones
      pipeline predict runs/tones my.wav
    """


def main() -> None:
    """Run the command line and end the process with one of the documented exit codes."""
    # What a scheduler sends before it kills ends a command as Ctrl-C does, its workers with it.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        signal.signal(number, signal.default_int_handler)
    sys.unraisablehook = _come_again
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        for number in (signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)  # a second one must not change how this ends
        click.echo("\ninterrupted: run the same command again to go on", err=True)
        code = INTERRUPTED
    except ClipmillError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): keep the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except OSError as error:
        click.echo(
            f"error: {error.filename or 'output'}: {error.strerror or error}{_hint(error.errno)}", err=True
        )
        code = FAILED
    sys.exit(code if isinstance(code, int) else DONE)


def _come_again(lost: sys.UnraisableHookArgs) -> None:
    """A Ctrl-C that came while an object was being cleared away, where Python can but print it, comes once more."""
    if lost.exc_type is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        sys.__unraisablehook__(lost)


def _hint(code: int | None) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "; free some space and run the same command again: what is finished stays finished"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "; choose another place (--root, --out or --store), or mend its permissions"
    return ""
