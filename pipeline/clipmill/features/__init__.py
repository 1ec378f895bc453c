"""Audio features as torch modules: waveforms `[B, samples]` in, what a network takes out."""

from clipmill.features.front_end import FrontEnd
from clipmill.features.logmel import LogMel

__all__ = ["FrontEnd", "LogMel"]
