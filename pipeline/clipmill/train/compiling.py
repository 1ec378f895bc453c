"""What torch.compile cannot do, in the words of the flag that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clipmill.errors import TrainError


@contextmanager
def compiling() -> Iterator[None]:
    """Where a compiled network is called, which compiles it: a TrainError says what the compiler lacks."""
    # Imported here: it takes as long as the rest of torch.
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        what = str(error).strip().splitlines()[0]
        raise TrainError(f"--compile: {what}; without --compile nothing needs a compiler") from error
