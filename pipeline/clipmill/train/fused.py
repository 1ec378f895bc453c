"""A fused model on disk, and as one network from sound to the fused answer.

    fusion.json        the method and weights, the runs by path and sha256 of their weights, classes, loss, rate

The runs stay where they are, and are not copied: a folder with fusion.json is moved together with them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipmill import __version__, tables
from clipmill.errors import TableError, TrainError
from clipmill.features import FrontEnd
from clipmill.train.checkpoint import BEST, CONFIG, CROSSVAL, FUSION, Described, Run, read_run
from clipmill.train.fusion import fuse_logits
from clipmill.train.lengths import longest_s
from clipmill_models import ModelError, Tagger

FIELDS = ("held_out", "labels", "loss", "members", "method", "sample_rate", "weights")
"""What fusion.json holds at least."""


class Fused(Tagger):
    """Several runs as one network: waveforms `[B, samples]` at their rate -> logits `[B, classes]`, float32.

    The logits are those of `fusion.fuse_logits`. Each run hears the sound through its own front end.

    Args:
        runs: of one rate and loss, with the same classes in any order, on one device.
        labels: the classes, in the order of the logits.
        method: see `fusion.fuse`.
        weights: see `fusion.fuse`.
    """

    places: Tensor
    input = "waveform"
    NAMES = ()
    GRAMMAR = ""
    HEAD = ()

    def __init__(
        self, runs: Sequence[Run], labels: list[str], method: str, weights: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.name = f"{method} of {', '.join(run.model.name for run in runs)}"
        self.loss, self.method, self.weights = runs[0].loss, method, weights
        self.sample_rate = runs[0].sample_rate
        self.networks = nn.ModuleList(run.model for run in runs)
        self.front_ends = nn.ModuleList(run.features for run in runs)
        places = [[run.labels.index(label) for label in labels] for run in runs]
        self.register_buffer("places", torch.tensor(places), persistent=False)  # [n, classes]
        shortest_s = min(longest_s(run.model, run.features) for run in runs)
        self.longest = None if shortest_s == math.inf else int(shortest_s * self.sample_rate)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, classes]`; raises ModelError where clips of several lengths are padded."""
        if lengths is not None:
            raise ModelError(f"{self.name}: takes clips of one length")
        found = [
            network(front_end(x)).float()[:, places]
            for network, front_end, places in zip(self.networks, self.front_ends, self.places, strict=True)
        ]
        return fuse_logits(torch.stack(found), self.method, self.loss, self.weights)


def read_tagger(folder: Path, device: torch.device, weights: str = "best") -> Run:
    """A run, as `read_run` gives it; or a fused model as one, whose front end leaves sound as it is.

    Raises:
        TrainError: as `read_run`; a fused model's file is damaged; or one of its runs is gone, has changed, or no
            longer fits the others.
    """
    if not (folder / FUSION).is_file():
        return read_run(folder, device, weights)
    if weights != "best":
        raise TrainError(
            f"{folder}: a fused model is of its runs' best weights; leave --weights {weights} out"
        )
    try:
        told = tables.read_json(folder / FUSION, *FIELDS)
        runs = [_member(folder, member, device) for member in told["members"]]
        for run in runs:
            if (sorted(run.labels), run.loss, run.sample_rate) != (
                sorted(told["labels"]), told["loss"], told["sample_rate"]
            ):  # fmt: skip
                raise TrainError(
                    f"{folder}: {run.folder} is of other classes, another loss or another rate now"
                )
        model = Fused(runs, told["labels"], told["method"], told["weights"]).to(device).eval()
    except TableError as error:
        raise TrainError(str(error)) from error
    except (TypeError, KeyError, IndexError) as error:
        raise TrainError(
            f"{folder / FUSION}: is damaged ({error!r}); `pipeline fuse` makes it anew"
        ) from error
    features = FrontEnd(told["sample_rate"]).to(device).eval()
    config = {**told, "model": model.name, "features": features.config}
    return Run(folder, config, model, features, weights)


def check_unused(out: Path) -> None:
    """Raise TrainError where a folder holds a model already."""
    for name in (FUSION, CONFIG, CROSSVAL):
        if (out / name).exists():
            raise TrainError(f"{out}: already holds a model ({name}); choose another --out")


def write_fused(
    out: Path,
    runs: Sequence[Described],
    method: str,
    weights: Sequence[float] | None,
    held_out: dict[str, Any] | None,
) -> None:
    """Write the fused model of some runs to fusion.json in `out`; equal runs and settings give equal bytes.

    Args:
        out: its folder.
        runs: the first one's order of the classes is the model's.
        method: see `fusion.fuse`.
        weights: see `fusion.fuse`.
        held_out: what the runs held out, where that is the same: `held_out` and `where` of their config.json.
    """
    first = runs[0]
    members = []
    for run in runs:
        digest, size = tables.sha256_of(run.folder / BEST)
        place = os.path.relpath(run.folder.resolve(), out.resolve())
        members.append({"run": place, "model": run.config["model"], "sha256": digest, "bytes": size})
    tables.write_json(out / FUSION, {
        "method": method,
        "weights": None if weights is None else list(weights),
        "members": members,
        "labels": first.labels,
        "loss": first.loss,
        "sample_rate": first.sample_rate,
        **{name: first.config.get(name) for name in ("dataset", "root_sha256", "files")},
        **(held_out or {"held_out": None, "where": None}),
        "versions": {"clipmill": __version__},
    })  # fmt: skip


def _member(folder: Path, member: dict[str, Any], device: torch.device) -> Run:
    """One of a fused model's runs, with the weights that were fused."""
    place = (folder / member["run"]).resolve()
    if not (place / BEST).is_file():
        raise TrainError(
            f"{folder}: its run {place} is not there (or has no {BEST}); bring it back to that place, or fuse anew "
            "with `pipeline fuse`"
        )
    if tables.sha256_of(place / BEST)[0] != member["sha256"]:
        raise TrainError(
            f"{folder}: its run {place} has changed since it was fused: {BEST} has another sha256; bring the old "
            "weights back, or fuse anew with `pipeline fuse`"
        )
    return read_run(place, device)
