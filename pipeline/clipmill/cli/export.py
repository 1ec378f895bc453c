"""`pipeline export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipmill.cli import DONE, console

if TYPE_CHECKING:
    from clipmill.train.export import Exported


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(["onnx", "safetensors", "torch"]),
    required=True,
    help="An ONNX graph, weights with their description, or a program for torch.export.load.",
)
@click.option(
    "--frontend",
    type=click.Choice(["inside", "outside"]),
    default=None,
    help="Whether it takes sound or what the network itself takes; not for safetensors.  [default: inside]",
)
@console.weights_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="File to write.  [default: model.onnx, model.safetensors or model.pt2 in RUN]",
)
@click.option("--opset", type=int, default=None, help="ONNX's operator set, from 18 up.  [default: 18]")
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
@console.json_option
def command(
    run: Path,
    format: str,
    frontend: str | None,
    weights: str,
    out: Path | None,
    opset: int | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Write a trained run as one file that other programs run.

    The file is read back and tried on random sound beside the run; one that answers otherwise is
    not kept. It holds the labels and all else that is needed to use it.

    \b
    Example:
      pipeline export runs/x --format onnx
      pipeline export runs/x --format onnx --frontend outside --out x.onnx
      pipeline export runs/x --format safetensors --weights last
    """
    import torch

    from clipmill.train.checkpoint import read_run
    from clipmill.train.export import export_run

    trained = read_run(run, torch.device("cpu"), weights)
    made = export_run(trained, format, out, frontend=frontend, opset=opset, overwrite=overwrite)
    if as_json:
        console.print_json(_row(made))
    else:
        _print(made)
    return DONE


def _row(made: Exported) -> dict[str, Any]:
    return {
        "file": str(made.file),
        "format": made.format,
        "bytes": made.bytes,
        "opset": made.opset,
        **{name: made.about.get(name) for name in ("model", "weights", "frontend", "input", "input_shape")},
        "compared_s": made.compared_s,
        "compared_batches": made.compared_batches,
        "probability_difference": made.probability_difference,
        "logit_difference": made.logit_difference,
    }


def _print(made: Exported) -> None:
    about = made.about
    kind = f"onnx, opset {made.opset}" if made.opset else made.format
    click.echo(
        f"{made.file}: {about['model']}, {about['weights']} weights, {kind}, {console.size(made.bytes)}"
    )
    if "input" in about:
        shape = ", ".join(map(str, about["input_shape"]))
        of = "sound" if about["input"] == "waveform" else "features of sound"
        click.echo(
            f"  {about['input']} [{shape}] ({of} at {about['sample_rate']} Hz) -> "
            f"logits, probabilities [batch, {len(about['labels'])}]"
        )
    sounds = ", ".join(f"{seconds:g}" for seconds in made.compared_s)
    batches = " and ".join(map(str, made.compared_batches))
    click.echo(
        f"  tried on random sound of {sounds} s, {batches} at a time: probabilities differ from the run's by at "
        f"most {made.probability_difference:.1e}, logits by {made.logit_difference:.1e} of the largest"
    )
