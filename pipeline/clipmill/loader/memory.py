"""Memory for batches, used again: pages that a process has never touched cost as much as reading into them."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SOUND: np.dtype[Any] = np.dtype(np.int16)

KEPT = 16
"""Pieces of memory that are known, at most."""


def _references(pieces: list[NDArray[Any]], place: int) -> int:
    return sys.getrefcount(pieces[place])


_UNUSED = _references([np.empty(0, np.int16)], 0)
"""What `_references` says of a piece that nothing but the list knows."""


class Memory:
    """Gives room for batches. Safe for threads.

    Pinned memory, from which the device copies by itself, comes from torch's own cache. Other memory is
    used again when nobody has the tensor, or any view of it, any more.

    Args:
        dtype: of the values.
        bins: values at each place in time; None where there is but one.
        pin: whether a device is to copy from it.
    """

    def __init__(self, dtype: np.dtype[Any] = SOUND, bins: int | None = None, *, pin: bool) -> None:
        self._dtype, self._bins, self._pin = dtype, bins, pin
        self._pieces: list[NDArray[Any]] = []
        self._lock = threading.Lock()

    def empty(self, clips: int, places: int) -> Tensor:
        """Room for `[clips, places]`, or `[clips, places, bins]`, with whatever was in it."""
        shape = (clips, places) if self._bins is None else (clips, places, self._bins)
        if self._pin:
            kind = torch.from_numpy(np.empty(0, self._dtype)).dtype
            return torch.empty(shape, dtype=kind, pin_memory=True)
        size = math.prod(shape)
        with self._lock:
            # torch holds on to the part that it was given, and that to the piece, for as long as any tensor is there.
            return torch.from_numpy(self._piece(size)[:size]).view(shape)

    def _piece(self, size: int) -> NDArray[Any]:
        free = [place for place in range(len(self._pieces)) if _references(self._pieces, place) == _UNUSED]
        fitting = [place for place in free if size <= len(self._pieces[place]) <= 2 * size]
        if fitting:
            return self._pieces[min(fitting, key=lambda place: len(self._pieces[place]))]
        if len(self._pieces) >= KEPT:  # what is in use is forgotten, and freed by whoever has it
            del self._pieces[free[0] if free else 0]
        self._pieces.append(np.empty(size, self._dtype))
        return self._pieces[-1]
