"""Audio features as torch modules: waveforms `[B, samples]` in, `[B, bins, frames]` out, 128 frames a second.

    feature = create_feature("cqt", sample_rate=44100)
    feature(wave)      # [B, feature.bins, 128 * seconds]

`FEATURES` lists them; `Feature` says what one is. `FrontEnd` stands between sound and a network.
"""

from __future__ import annotations

from clipmill.features.feature import FRAMES_PER_S, Feature, Framing, check_wave
from clipmill.features.front_end import FrontEnd
from clipmill.features.logmel import LogMel
from clipmill.features.registry import FEATURES, create_feature
from clipmill.features.stored import StoredFrontEnd

__all__ = [
    "FEATURES",
    "FRAMES_PER_S",
    "Feature",
    "Framing",
    "FrontEnd",
    "LogMel",
    "StoredFrontEnd",
    "check_wave",
    "create_feature",
]
