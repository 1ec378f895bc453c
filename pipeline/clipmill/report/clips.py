"""Clips to look at and to listen to: a picture of each, its sound, and what a network heard in it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from clipmill.audio import encode
from clipmill.augment import to_float
from clipmill.errors import FeatureError, ShardError
from clipmill.features import LogMel
from clipmill.report.markup import Html, cell, data_uri, table, tag
from clipmill.shards.read import Shards
from clipmill.train.evaluate import HardClip

matplotlib.use("Agg")

from matplotlib.image import imsave

LONGEST_S = 30
"""Seconds of a clip that a page holds at most: of 44.1 kHz they are some 3 MB already."""

_COLUMNS = 320
_MELS = 64
_RANGE_DB = 80.0


def clip_cards(shards: Shards | None, clips: Sequence[HardClip]) -> Html:
    """The clips side by side, each with its log-mel, its sound as FLAC at its own rate, and what was heard.

    None: the sound is not there any more, and what was heard stands alone.
    """
    return tag("div", *(_card(shards, clip) for clip in clips), class_="clips")


def clip_table(clips: Sequence[dict[str, object]]) -> Html:
    """The same as text alone, of clips as evaluation.json has them, each with its `run`."""
    rows = [
        (
            clip["key"],
            ", ".join(clip["labels"]),  # type: ignore[arg-type]
            ", ".join(f"{label} {share:.2f}" for label, share in clip["heard"]),  # type: ignore[attr-defined]
            clip["run"],
            f"{clip['loss']:.3f}",
        )
        for clip in clips
    ]
    return table(("clip", "has", "heard", "run", "loss"), rows, texts=4)


def logmel_png(samples: NDArray[np.int16], rate: int) -> bytes | None:
    """A picture of int16 `[samples]` at `rate` Hz: mel bins upwards, time to the right, the loudest 80 dB.

    None at a rate so low that the mel filters find nothing.
    """
    try:
        extract = LogMel(sample_rate=rate, n_mels=_MELS)
    except FeatureError:
        return None
    with torch.inference_mode():
        heard = extract(to_float(torch.from_numpy(samples))[None])[0].numpy()  # [mels, frames]
    columns = np.array_split(heard, min(_COLUMNS, heard.shape[1]), axis=1)
    small = np.stack([part.mean(1) for part in columns], axis=1)
    top = float(small.max())
    out = io.BytesIO()
    imsave(out, small, vmin=top - _RANGE_DB, vmax=top, cmap="magma", origin="lower", format="png")
    return out.getvalue()


def _sound(shards: Shards, clip: HardClip) -> list[Html]:
    """A picture and a player, or why there is none; and how long the clip is."""
    seconds = int(shards.samples[clip.row]) / shards.sample_rate
    cut = f", of which the first {LONGEST_S} are here" if seconds > LONGEST_S else ""
    length = tag("small", f"{seconds:g} s{cut}")
    try:
        samples = shards.read(clip.row)[: LONGEST_S * shards.sample_rate]
    except ShardError as error:  # it could be read when it was scored
        return [tag("p", f"its sound cannot be read now: {error}"), length]
    parts = []
    picture = logmel_png(samples, shards.sample_rate)
    if picture is not None:
        parts.append(tag("img", src=data_uri("image/png", picture), alt=f"log-mel of {clip.key}"))
    sound = data_uri("audio/flac", encode(samples, shards.sample_rate, "flac"))
    parts.append(tag("audio", src=sound, controls="", preload="metadata"))
    return [*parts, length]


def _card(shards: Shards | None, clip: HardClip) -> Html:
    parts = [tag("p", "its shards of sound are gone")] if shards is None else _sound(shards, clip)
    heard = [
        tag(
            "tr",
            tag("td", tag("b", label) if label in clip.labels else label, class_="text"),
            cell(f"{share:.2f}", part=share),
        )
        for label, share in clip.heard
    ]
    return tag(
        "article",
        tag("h3", tag("small", "true: "), ", ".join(clip.labels)),
        *parts,
        tag("small", "heard:"),
        tag("table", *heard),
        tag("small", f"{clip.key} · loss {clip.loss:.3f} · {clip.shard}, clip {clip.row}"),
        class_="clip",
    )
