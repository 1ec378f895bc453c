"""Features computed once and kept: a store of them, keyed by all that made them, and read as shards are.

store = FeatureStore("features")
store.entry("logmel").clips                      # a `Shards` whose clips are [frames, bins]
store.get(["1-100032-A-0"], "logmel")            # [tensor of [bins, frames]]
make_features(shards, Path("features"), create_feature("logmel", sample_rate=44100))
"""

from __future__ import annotations

from clipmill.featurestore.clips import StoredClips
from clipmill.featurestore.entry import Entry, Statistics
from clipmill.featurestore.job import Made, make_features
from clipmill.featurestore.store import FeatureStore

__all__ = ["Entry", "FeatureStore", "Made", "Statistics", "StoredClips", "make_features"]
