"""What a run leaves on disk, and how it is read again.

    config.json        everything that decides the run, and where its clips came from
    metrics.jsonl      one line each time the loss or the clips held out were measured, or a clip could not be read
    batches.jsonl      what each step saw, as hashes, where that was asked for
    last.pt            training state: weights, their average, Adam's moments, the step
    previous.pt        the same of the save before, should last.pt be damaged
    best.safetensors   the averaged weights that did best on the clips held out
    events.out.*       the same figures for TensorBoard

Every file is replaced whole or not at all, so that a run killed at any moment can go on.
Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as _short
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from clipmill import tables
from clipmill.errors import TableError, TrainError
from clipmill.features import FrontEnd
from clipmill.train.split import few
from clipmill_models import ModelError, Tagger, create_model

CONFIG, METRICS, LAST, BEST = "config.json", "metrics.jsonl", "last.pt", "best.safetensors"
PREVIOUS, LAUNCH = "previous.pt", "torchrun.id"
BATCHES = "batches.jsonl"
FUSION = "fusion.json"
"""What stands instead of config.json in a folder of `pipeline fuse`."""
CROSSVAL = "crossval.json"
"""What stands instead of it in a folder that holds several runs."""

FREE = frozenset({
    *("shards", "dataset", "device", "versions", "allow_leak", "stored.place"),
    *(f"recipe.{field}" for field in ("name", "about", "model", "init", "patience")),
    *(f"init.{field}" for field in ("from", "bytes", "weights", "matched", "parameters", "head")),
})  # fmt: skip
"""Fields of config.json that a resumed run may change: they decide no number, or another field says the same."""


@dataclass(frozen=True)
class Described:
    """What a run's config.json says of it."""

    folder: Path
    config: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """Class names, in the order of the logits."""
        return list(self.config["labels"])

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return int(self.config["sample_rate"])

    @property
    def feature(self) -> str | None:
        """The name of the feature that the network sees; None where it takes waveforms, or is fused of several."""
        return None if self.seen is None else str(self.seen["name"])

    @property
    def seen(self) -> dict[str, Any] | None:
        """The same with its version and settings, as `FrontEnd.config` says it."""
        return (self.config.get("features") or {}).get("feature")

    @property
    def loss(self) -> str:
        """softmax or sigmoid: how logits become probabilities."""
        return str(self.config["loss"])


@dataclass(frozen=True)
class Run(Described):
    """A run's network with trained weights, in evaluation mode, and all that it needs to hear a clip."""

    model: Tagger
    features: FrontEnd
    weights: str


