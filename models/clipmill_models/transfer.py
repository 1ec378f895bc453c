"""Weights of one network into another, tensor by tensor: all that fits by name and shape, but not the last layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipmill_models.base import ModelError, Tagger

EXAMPLES = 3
"""Names that a line or an error shows; the fields hold all."""


@dataclass(frozen=True)
class Transferred:
    """What came over into a network and what did not; tensors are parameters and BatchNorm's buffers alike.

    Attributes:
        matched: names that were loaded.
        fresh: names of the last layers that were left as they were drawn.
        mismatched: (name, their shape, our shape) of what fits by name alone.
        missing: our names that they lack, the last layers' apart.
        unused: their names that we lack.
        parameters_matched: trainable numbers that were loaded.
        parameters: trainable numbers of the network.
    """

    matched: tuple[str, ...]
    fresh: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    parameters_matched: int
    parameters: int

    def lines(self) -> list[str]:
        """The same for a person, in a few lines; nothing is said of what is empty."""
        share = self.parameters_matched / self.parameters
        said = [
            f"{len(self.matched)} tensors taken over, {self.parameters_matched:,} of {self.parameters:,} "
            f"parameters ({share:.1%})"
        ]
        if self.fresh:
            said.append(f"drawn anew, the last layers: {_some(self.fresh)}")
        if self.mismatched:
            shapes = [f"{name} (theirs {theirs}, ours {ours})" for name, theirs, ours in self.mismatched]
            said.append(f"drawn anew, of another shape: {_some(shapes)}")
        if self.missing:
            said.append(f"drawn anew, not among theirs: {_some(self.missing)}")
        if self.unused:
            said.append(f"theirs that are not used: {_some(self.unused)}")
        return said


def load_matching(model: Tagger, state: Mapping[str, Tensor], *, keep_head: bool = False) -> Transferred:
    """Load what fits `model` by name and shape; the rest of it stays as it is.

    The last layers (`model.HEAD`) stay fresh too, whatever fits, since other classes need others. Into an
    `outline_model` nothing can be loaded: there it says what would come over.

    Args:
        model: changed in place; its device, dtypes and mode stay.
        state: tensors by the names of `state_dict`, of any float dtype.
        keep_head: load the last layers as well, where the classes are the same ones.

    Raises:
        ModelError: less than half of the parameters outside the last layers fit: another network's weights,
            of which next to nothing would come over.
    """
    ours = model.state_dict()
    head = {name for name in ours if any(f"{name}.".startswith(f"{layer}.") for layer in model.HEAD)}
    mismatched = tuple(
        (name, tuple(state[name].shape), tuple(tensor.shape))
        for name, tensor in ours.items()
        if name in state and state[name].shape != tensor.shape and (keep_head or name not in head)
    )
    differing = {name for name, _, _ in mismatched}
    matched = tuple(
        name for name in ours if name in state and name not in differing and (keep_head or name not in head)
    )
    sizes = {
        name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    fitting, body = (
        sum(sizes.get(name, 0) for name in names if name not in head) for names in (matched, sizes)
    )
    if 2 * fitting < body:
        raise ModelError(f"{fitting:,} of {body:,} parameters fit {_why_not(model, ours, state, mismatched)}")
    with torch.no_grad():
        for name in matched:
            ours[name].copy_(state[name])
    return Transferred(
        matched,
        () if keep_head else tuple(name for name in ours if name in head),
        mismatched,
        tuple(name for name in ours if name not in state and (keep_head or name not in head)),
        tuple(name for name in state if name not in ours),
        sum(sizes.get(name, 0) for name in matched),
        sum(sizes.values()),
    )


def _why_not(
    model: Tagger,
    ours: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...],
) -> str:
    """The network, and why so little came over: other shapes, or other names."""
    if mismatched:
        name, theirs, our = mismatched[0]
        reason = f"{len(mismatched)} tensors have its names but other shapes, {name} {theirs} instead of {our} first"
    else:
        reason = f"theirs are called {_some(list(state)) or '(there are none)'}; its own are called {_some(list(ours))}"
    return f"{model.name}: {reason}; allowed are weights of which at least half fit, whatever their classes"


def _some(names: tuple[str, ...] | list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more
