"""Audio features as torch modules: waveforms `[B, samples]` in, `[B, bins, 128 * seconds]` out."""

from clipmill.features.logmel import LogMel

__all__ = ["LogMel"]
