"""Memory for batches, used again: pages that a process has never touched cost as much as reading into them."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT = 16
"""Pieces of memory that wait to be used again, at most."""


class Memory:
    """Gives room for batches. Safe for threads.

    Pinned memory, from which the device copies by itself, comes from torch's own cache. Other memory comes back
    here when nobody has the tensor, or any view of it, any more.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._free: list[NDArray[np.int16]] = []
        self._lock = threading.Lock()

    def empty(self, clips: int, samples: int) -> Tensor:
        """Room for int16 `[clips, samples]`, with whatever was in it."""
        if self._pin:
            return torch.empty((clips, samples), dtype=torch.int16, pin_memory=True)
        size = clips * samples
        with self._lock:
            fitting = [place for place, piece in enumerate(self._free) if size <= len(piece) <= 2 * size]
            best = min(fitting, key=lambda place: len(self._free[place]), default=None)
            piece = np.empty(size, np.int16) if best is None else self._free.pop(best)
        lent = piece[:size]  # torch holds on to this very object for as long as any tensor shares its memory
        weakref.finalize(lent, self._back, piece).atexit = False
        return torch.from_numpy(lent).view(clips, samples)

    def _back(self, piece: NDArray[np.int16]) -> None:
        # Whoever lets go of a batch may hold the lock at that moment, in this very thread.
        if self._lock.acquire(blocking=False):
            try:
                if len(self._free) == KEPT:
                    self._free.pop(0)
                self._free.append(piece)
            finally:
                self._lock.release()
