"""`pipeline models`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from clipmill.cli import console

if TYPE_CHECKING:
    from clipmill_models.sizes import Compared, Sized


@click.command("models")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@console.json_option
def command(names: tuple[str, ...], as_json: bool) -> None:
    """List the networks with their sizes, beside what the papers print of them.

    Sizes are for 527 classes, multiply-adds for a clip of 10 s; below them, each figure that a
    paper prints stands beside ours for the classes and seconds that it was printed for. NAME is any
    network's, such as erann-2-12, printed or not.

    \b
    Example:
      pipeline models
      pipeline models erann-1-6 cnn14 erann-2-12
      pipeline models --json
    """
    from clipmill.errors import ConfigError
    from clipmill_models import ModelError
    from clipmill_models.sizes import Sized, every_model

    try:
        models = [Sized(name) for name in names] or every_model()
    except ModelError as error:
        raise ConfigError(str(error)) from error
    if as_json:
        console.print_json([_facts(model) for model in models])
        return
    columns = ("model", "takes", "parameters", "multiply-adds", "printed", "where")
    console.print_table("", columns, [row for model in models for row in _rows(model)])
    for lacking in dict.fromkeys(model.lacking for model in models if model.lacking):
        console.say(lacking)


def _facts(model: Sized) -> dict[str, Any]:
    return {
        "name": model.name,
        "takes": _takes(model),
        "parameters": model.parameters,
        "multiply_adds": model.multiply_adds,
        "lacking": model.lacking or None,
        "printed": [
            {
                "quantity": each.printed.quantity,
                "figure": each.printed.figure,
                "ours": each.ours,
                "agrees": each.agrees,
                "num_classes": each.printed.num_classes,
                "seconds": each.printed.seconds,
                "source": each.printed.source,
                "note": each.printed.note or None,
            }
            for each in model.compare()
        ],
    }


def _takes(model: Sized) -> str | None:
    if model.lacking:
        return None
    what = "log-mel" if model.network.input == "features" else "waveform"
    rate = model.network.sample_rate
    return f"{what}, {rate / 1000:g} kHz" if rate else what


def _rows(model: Sized) -> Iterator[tuple[str | None, ...]]:
    """A network's line, and one for each printed figure."""
    adds = model.multiply_adds
    parameters = "-" if model.parameters is None else f"{model.parameters:,}"
    yield model.name, _takes(model), parameters, "-" if adds is None else f"{adds / 1e9:.2f} G", None, None
    for each in model.compare():
        ours = "-" if each.ours is None else _like(each)
        place = ("", ours) if each.printed.quantity == "multiply-adds" else (ours, "")
        yield None, None, *place, each.printed.figure, _where(each)


def _like(each: Compared) -> str:
    """Ours, with a digit more than the figure where the two differ."""
    assert each.ours is not None
    number, _, unit = each.printed.figure.partition(" ")
    digits = len(number.partition(".")[2]) + (0 if each.agrees or not unit else 2)
    return f"{each.ours / {'': 1, 'K': 1e3, 'M': 1e6, 'G': 1e9}[unit]:,.{digits}f} {unit}".strip()


def _where(each: Compared) -> str:
    printed = each.printed
    facts = [printed.source]
    if printed.num_classes != 527 and printed.quantity == "parameters":
        facts.append(f"{printed.num_classes} classes")
    if printed.seconds != 10 and printed.quantity == "multiply-adds":
        facts.append(f"{printed.seconds:g} s")
    if printed.quantity not in ("parameters", "multiply-adds"):
        facts.append(printed.quantity)
    if not each.agrees and printed.note:
        facts.append(printed.note)
    return "; ".join(facts)
