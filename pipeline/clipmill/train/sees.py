"""What stands between a run's clips and its network, where they are sound and where they are stored features."""

from __future__ import annotations

from typing import Any

import torch

from clipmill.errors import TrainError
from clipmill.features import FrontEnd, StoredFrontEnd
from clipmill.featurestore import StoredClips
from clipmill.shards.read import Shards


def front_end_of(shards: Shards, features: dict[str, Any]) -> FrontEnd | StoredFrontEnd:
    """The module between these clips and a network that is made for `features`, as `FrontEnd.config` says them.

    Raises:
        TrainError: the clips are stored, and not as these features.
    """
    if not isinstance(shards, StoredClips):
        return FrontEnd(**features)
    wanted, had = features["feature"], shards.spec
    if wanted is None:
        raise TrainError(
            f"{shards.place}: holds {had.feature}, and the network takes waveforms; give --shards"
        )
    ours = {"name": had.feature, "version": had.version, **had.settings}
    theirs = {"name": wanted["name"], "version": wanted["version"], **wanted["settings"]}
    differing = [
        f"{name} {ours.get(name)} and not {theirs.get(name)}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise TrainError(
            f"{shards.place}: is not what the network was trained on: {', '.join(differing)}; choose another entry "
            "with --feature, or give --shards"
        )
    return StoredFrontEnd(had.create(), torch.from_numpy(shards.silence))