def read_run(folder: Path, device: torch.device, weights: str = "best") -> Run:
    """Read a run's "best" weights, or the averaged ones of its "last" step.

    Raises:
        TrainError: no run is there, it has no such weights yet, or they do not fit its config.
    """
    config = read_config(folder)
    try:
        features = FrontEnd(**config["features"])
        model = create_model(config["model"], len(config["labels"]), features.bins)
        state = _best(folder) if weights == "best" else read_last(folder)["ema"]
        model.load_state_dict(state)
    except (KeyError, TypeError, ModelError) as error:
        raise TrainError(f"{folder / CONFIG}: is no run's config ({error!r})") from error
    except RuntimeError as error:
        raise TrainError(
            f"{folder}: its weights are not those of {config['model']}: {_first_line(error)}"
        ) from error
    return Run(folder, config, model.to(device).eval(), features.to(device).eval(), weights)


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.json; raises TrainError when there is none."""
    if (folder / FUSION).is_file():
        raise TrainError(
            f"{folder}: is a fused model, which `pipeline predict` and `pipeline evaluate` take, and this does not; "
            f"name one of the runs in its {FUSION}"
        )
    if not (folder / CONFIG).is_file():
        if runs := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
            raise TrainError(
                f"{folder}: holds no {CONFIG}, so it is no run, but it holds some: {few(runs)}; name one of them, such "
                f"as {folder / runs[0]}"
            )
        raise TrainError(
            f"{folder}: holds no {CONFIG}, so it is no run; `pipeline train --out {folder}` makes one"
        )
    try:
        config = tables.read_json(folder / CONFIG)
    except TableError as error:
        raise TrainError(str(error)) from error
    if not isinstance(config, dict):
        raise TrainError(f"{folder / CONFIG}: is no run's config")
    return config


def batches_file(rank: int) -> str:
    """Where a rank writes what each step saw."""
    return f"batches-rank{rank}.jsonl" if rank else BATCHES


def start_or_resume(
    out: Path, config: dict[str, Any], *, resume: bool, launch: str | None = None, restarts: int = 0
) -> tuple[Path | None, list[str]]:
    """Claim `out` for a run: (the training state to go on from or None, what to tell the user).

    Args:
        out: the run's folder.
        config: what config.json is to say.
        resume: whether a run that is there may be gone on with.
        launch: what torchrun calls its start; the run that it began it goes on with by itself.
        restarts: how often torchrun has started the ranks anew.

    Raises:
        TrainError: a run is there and `resume` is not given, or what is there was made otherwise.
    """
    resume = goes_on(out, resume=resume, launch=launch, restarts=restarts)
    saved, notes = look_up(out, config, resume=resume)
    if launch is not None:
        with tables.atomic_write(out / LAUNCH, "w") as file:
            file.write(launch)
    tables.write_json(out / CONFIG, config)
    return saved, notes


def goes_on(out: Path, *, resume: bool, launch: str | None, restarts: int) -> bool:
    """Whether a run that is there may be gone on with: that was asked for, or this start of torchrun began it."""
    again = launch is not None and (out / LAUNCH).exists() and (out / LAUNCH).read_text() == launch
    # "none" is what torchrun calls a start that nobody gave a name.
    return resume or (again and (launch != "none" or restarts > 0))


def look_up(out: Path, config: dict[str, Any], *, resume: bool) -> tuple[Path | None, list[str]]:
    """What `start_or_resume` would give, and refuse, without a change to the folder."""
    if (out / FUSION).exists():
        raise TrainError(f"{out}: holds a fused model; another --out starts a run")
    if (out / CROSSVAL).exists():
        raise TrainError(
            f"{out}: holds several runs ({CROSSVAL}); --out with the folder of one goes on with it, another --out "
            "starts a run"
        )
    if not (out / CONFIG).exists():
        return None, [f"--resume: {out} holds no run yet; starting from the beginning"] * resume
    check_unused(out, resume=resume)
    was = read_config(out)
    saved, notes = newest_state(out)
    if saved is None:  # there is nothing that a mended flag would contradict
        return None, [f"--resume: {out} holds no {LAST} yet; starting from the beginning"] * resume
    _check_same(out, was, config)
    recipe, steps = config["recipe"], was["recipe"]["steps"]
    if recipe["schedule"] == "one-cycle" and recipe["steps"] > steps:
        notes.append(
            f"the one-cycle rate, which had fallen over {steps} steps, now falls over {recipe['steps']}"
        )
    return saved, notes


def check_unused(out: Path, *, resume: bool) -> None:
    """Raise TrainError where a run is there, and is not to be gone on with.

    One that ended before it had anything to show, as where --wandb cannot log in, keeps no folder from the next.
    """
    files = (out / name for name in (METRICS, LAST, PREVIOUS, BEST))
    if (
        not resume
        and (out / CONFIG).exists()
        and any(path.exists() and path.stat().st_size for path in files)
    ):
        raise TrainError(
            f"{out}: already holds a run; --resume goes on with it, another --out starts a new one"
        )


def newest_state(out: Path) -> tuple[Path | None, list[str]]:
    """The newest training state of a run that can be read, None where it has none; and what to tell the user.

    Raises:
        TrainError: there are some, and none can be read.
    """
    there = [path for path in (out / LAST, out / PREVIOUS) if path.exists()]
    for path in there:
        try:
            read_state(path, mapped=True)
        except TrainError as error:
            if path == there[-1]:
                raise
            return there[-1], [f"{error}; going on from the save before it"]
        return path, []
    return None, []


def begun(out: Path) -> dict[str, Any] | None:
    """The config of a run that has saved its state, None where there is none.

    Raises:
        TrainError: its files are damaged.
    """
    there = (out / CONFIG).exists() and newest_state(out)[0] is not None
    return read_config(out) if there else None


def differing(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of two configs decides the numbers of their runs otherwise, in words; the number of steps aside."""
    was, is_ = _flat(saved), _flat(now)
    return [
        f"{name.removeprefix('recipe.')} was {_short(was.get(name))}, now {_short(is_.get(name))}"
        for name in sorted((was.keys() | is_.keys()) - FREE - {"recipe.steps"})
        if was.get(name) != is_.get(name) and name.split(".")[0] not in FREE
    ]


def _check_same(out: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise TrainError where a resumed run would not be the one that was begun; more steps are allowed."""
    unlike = differing(saved, now)
    was_steps, now_steps = saved["recipe"]["steps"], now["recipe"]["steps"]
    if now_steps < was_steps:
        unlike.append(f"steps was {was_steps}, now {now_steps}")
    if unlike:
        raise TrainError(
            f"{out}: this run was begun otherwise: {'; '.join(unlike)}. Give the same flags to --resume it "
            "(only --steps may grow), or choose another --out"
        )


def save_last(out: Path, state: dict[str, Any]) -> None:
    """Replace last.pt, and keep the one before; `state` holds only tensors, numbers, strings, lists and dicts."""
    with tables.atomic_write(out / LAST) as file:
        torch.save(state, file)
        # At every moment one of the two is there and whole: the new one takes the name when all of it is written.
        if (out / LAST).exists():
            os.replace(out / LAST, out / PREVIOUS)


def read_last(folder: Path) -> dict[str, Any]:
    """A run's newest training state, on the CPU; raises TrainError when there is none or it is damaged."""
    path, _ = newest_state(folder)
    if path is None:
        raise TrainError(f"{folder / LAST}: is not there; the run has not saved its state yet")
    return read_state(path, mapped=True)


def read_state(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """A training state, on the CPU; raises TrainError when it is damaged. `mapped`: tensors are read when used."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises whatever its zip reader or unpickler meets first
        raise TrainError(
            f"{path}: cannot be read ({_first_line(error)}); remove it, and --resume goes on from an earlier save or "
            "from the beginning"
        ) from error
    return state


def save_best(out: Path, state: dict[str, Tensor], *, step: int) -> None:
    """Replace best.safetensors with these weights and buffers; the step goes into its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with tables.atomic_write(out / BEST) as file:
        file.write(save(tensors, metadata={"step": str(step)}))


def _best(folder: Path) -> dict[str, Tensor]:
    path = folder / BEST
    if not path.is_file():
        raise TrainError(
            f"{path}: is not there; the run has not been evaluated yet, let it train on with --resume"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise TrainError(f"{path}: cannot be read ({error}); --weights last may still do") from error


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a half-written last one, from a file of them: they will be made again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(row)
    tables.write_jsonl(path, kept)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
