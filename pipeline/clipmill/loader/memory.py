"""Memory for batches, used again: pages that a process has never touched cost as much as reading into them."""

from __future__ import annotations

import sys
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT = 16
"""Pieces of memory that are known, at most."""


def _references(pieces: list[NDArray[np.int16]], place: int) -> int:
    return sys.getrefcount(pieces[place])


_UNUSED = _references([np.empty(0, np.int16)], 0)
"""What `_references` says of a piece that nothing but the list knows."""


class Memory:
    """Gives room for batches. Safe for threads.

    Pinned memory, from which the device copies by itself, comes from torch's own cache. Other memory is
    used again when nobody has the tensor, or any view of it, any more.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._pieces: list[NDArray[np.int16]] = []
        self._lock = threading.Lock()

    def empty(self, clips: int, samples: int) -> Tensor:
        """Room for int16 `[clips, samples]`, with whatever was in it."""
        if self._pin:
            return torch.empty((clips, samples), dtype=torch.int16, pin_memory=True)
        size = clips * samples
        with self._lock:
            # torch holds on to the part that it was given, and that to the piece, for as long as any tensor is there.
            return torch.from_numpy(self._piece(size)[:size]).view(clips, samples)

    def _piece(self, size: int) -> NDArray[np.int16]:
        free = [place for place in range(len(self._pieces)) if _references(self._pieces, place) == _UNUSED]
        fitting = [place for place in free if size <= len(self._pieces[place]) <= 2 * size]
        if fitting:
            return self._pieces[min(fitting, key=lambda place: len(self._pieces[place]))]
        if len(self._pieces) >= KEPT:  # what is in use is forgotten, and freed by whoever has it
            del self._pieces[free[0] if free else 0]
        self._pieces.append(np.empty(size, np.int16))
        return self._pieces[-1]
