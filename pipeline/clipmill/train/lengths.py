"""How long a clip may be: networks whose positions are learnt hear no more than they were built for."""

from __future__ import annotations

import math

from clipmill.errors import TrainError
from clipmill.features import FrontEnd, StoredFrontEnd
from clipmill_models import Tagger


def hears(network: Tagger, features: FrontEnd | StoredFrontEnd, samples: int) -> bool:
    """Whether the network takes a clip of so many samples at the shards' rate."""
    return network.longest is None or features.places(samples) <= network.longest


def longest_s(network: Tagger, features: FrontEnd | StoredFrontEnd) -> float:
    """The most whole seconds that the network takes; infinity where any will do."""
    if network.longest is None:
        return math.inf
    seconds = 0
    while hears(network, features, (seconds + 1) * features.sample_rate):
        seconds += 1
    return seconds


def check_heard(
    network: Tagger,
    features: FrontEnd | StoredFrontEnd,
    samples: int,
    what: str,
    mend: str = "--where 'duration_s <= {most:g}' leaves the longer ones out",
) -> None:
    """Raise TrainError, naming `what`, where a clip of so many samples is longer than the network takes.

    `mend` says what to do, with `{most}` for the seconds that the network takes.
    """
    if not hears(network, features, samples):
        most = longest_s(network, features)
        raise TrainError(
            f"{what} is {samples / features.sample_rate:g} s long with its padding, and {network.name} takes clips of "
            f"up to {most:g} s; {mend.format(most=most)}"
        )
