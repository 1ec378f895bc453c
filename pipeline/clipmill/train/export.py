"""A trained run as one file that other programs run: ONNX, torch's .pt2, or safetensors.

What is written is read back and tried on random sound, beside the run itself, before it gets
its name: a file that answers otherwise is never left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from clipmill import __version__, tables
from clipmill.errors import ConfigError, TrainError
from clipmill.train.checkpoint import BEST, CONFIG, LAST, METRICS, Run
from clipmill.train.objective import probabilities
from clipmill.train.trace import Traced, crop_s, first_line, quiet, takes, trace_run
from clipmill_models import create_model

SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch": ".pt2"}
EXTRA = "clipmill.json"
"""The file within a .pt2 that holds its description."""

OPSET = 18
"""ONNX's operator set that torch's exporter itself writes; a later one is converted from it."""

PROBABILITY_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-3
"""What a file may differ by: probabilities, and logits as a share of the largest one (or of 1)."""

CHECKED_S = (1.0, 2.5)
"""Seconds of random sound that a file is tried on, beside the crop that the run was trained on."""
CHECKED_BATCHES = (1, 3)

Answer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Sound or features -> logits and probabilities `[batch, classes]`."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the run.

    Attributes:
        file: where it lies.
        format: "onnx", "torch" or "safetensors".
        bytes: its size.
        about: what the file says of itself.
        opset: ONNX's operator set; None in other formats.
        compared_s: seconds of the random sounds that it was tried on.
        compared_batches: how many of them at a time.
        probability_difference: the greatest one.
        logit_difference: the greatest one, as a share of the largest logit (or of 1).
    """

    file: Path
    format: str
    bytes: int
    about: dict[str, Any]
    opset: int | None
    compared_s: tuple[float, ...]
    compared_batches: tuple[int, ...]
    probability_difference: float
    logit_difference: float


def export_run(
    run: Run,
    format: str,
    out: Path | None = None,
    *,
    frontend: str | None = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a run as one file, and compare what the file answers with what the run answers.

    Args:
        run: on the CPU, from `checkpoint.read_run`.
        format: "onnx", "torch" (a program for `torch.export.load`) or "safetensors" (weights and their
            description, for `clipmill_models`).
        out: the file; by default `model` with the format's suffix, in the run's folder.
        frontend: "inside" for sound at the run's rate, `[batch, samples]`; "outside" for what the network
            itself takes: features `[batch, bins, frames]`, or sound at the network's own rate. None is
            "inside"; weights alone have neither.
        opset: ONNX's operator set, from 18 up; None is 18.
        overwrite: replace what is there.

    Raises:
        ConfigError: a format, front end, opset or file name that cannot be.
        TrainError: something is there; ONNX's libraries are missing; the network cannot be exported; or
            the file answers otherwise than the run, and is not kept.
    """
    out = out or run.folder / f"model{SUFFIXES.get(format, '')}"
    _check_flags(format, frontend, opset)
    _check_place(run, out, format, overwrite)
    inside = format != "safetensors" and frontend != "outside"
    about = _describe(run)
    compared_s = tuple(seconds for seconds in sorted({*CHECKED_S, crop_s(run)}) if takes(run, seconds))
    with tables.atomic_write(out) as file:
        if format == "safetensors":
            _write_safetensors(run, about, file)
        else:
            traced = trace_run(run, inside=inside)
            about |= {"frontend": "inside" if inside else "outside", "sample_rate": traced.sample_rate}
            about |= {"input": traced.input, "input_shape": traced.input_shape}
            if format == "torch":
                _write_torch(traced, about, file)
            else:
                _write_onnx(traced, about, opset or OPSET, file)
        file.flush()
        probability, logit = _compare(run, _read_back(run, Path(file.name), format), inside, compared_s)
        if not (probability <= PROBABILITY_TOLERANCE and logit <= LOGIT_TOLERANCE):
            raise TrainError(
                f"{out}: answers otherwise than the run, so it is not kept: probabilities differ by up to "
                f"{probability:.1e} ({PROBABILITY_TOLERANCE:g} is allowed), logits by up to {logit:.1e} of the "
                f"largest ({LOGIT_TOLERANCE:g} is allowed); another --format may do"
            )
        size = Path(file.name).stat().st_size
    used = (opset or OPSET) if format == "onnx" else None
    return Exported(out, format, size, about, used, compared_s, CHECKED_BATCHES, probability, logit)


def _check_flags(format: str, frontend: str | None, opset: int | None) -> None:
    """Raise ConfigError for flags that cannot be, TrainError where a format's libraries are missing."""
    if format not in SUFFIXES:
        raise ConfigError(f"--format {format}: allowed are {', '.join(SUFFIXES)}")
    if frontend not in ("inside", "outside", None):
        raise ConfigError(f"--frontend {frontend}: allowed are inside and outside")
    if format == "safetensors" and frontend:
        raise ConfigError(
            f"--frontend {frontend}: safetensors hold weights alone, so nothing stands inside; "
            "leave it out, or take --format onnx or torch"
        )
    if opset is not None and format != "onnx":
        raise ConfigError(f"--opset {opset}: is ONNX's; leave it out with --format {format}")
    if format != "onnx":
        return
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not _is_there(name)]
    if missing:
        raise TrainError(
            f"--format onnx needs {', '.join(missing)}: pip install 'clipmill[export]'; "
            "--format torch and safetensors need nothing more"
        )
    latest = import_module("onnx").defs.onnx_opset_version()
    if opset is not None and not OPSET <= opset <= latest:
        raise ConfigError(f"--opset {opset}: allowed is {OPSET} to {latest}")


