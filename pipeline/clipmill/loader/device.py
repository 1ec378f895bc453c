"""Batches to the device, one ahead of the network."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import torch

from clipmill.loader.batches import Batch


def on_device(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """Yield each batch on `device`.

    On CUDA the next batch is copied on a stream of its own while the network works on this one:
    double buffering, without a moment at which the CPU waits for the device. Closing this closes `batches`.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    ready: tuple[Batch, torch.cuda.Event] | None = None
    with closing(batches):
        for batch in batches:
            with torch.cuda.stream(side):
                moved = batch.to(device)
                copied = side.record_event()
            if ready is not None:
                yield _handed_over(*ready, device)
            ready = moved, copied
    if ready is not None:
        yield _handed_over(*ready, device)


def _handed_over(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """The batch for the stream that the network runs on, which waits for the copy; the CPU does not."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for part in batch[:3]:
        part.record_stream(
            current
        )  # its memory must not be given to the next copy before the network is done
    return batch
