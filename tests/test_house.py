"""The plan of the house, held: imports point one way, commands are documented, help is instant."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from clipmill.cli import COMMANDS, cli
from clipmill.cli.reference import every_command
from clipmill.types import REASONS
from conftest import REPO

SOURCE = REPO / "pipeline" / "clipmill"

LAYERS = (
    {"errors", "types"},
    {"tables", "audio", "run", "sources"},
    {"features", "augment", "stores"},
    {"shards", "datasets"},
    {"loader", "fetch"},
    {"featurestore"},
    {"train"},
    {"report"},
    {"cli"},
)
"""A module may import from layers above its own line only, and from its own package."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem in LEVEL)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top, inside functions, or for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    """Which part of the house a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    here = part(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        there = rest.partition(".")[0]
        if top == "clipmill" and there in LEVEL and there != here:
            assert LEVEL[there] < LEVEL[here], f"{here} imports {name}"


def test_every_part_of_the_house_has_its_layer():
    assert {part(path) for path in SOURCE.rglob("*.py")} - {"__init__", "__main__"} == set(LEVEL)


@pytest.mark.parametrize(
    "path", sorted((REPO / "models/clipmill_models").glob("*.py")), ids=lambda path: path.name
)
def test_networks_depend_on_torch_alone(path):
    allowed = {"torch", "clipmill_models"} | set(sys.stdlib_module_names)
    allowed |= {"transformers"} if path.name == "ast.py" else set()
    assert {name.partition(".")[0] for name in imports(path)} <= allowed


def test_only_the_audio_folder_touches_codecs():
    codecs = {"av", "soundfile", "soxr", "ffmpeg", "imageio_ffmpeg"}
    for path in modules():
        if part(path) != "audio":
            assert not {name.partition(".")[0] for name in imports(path)} & codecs, path


@pytest.mark.parametrize("at", list(every_command()), ids=lambda at: at.command_path)
def test_every_command_has_help_with_an_example_and_stands_in_the_reference(at):
    assert at.command.help
    assert "Example:" in at.command.help
    assert "pipeline " in at.command.help.partition("Example:")[2]
    assert f"\n## {at.command_path}\n" in (REPO / "docs" / "cli.md").read_text()
    for parameter in at.command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{at.command_path} {parameter.opts[0]} has no help"


def test_the_cli_reference_is_what_help_says():
    # In a process of its own: click keeps how a command's --help was first asked for, be it by another test.
    made = subprocess.run(
        [sys.executable, "-m", "clipmill.cli.reference"], capture_output=True, text=True, check=True
    )
    assert (REPO / "docs" / "cli.md").read_text() == made.stdout, "run `make docs`"


def test_every_command_is_registered():
    files = {path.stem for path in (SOURCE / "cli").glob("*.py")} - {"__init__", "console", "reference"}
    assert files == set(COMMANDS) == set(cli.list_commands(click.Context(cli)))


@pytest.mark.parametrize("module", ["clipmill", "clipmill.cli"])
def test_help_answers_without_the_heavy_libraries(module):
    run = "import sys; from clipmill.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    heavy = "{'torch', 'numpy', 'pyarrow', 'matplotlib', 'rich', 'soundfile'}"
    code = f"import sys; sys.argv = ['pipeline', '--help']\n{run}assert not {heavy} & set(sys.modules), sorted(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fetch" in done.stdout


def test_it_runs_as_a_module(run):
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, "pipeline, version 0.1.0\n")


def test_every_reason_code_is_documented_with_its_meaning():
    page = (REPO / "docs" / "datasets.md").read_text()
    for code, meaning in REASONS.items():
        assert f"| `{code}` | {meaning} |" in page


def test_documents_link_only_to_files_that_are_there():
    import re

    for page in [REPO / "README.md", REPO / "CHANGELOG.md", *(REPO / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
