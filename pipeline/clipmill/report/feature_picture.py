"""A picture of a feature: time in seconds to the right, and upwards what its bins are."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from torchaudio.functional import melscale_fbanks

from clipmill.errors import ConfigError
from clipmill.features import Framing
from clipmill.features.spec import FeatureSpec

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_TICKS = 9
_PITCHES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def plot_feature(values: NDArray[np.float32], spec: FeatureSpec, unit: str, title: str, path: Path) -> None:
    """Draw `[bins, frames]` into a file.

    Args:
        values: the feature.
        spec: what it is.
        unit: of the values.
        title: what it is of.
        path: ends in .png, .pdf, .svg or .jpg.

    Raises:
        ConfigError: another ending.
    """
    if path.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise ConfigError(f"--plot {path}: allowed endings are .png, .pdf, .svg and .jpg")
    bins, frames = values.shape
    what, names = bin_names(spec, bins)
    figure, axis = plt.subplots(figsize=(10, 4.5), layout="constrained")
    # A frame is drawn about the time that it is centred on.
    rate = spec.settings["sample_rate"]
    edges = (np.arange(2) * frames - 0.5) * Framing(rate).hop / rate
    extent = (edges[0], edges[1], -0.5, bins - 0.5)
    # The first coefficient is the level, beside which nothing else would be seen.
    low, high = np.percentile(values, (2, 98) if what == "coefficient" else (0, 100))
    picture = axis.imshow(
        values, origin="lower", aspect="auto", cmap="magma", extent=extent, vmin=low, vmax=high
    )
    places = np.unique(np.linspace(0, bins - 1, min(bins, _TICKS)).round().astype(int))
    if spec.feature == "chroma":
        places = np.arange(0, bins, bins // 12)
    axis.set_yticks(places, [names[place] for place in places])
    axis.set_xlabel("time (s)")
    axis.set_ylabel(what)
    axis.set_title(f"{spec.feature} of {title}")
    figure.colorbar(picture, label=unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bin_names(spec: FeatureSpec, bins: int) -> tuple[str, list[str]]:
    """What a feature's bins are, with the unit, and the name of each."""
    said, places = spec.settings, np.arange(bins)
    if spec.feature == "logmel":
        edges = (said["f_min"], said["f_max"], bins, said["sample_rate"], said["mel_norm"], said["mel_scale"])
        filters = melscale_fbanks(said["n_fft"] // 2 + 1, *edges).numpy()  # [frequencies, bins]
        hertz = np.linspace(0, said["sample_rate"] / 2, len(filters)) @ filters / filters.sum(0)
        return "mel band, centre (Hz)", [f"{centre:.0f}" for centre in hertz]
    if spec.feature == "cqt":
        hertz = said["f_min"] * 2.0 ** (places / said["bins_per_octave"])
        return "note (Hz)", [f"{centre:.0f}" for centre in hertz]
    if spec.feature == "chroma":
        semitones = [divmod(place * 12, bins) for place in range(bins)]
        return "pitch class", [_PITCHES[whole] if not part else "" for whole, part in semitones]
    if spec.feature == "tempogram":
        rate = said["sample_rate"]
        return "lag (s)", [f"{lag:.2f}" for lag in places * Framing(rate).hop / rate]
    return "coefficient", [str(place) for place in places]
