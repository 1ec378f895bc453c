"""Start a network from weights trained before: another run's, an exported file's, or published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipmill import tables
from clipmill.errors import TrainError
from clipmill.train.checkpoint import BEST, CONFIG, FUSION, LAST, begun, read_config
from clipmill_models import ModelError, Tagger
from clipmill_models.transfer import Transferred, load_matching

TORCH_SUFFIXES = (".pt", ".pth")
ALLOWED = "allowed is a run's folder, a .safetensors file, or a torch file (.pt, .pth) of tensors by name"

STATE_KEYS = ("ema", "model", "state_dict")
"""Under which of its keys a training state holds the weights; of several the first, the averaged ones."""


def initialise(
    model: Tagger, source: Path, labels: list[str], loss: str
) -> tuple[Transferred, dict[str, Any]]:
    """Load what fits of a source's weights into a fresh network.

    The last layers come over too where the source is a run, or a file that `pipeline export` made of
    one, with the same labels in the same order and the same loss. Otherwise they stay fresh.

    Args:
        model: changed in place.
        source: see `read_weights`.
        labels: classes that the network is to learn, in the order of its logits.
        loss: "softmax" or "sigmoid".

    Returns:
        What came over, and what config.json says of it: `from`, `sha256` and `bytes` of the file that
        was read, `weights` (which of it), `matched` tensors, `parameters` matched, and whether the
        head was `kept`.

    Raises:
        TrainError: the source cannot be read, or less than half of the network fits.
    """
    state, origin = read_weights(source)
    kept = origin.pop("labels", None) == labels and origin.pop("loss", None) == loss
    origin.pop("loss", None)
    try:
        transferred = load_matching(model, state, keep_head=kept)
    except ModelError as error:
        raise TrainError(f"{origin['from']}: {error}") from error
    origin |= {
        "matched": len(transferred.matched),
        "parameters": transferred.parameters_matched,
        "head": "kept" if kept else "fresh",
    }
    return transferred, origin


def began_with(run: Path, source: Path) -> dict[str, Any] | None:
    """What config.json says of the weights that a run began with, where they were those of `source`.

    None where they were not, and of a run that has not saved weights of its own yet.

    Raises:
        TrainError: the run's files are damaged.
    """
    said: dict[str, Any] | None = (begun(run) or {}).get("init")
    if said is None:
        return None
    file = Path(said["from"])
    return said if source.resolve() in (file.resolve(), file.parent.resolve()) else None


def model_of(source: Path) -> str | None:
    """Name of the network that a source's weights are of, where it says so: a run, or a file exported from one.

    Raises:
        TrainError: the run's config or the file is damaged.
    """
    return said_by(source).get("model")


def features_of(source: Path) -> dict[str, Any] | None:
    """What a run, or a file exported from one, was trained on, as `FrontEnd.config` says it; None: it is not known.

    Raises:
        TrainError: the run's config or the file is damaged.
    """
    found = said_by(source).get("features")
    return found if isinstance(found, dict) else None


def read_weights(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a network's tensors by name, on the CPU. Nothing is unpickled but tensors, numbers and strings.

    Args:
        source: a run's folder (its best weights, else the averaged ones of its last step), a
            .safetensors file, or a torch file: tensors by name, or a dict that holds them under "ema",
            "model" or "state_dict". DataParallel's "module." is taken off the names.

    Returns:
        The tensors, and where they came from: `from`, `sha256` and `bytes` of the file, `weights`; with
        `labels` and `loss` where the source says them.

    Raises:
        TrainError: the source is not there, is none of these, is damaged, or holds more than tensors.
    """
    about: dict[str, Any] = {}
    path = source
    if source.is_dir():
        path, about = _of_run(source)
    if not path.is_file():
        raise TrainError(f"{path}: is not there; {ALLOWED}")
    if path.suffix == ".safetensors":
        state, said = _safetensors(path)
        weights = "all"
        about = about or {name: said[name] for name in ("labels", "loss") if name in said}
    elif path.suffix in TORCH_SUFFIXES:
        state, weights = _torch(path)
    else:
        raise TrainError(f"{path}: ends in {path.suffix or 'nothing'!r}; {ALLOWED}")
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    digest, size = tables.sha256_of(path)
    return state, {"from": str(path), "sha256": digest, "bytes": size, "weights": weights, **about}


def said_by(source: Path) -> dict[str, Any]:
    """What a run's config.json says, or the header of a file that `pipeline export` made of one; else nothing.

    The run may be given by its folder or by its weights.
    """
    folder = source.parent if source.name in (BEST, LAST) else source
    if (folder / CONFIG).is_file():
        return read_config(folder)
    if source.suffix == ".safetensors" and source.is_file():
        return _safetensors(source, with_tensors=False)[1]
    return {}


def _of_run(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a run's weights, and its labels and loss."""
    if not any((folder / name).is_file() for name in (CONFIG, FUSION)):
        raise TrainError(f"{folder}: is a folder, but holds no {CONFIG}, so it is no run; {ALLOWED}")
    config = read_config(folder)
    path = next((folder / name for name in (BEST, LAST) if (folder / name).is_file()), None)
    if path is None:
        raise TrainError(
            f"{folder}: this run holds neither {BEST} nor {LAST}; let it train on with --resume, or name another"
        )
    return path, {name: config[name] for name in ("labels", "loss") if name in config}


def _safetensors(path: Path, *, with_tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and labels, loss, model and features where `pipeline export` wrote the file."""
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            names = list(file.keys()) if with_tensors else []
            state = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise TrainError(f"{path}: cannot be read as safetensors ({error})") from error
    about = ("labels", "loss", "model", "features")
    if not said.keys() >= set(about):
        return state, {}
    try:
        return state, {name: json.loads(said[name]) for name in about}
    except ValueError:
        return state, {}


class _Skipped:
    """Stands where a torch file holds a NumPy array or number, which weights never are."""

    def __init__(self, *state: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# Published checkpoints keep a sampler's arrays beside the weights. NumPy's own unpickling trusts what it is
# told of the memory, so it is not let near a stranger's file.
_NUMPY = ["numpy.ndarray", "numpy.dtype"] + [
    f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")
]


def _torch(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a torch file, and under which key they stood."""
    try:
        with torch.serialization.safe_globals([(_Skipped, name) for name in _NUMPY]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its zip reader or unpickler meets first
        raise TrainError(
            f"{path}: cannot be read as tensors alone ({_reason(error)}). Nothing else is unpickled: allowed is "
            "what torch.save(model.state_dict(), ...) writes, or safetensors"
        ) from error
    if not isinstance(found, Mapping):
        raise TrainError(f"{path}: holds a {type(found).__name__}; allowed is a dict of tensors by name")
    key = next((key for key in STATE_KEYS if isinstance(found.get(key), Mapping)), None)
    state = {
        name: value for name, value in (found[key] if key else found).items() if isinstance(value, Tensor)
    }
    if not state:
        raise TrainError(
            f"{path}: holds no tensors by name, but {', '.join(map(str, list(found)[:5])) or 'nothing'}; allowed is "
            f"a state dict, or one under {', '.join(STATE_KEYS)}"
        )
    return state, key or "all"


def _reason(error: Exception) -> str:
    """What torch met, without its advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    met = next((line for line in lines if "GLOBAL" in line or "WeightsUnpickler" in line), lines[0])
    return met.removeprefix("WeightsUnpickler error: ").partition(" Please use")[0]
