"""The features by name."""

from __future__ import annotations

from typing import Any

from clipmill.errors import FeatureError
from clipmill.features.chroma import Chroma
from clipmill.features.cqt import Cqt
from clipmill.features.feature import Feature
from clipmill.features.gfcc import Gfcc
from clipmill.features.logmel import LogMel
from clipmill.features.mfcc import Mfcc
from clipmill.features.tempogram import Tempogram

FEATURES: dict[str, type[Feature]] = {
    kind.NAME: kind for kind in (LogMel, Mfcc, Gfcc, Chroma, Cqt, Tempogram)
}
"""What features are called -> the modules that compute them, in the order of the slides."""


def create_feature(name: str, **settings: Any) -> Feature:
    """The feature called `name`, with these of its settings; `sample_rate` is one of each.

    Raises:
        FeatureError: there is none of that name; settings that cannot be.
    """
    if name not in FEATURES:
        raise FeatureError(f"no feature is called {name!r}: allowed are {', '.join(FEATURES)}")
    return FEATURES[name](**settings)
