"""Pictures of shards: what the clips look like, and how they are spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.compute as pc

from clipmill.errors import ConfigError
from clipmill.shards.read import Shards

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_SPECTROGRAMS = 12
_LOOKED_AT = 10_000
"""Clips among which those to show are looked for: enough to meet the labels, and no wait at two million."""
_INK, _ACCENT = "#33475b", "#3a78a8"


def plot_shards(where: str | Path, path: Path, seed: int = 0, *, keep: str | None = None) -> None:
    """Draw twelve clips' spectrograms and histograms of length, quality, labels and rates into `path`.

    The clips are drawn at random by `seed`, one of each label as far as twelve go; `keep` is an
    expression as `Shards.where` takes it.

    Raises:
        ShardError: there are no shards, `keep` keeps none, or a clip that is drawn cannot be read.
        ConfigError: `keep` cannot be read, or the file's ending is not one that can be drawn.
    """
    shards = Shards.open(where, ours=True)
    if keep is not None:
        shards = shards.where(keep)
    if path.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise ConfigError(f"--plot {path}: allowed endings are .png, .pdf, .svg and .jpg")
    figure = plt.figure(figsize=(18, 11), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=[3, 2])
    upper, lower = panels
    kept = "" if keep is None else f" where {keep}"
    upper.suptitle(f"{shards.name}: {len(shards)} clips in {shards.place}{kept}", fontsize=13, color=_INK)
    axes = upper.subplots(3, 4).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, row in zip(axes, _chosen(shards, seed), strict=False):
        _spectrogram(axis, shards, int(row))
    _histograms(lower.subplots(1, 6), shards)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _chosen(shards: Shards, seed: int) -> list[int]:
    """Rows of clips to show: the first of each label in a random order, then others."""
    order = np.random.default_rng(seed).permutation(len(shards))[:_LOOKED_AT]
    labels = dict(zip(order.tolist(), shards.index["labels"].take(order).to_pylist(), strict=True))
    seen: set[str] = set()
    first: list[int] = []
    others: list[int] = []
    for row in order.tolist():
        new = set(labels[row]) - seen
        (first if new else others).append(row)
        seen |= new
    return (
        sorted(first[:_SPECTROGRAMS], key=lambda r: labels[r]) + others[: max(_SPECTROGRAMS - len(first), 0)]
    )


def _spectrogram(axis: Axes, shards: Shards, row: int) -> None:
    wave = shards.read(row).astype(np.float32) / 32768.0
    rate = shards.sample_rate
    axis.set_axis_on()
    with np.errstate(
        divide="ignore"
    ):  # the padding is digital silence: its log is minus infinity, and drawn so
        axis.specgram(wave, NFFT=1024, Fs=rate, noverlap=512, cmap="magma", vmin=-140, vmax=-30)
    axis.set_ylim(0, min(14000, rate / 2))
    entry = shards.index.slice(row, 1).to_pylist()[0]
    axis.set_title(f"{', '.join(entry['labels']) or 'no label'}: {entry['key']}"[:44], fontsize=8, color=_INK)
    axis.tick_params(labelsize=7)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")


def _histograms(axes: Any, shards: Shards) -> None:
    index = shards.index
    for axis, column, scale, title in (
        (axes[0], "duration_s", 1, "duration before padding (s)"),
        (axes[1], "loudness_lufs", 1, "integrated loudness (LUFS)"),
        (axes[2], "silent", 100, "silent (% of time)"),
        (axes[3], "bandwidth_hz", 1e-3, "bandwidth (kHz)"),
    ):
        axis.hist(pc.drop_null(index[column]).to_numpy() * scale, bins=40, color=_ACCENT)
        axis.set_title(title, fontsize=9, color=_INK)
        axis.set_ylabel("clips", fontsize=8)
    found = {
        row["values"]: row["counts"] for row in pc.value_counts(pc.list_flatten(index["labels"])).to_pylist()
    }
    labels = sorted(shards.labels, key=lambda label: -found.get(label, 0))
    shown = labels[:30]
    _bars(axes[4], [label[:22] for label in shown], [found.get(label, 0) for label in shown], "clips of each label" + (
        f" (30 of {len(labels)})" if len(labels) > 30 else ""))  # fmt: skip
    rates = pc.value_counts(index["source_rate"]).to_pylist()
    rates.sort(key=lambda r: r["values"])
    _bars(
        axes[5],
        [f"{r['values']} Hz" for r in rates],
        [r["counts"] for r in rates],
        "sample rate of the sources",
    )


def _bars(axis: Axes, names: list[str], counts: Any, title: str) -> None:
    axis.barh(range(len(names)), counts, color=_ACCENT)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9, color=_INK)
