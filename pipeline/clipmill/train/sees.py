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
    if least_s := features.get("least_s"):
        raise TrainError(
            f"{shards.place}: holds features of clips as they are, and --pad-s {least_s:g} pads their sound; give "
            "--shards SHARDS"
        )
    if features["feature"] is None:
        raise TrainError(
            f"{shards.place}: holds {shards.spec.feature}, and the network takes waveforms; give --shards SHARDS"
        )
    if other := shards.spec.unlike(features["feature"]):
        raise TrainError(
            f"{shards.place}: is not what the network was trained on: {other}; --features STORE/ENTRY names another "
            "entry, --shards computes from sound"
        )
    return StoredFrontEnd(shards.spec.create(), torch.from_numpy(shards.silence))