def _is_there(library: str) -> bool:
    try:
        import_module(library)
    except ImportError:
        return False
    return True


def _check_place(run: Run, out: Path, format: str, overwrite: bool) -> None:
    """Raise where `out` is of another format, is a part of the run, or is there already."""
    if out.suffix != SUFFIXES[format]:
        raise ConfigError(f"--out {out}: with --format {format} the name ends in {SUFFIXES[format]}")
    if out.resolve() in {(run.folder / name).resolve() for name in (BEST, CONFIG, LAST, METRICS)}:
        raise ConfigError(f"--out {out}: is a file of the run itself; choose another name")
    if out.exists() and not overwrite:
        raise TrainError(f"{out}: is there already; --overwrite replaces it, another --out leaves it")


def _describe(run: Run) -> dict[str, Any]:
    """What every file says of itself, as plain JSON values."""
    feature = run.features.feature
    return {
        "clipmill": __version__,
        "model": run.model.name,
        "in_bins": run.features.bins,
        "labels": run.labels,
        "loss": run.loss,
        "features": run.features.config,
        "frames_per_s": None if feature is None else feature.frames_per_s,
        "weights": run.weights,
    }


def _write_safetensors(run: Run, about: dict[str, Any], file: IO[bytes]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in run.model.state_dict().items()}
    file.write(save(tensors, metadata=_as_texts(about)))


def _write_torch(traced: Traced, about: dict[str, Any], file: IO[bytes]) -> None:
    with quiet():
        torch.export.save(traced.program, file, extra_files={EXTRA: json.dumps(about, ensure_ascii=False)})


def _write_onnx(traced: Traced, about: dict[str, Any], opset: int, file: IO[bytes]) -> None:
    names = {place: size for place, size in enumerate(traced.input_shape) if isinstance(size, str)}
    try:
        with quiet():
            made: Any = torch.onnx.export(
                traced.program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[traced.input],
                output_names=["logits", "probabilities"],
                dynamic_shapes=(names,),
            )
            # Every node says where the code that made it lies on this machine.
            import_module("onnxscript").ir.passes.common.ClearMetadataAndDocStringPass()(made.model)
    except Exception as error:  # the exporter raises whatever it meets
        raise TrainError(f"{about['model']} cannot be exported as ONNX: {first_line(error)}") from error
    if made.model.opset_imports[""] != opset:
        raise TrainError(
            f"--opset {opset}: {about['model']} cannot be converted to it; {made.model.opset_imports['']} can be had"
        )
    made.model.metadata_props.update(_as_texts(about))
    file.write(made.model_proto.SerializeToString())


def _as_texts(about: dict[str, Any]) -> dict[str, str]:
    """Every field as JSON, for headers that hold texts alone."""
    return {name: json.dumps(value, ensure_ascii=False) for name, value in about.items()}


def _read_back(run: Run, path: Path, format: str) -> Answer:
    """What a file that was written answers, without the run."""
    if format == "safetensors":
        model = create_model(run.model.name, len(run.labels), run.features.bins).eval()
        model.load_state_dict(load_file(path))

        def from_weights(x: Tensor) -> tuple[Tensor, Tensor]:
            logits = model(x)
            return logits, probabilities(logits, run.loss)

        return from_weights
    if format == "torch":
        with quiet(), open(path, "rb") as file:
            return torch.export.load(file).module()
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # an error is raised as well
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def from_onnx(x: Tensor) -> tuple[Tensor, Tensor]:
        logits, shares = session.run(["logits", "probabilities"], {name: x.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(shares)

    return from_onnx


@torch.inference_mode()
def _compare(run: Run, answer: Answer, inside: bool, compared_s: tuple[float, ...]) -> tuple[float, float]:
    """The greatest difference of probabilities, and of logits as a share of the largest one (or of 1)."""
    noise = torch.Generator().manual_seed(0)
    probability = logit = 0.0
    for seconds in compared_s:
        for batch in CHECKED_BATCHES:
            sound = 0.1 * torch.randn(batch, round(seconds * run.sample_rate), generator=noise)
            heard = run.features(sound)
            logits = run.model(heard)
            if not logits.isfinite().all():
                raise TrainError(f"{run.folder}: its {run.weights} weights answer with no finite numbers")
            try:
                theirs, shares = answer(sound if inside else heard)
            except Exception as error:  # whatever the other runtime raises
                raise TrainError(f"what was exported cannot be run: {first_line(error)}") from error
            scale = logits.abs().max().clamp(min=1)
            probability = max(probability, _greatest(shares - probabilities(logits, run.loss)))
            logit = max(logit, _greatest((theirs - logits) / scale))
    return probability, logit


def _greatest(difference: Tensor) -> float:
    return float(difference.abs().nan_to_num(nan=float("inf")).max())
