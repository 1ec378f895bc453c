"""How large every network is, beside what the papers print of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clipmill_models import FAMILIES, ModelError, Printed, Tagger, list_models, outline_model
from clipmill_models.base import count_parameters, multiply_adds

CLASSES, SECONDS = 527, 10.0
"""What sizes are told for: AudioSet's classes and length."""


@dataclass(frozen=True)
class Compared:
    """A printed figure beside ours; `ours` is None where this machine cannot build the network."""

    printed: Printed
    ours: int | None

    @property
    def agrees(self) -> bool | None:
        """Whether ours, rounded as the figure is, is the figure; None where there is no ours."""
        return None if self.ours is None else self.printed.agrees(self.ours)


class Sized:
    """A network's sizes, counted when they are asked for and without its memory.

    Attributes:
        name: canonical.
        lacking: why it cannot be built here, such as a library that is missing; else "".

    Raises:
        ModelError: there is no such name.
    """

    def __init__(self, name: str) -> None:
        self.lacking = ""
        self._outlines: dict[int, Tagger] = {}
        try:
            self._outlines[CLASSES] = outline_model(name, CLASSES)
            self.name = self._outlines[CLASSES].name
        except ModelError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            self.name, self.lacking = name.strip().lower(), str(error)

    @cached_property
    def network(self) -> Tagger:
        """The network without its memory, for 527 classes."""
        return self._outline(CLASSES)

    @cached_property
    def parameters(self) -> int | None:
        """Trainable parameters at 527 classes."""
        return None if self.lacking else count_parameters(self.network)

    @cached_property
    def multiply_adds(self) -> int | None:
        """Multiply-adds of a clip of 10 s; None where the network takes no clip that long."""
        if self.lacking:
            return None
        try:
            return multiply_adds(self.network, self.network.input_shape(SECONDS))
        except ModelError:
            return None

    def compare(self) -> Iterator[Compared]:
        """Every size that the papers print of it."""
        for family in FAMILIES.values():
            for printed in family.PRINTED:
                if printed.model == self.name and not printed.quantity.startswith("audios"):
                    yield Compared(printed, None if self.lacking else self._ours(printed))

    def _outline(self, num_classes: int) -> Any:
        if num_classes not in self._outlines:
            self._outlines[num_classes] = outline_model(self.name, num_classes)
        return self._outlines[num_classes]

    def _ours(self, printed: Printed) -> int:
        network = self._outline(printed.num_classes)
        if printed.quantity == "multiply-adds":
            return multiply_adds(network, network.input_shape(printed.seconds))
        if printed.quantity == "downsampler parameters":
            return int(network.downsampler_parameters())
        return count_parameters(network)


def every_model() -> list[Sized]:
    """All that `list_models` names."""
    return [Sized(name) for name in list_models()]
