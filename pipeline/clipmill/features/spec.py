"""The feature spec: all that determines a feature's numbers, as canonical JSON, and the hash that a store keys by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, get_args, get_type_hints

from clipmill.errors import FeatureError
from clipmill.features.feature import Feature
from clipmill.features.registry import FEATURES, create_feature

DTYPES = ("float16", "float32")
"""Number types that features are kept in, little-endian."""

KEY_DIGITS = 12
"""Hexadecimal digits of a hash that stand in names: of a million, two share them by chance once in 500 times."""

_DECODING = ("av", "clipmill", "imageio-ffmpeg", "libsndfile", "soundfile", "soxr")
"""What decides a decoded clip's samples, of the versions in dataset.json; clipmill's own mixes, rounds and pads."""

_RECIPE = {
    "mono": "mean of the channels",
    "resampler": "soxr HQ",
    "samples": "16 bit, rounded to nearest",
    "padding": "zeros to whole seconds",
}
"""What becomes of a decoded clip; see docs/shards.md."""


class Sound(Protocol):
    """Shards, as far as a spec looks at them."""

    @property
    def info(self) -> dict[str, Any]:
        """What their dataset.json says."""


@dataclass(frozen=True)
class FeatureSpec:
    """All that determines the numbers of a stored feature, apart from the clips.

    Attributes:
        feature: its name in `features.FEATURES`.
        version: of its code, `Feature.VERSION`.
        settings: all of them, resolved, as plain JSON values. What is no setting of a feature, such as a window that is
            always Hann's or a hop that follows from the rate, is its version's.
        dtype: one of `DTYPES`.
        sound: what of the shards decides the samples: rate, decoder, recipe, and the versions that decoded, as far as
            dataset.json has them. Not their format, encoding or order, which change no sample.

    Raises:
        FeatureError: another dtype, or settings that are no JSON.
    """

    feature: str
    version: int
    settings: Mapping[str, Any]
    dtype: str
    sound: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise FeatureError(f"--dtype {self.dtype}: allowed are {', '.join(DTYPES)}")
        try:
            kept = json.loads(self.json)
        except (TypeError, ValueError) as error:
            raise FeatureError(f"a spec of {self.feature} is no JSON: {error}") from error
        # Copies: what a caller changes later must not change what the hash is of.
        object.__setattr__(self, "settings", kept["settings"])
        object.__setattr__(self, "sound", kept["sound"])

    def __hash__(self) -> int:
        return hash(self.json)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureSpec) and self.json == other.json

    @classmethod
    def of(cls, feature: Feature, shards: Sound, dtype: str = "float16") -> FeatureSpec:
        """The spec of a feature of the sound in one set of our shards.

        Raises:
            FeatureError: the feature is of another rate than the shards.
            ShardError: the shards are several sets, or others made them.
        """
        info = shards.info
        rate = info["spec"]["sample_rate"]
        if feature.settings.sample_rate != rate:
            raise FeatureError(
                f"{feature.NAME}: its sample_rate is {feature.settings.sample_rate} Hz: allowed is {rate}, that of the "
                f"shards; `pipeline shard --sample-rate {feature.settings.sample_rate}` makes others"
            )
        versions = {name: info["versions"][name] for name in _DECODING if name in info.get("versions", {})}
        sound = {"sample_rate": rate, "decoder": info["spec"]["decoder"], **_RECIPE, "versions": versions}
        return cls(feature.NAME, feature.VERSION, _plain(feature), dtype, sound)

    @property
    def json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, floats in the fewest digits that give them back; ASCII."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def sha256(self) -> str:
        """Of `json`, in hex."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    def create(self) -> Feature:
        """The module that computes the numbers, from waveforms `[B, samples]`: for a store and in training alike.

        Raises:
            FeatureError: this clipmill has no such feature or setting, or another version of its code.
        """
        feature = create_feature(self.feature, **self.settings)
        if self.version != feature.VERSION:
            raise FeatureError(
                f"{self.feature} was computed by version {self.version} of its code, and this clipmill has version "
                f"{feature.VERSION}, whose numbers differ: install the clipmill that made it, or make it anew"
            )
        return feature

    def unlike(self, seen: Mapping[str, Any]) -> str:
        """In words, how it differs from the feature that a network has seen, as `FrontEnd.config` says it; or empty."""
        if self.feature != seen["name"]:
            return f"{self.feature} and not {seen['name']}"
        had = {"version": self.version, **self.settings}
        wanted = {"version": seen["version"], **seen["settings"]}
        return ", ".join(
            f"{name} {had.get(name, 'none')} and not {wanted.get(name, 'none')}"
            for name in sorted({*had, *wanted})
            if had.get(name) != wanted.get(name)
        )

    def difference(self, stored: FeatureSpec) -> str:
        """In words, in which fields a store's spec differs from this one; empty where in none."""
        asked, had = dict(_flat(asdict(self))), dict(_flat(asdict(stored)))
        return "; ".join(
            f"{name} is {asked.get(name, 'not given')}, the store has {had.get(name, 'none')}"
            for name in sorted({*asked, *had})
            if name not in asked or name not in had or _differ(asked[name], had[name])
        )


def settings_of(name: str, words: Mapping[str, str]) -> dict[str, Any]:
    """Settings of the feature called `name` from text, each as the number or name that it is; "null" is None.

    Raises:
        FeatureError: there is no such feature, or a setting is no such number. An unknown one is left to the feature.
    """
    if name not in FEATURES:
        raise FeatureError(f"no feature is called {name!r}: allowed are {', '.join(FEATURES)}")
    hints = get_type_hints(FEATURES[name].SETTINGS)
    found: dict[str, Any] = {}
    for setting, word in words.items():
        allowed = get_args(hints.get(setting)) or (hints.get(setting, str),)
        if word == "null" and type(None) in allowed:
            found[setting] = None
            continue
        kind = next(kind for kind in (int, float, str) if kind in allowed)
        try:
            found[setting] = kind(word)
        except ValueError as error:
            what = {int: "a whole number", float: "a number"}[kind]
            raise FeatureError(f"--set {setting}={word}: allowed is {what}") from error
    return found


def _plain(feature: Feature) -> dict[str, Any]:
    """The settings as plain values; whole numbers where fractions may stand become such, lest 50 and 50.0 be two."""
    hints = get_type_hints(feature.SETTINGS)
    fractions = {
        field.name
        for field in fields(feature.SETTINGS)
        if float in (hints[field.name], *get_args(hints[field.name]))
    }
    return {
        name: float(value) if name in fractions and isinstance(value, int) else value
        for name, value in feature.config.items()
    }


def _differ(one: Any, other: Any) -> bool:
    return json.dumps(one) != json.dumps(other)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested JSON objects, each by its path."""
    if isinstance(value, Mapping) and value:
        for part, below in value.items():
            yield from _flat(below, f"{name}.{part}" if name else part)
    else:
        yield name, value
