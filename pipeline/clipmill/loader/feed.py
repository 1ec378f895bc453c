"""How clips are read, as opposed to which: what a run's flags say of it, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clipmill.errors import ConfigError
from clipmill.loader.batches import Digest
from clipmill.loader.choose import choose_sampler
from clipmill.loader.damage import MAX_BAD, Bad
from clipmill.loader.loader import Loader
from clipmill.loader.sampler import Sampler
from clipmill.loader.streaming import BUFFER, StreamLoader, tars_of
from clipmill.shards.read import Shards

ACCESSES = ("random", "stream")
"""random: any clip, with one read each. stream: whole tars from front to back, for stores where each read is dear."""


@dataclass(frozen=True)
class Feed:
    """How clips are read.

    Attributes:
        workers: threads that read ahead; 0: none.
        access: one of `ACCESSES`.
        buffer: clips that a stream's shuffling chooses from.
        max_bad: share of the clips that may be unreadable.
        check: compare each clip's samples with the sha256 in the index.
    """

    workers: int = 0
    access: str = "random"
    buffer: int = BUFFER
    max_bad: float = MAX_BAD
    check: bool = False

    def __post_init__(self) -> None:
        if self.access not in ACCESSES:
            raise ConfigError(f"--access {self.access}: allowed are {', '.join(ACCESSES)}")

    def sampler(
        self, shards: Shards, sampling: str, seed: int, set_weights: Sequence[float] | None = None
    ) -> Sampler | None:
        """See `choose_sampler`; a stream has none.

        Raises:
            ConfigError: also where a stream is asked for what only random access can do.
        """
        if self.access == "random":
            return choose_sampler(shards, sampling, seed, set_weights)
        for flag, asked in (
            (f"--sampling {sampling}", sampling != "shuffled"),
            ("--set-weights", set_weights is not None),
            ("--check-hashes", self.check),
        ):
            if asked:
                raise ConfigError(f"{flag}: a stream takes clips as they come; --access random does this")
        tars_of(shards)
        return None

    def check_fit(self, shards: Shards) -> None:
        """Raise ConfigError where hashes are to be compared that are not known."""
        unknown = [part.store.place for part in shards.sets if "foreign" in part.info]
        if self.check and unknown:
            raise ConfigError(
                f"--check-hashes: others made {unknown[0]}, and no hashes of its clips are known"
            )

    def loader(
        self,
        shards: Shards,
        batch_size: int,
        *,
        sampler: Sampler | None,
        seed: int,
        crop: int,
        device: torch.device,
        tell: Callable[[Bad], None],
        watch: Callable[[int, Digest], None] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> Loader | StreamLoader:
        """The loader of a run: its `batches` are those of each step; a stream's come whole, and are cropped later."""
        shared = {
            "seed": seed,
            "workers": self.workers,
            "device": device,
            "max_bad": self.max_bad,
            "tell": tell,
            "watch": watch,
            "rank": rank,
            "ranks": ranks,
        }
        if self.access == "stream":
            return StreamLoader(shards, batch_size, buffer=self.buffer, **shared)  # type: ignore[arg-type]
        return Loader(shards, batch_size, sampler=sampler, crop=crop, check=self.check, **shared)  # type: ignore[arg-type]
