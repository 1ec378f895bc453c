"""Recipes: every choice of a training run that is not the data, each a small TOML file beside this one.

A file holds fields of `Recipe`; `extends` names another recipe, whose fields it takes over. A new experiment is one
new file, here or anywhere (`--recipe mine.toml`); any field can be overridden by the flag of its name.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from clipmill.errors import ConfigError
from clipmill.features import FEATURES
from clipmill.loader import SAMPLINGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent

MIXUPS = ("none", "standard", "between-class", "between-class-logmel", "standard-features")
"""Table 3's types 1 to 4: none; standard; modified, on the waveform; modified, on the log-mel (or another feature).

The last is the standard one on features, which needs no waveform.
"""

FEATURE_CHOICES = ("auto", *FEATURES)

SCHEDULES = ("constant", "one-cycle")
LOSSES = ("auto", "softmax", "sigmoid")
PRECISIONS = ("auto", "fp32", "bf16")

LOUDEST_SNR_DB = 40.0
"""White noise is drawn from `Recipe.noise_snr_db` up to this ratio, which is next to nothing."""


@dataclass(frozen=True)
class Recipe:
    """A training preset; the defaults are the journal paper's for small datasets from scratch (4.1).

    Attributes:
        name: what `--recipe` calls it.
        model: of the network, such as erann-1-3.
        feature: what the network sees, one of `FEATURES`; "auto": its own, which is the log-mel, or waveforms.
        about: one line: what it is, from which paper's section, and what the paper reaches.
        steps: of training; 0 where `epochs` says how long.
        epochs: passes over the clips to train on, made into steps once their number is known; 0: `steps` says.
        batch_size: clips in a step, of all ranks together.
        accumulate: parts that each rank's share of a step is put through the network in, one after the other:
            less memory, the same gradient but for BatchNorm, whose statistics are each part's.
        learning_rate: Adam's, and the highest one with "one-cycle".
        schedule: one of `SCHEDULES`.
        warmup: share of the steps in which the rate of "one-cycle" climbs.
        weight_decay: AdamW's, decoupled, of matrices and kernels alone; 0 is Adam.
        clip_norm: the most that the norm of all gradients may be; 0: not clipped.
        crop_s: seconds cut from each clip at a random place; 0: whole clips.
        pad_s: seconds that shorter clips are padded to with zeros, in training and whenever the network is asked;
            0: to whole seconds, as they are in the shards.
        mixup: one of `MIXUPS`.
        specaugment: mask two stripes of frames and two of bins of each clip's log-mel.
        mask_frames: most frames of a stripe, and never more than an eighth of the crop's.
        mask_bins: most bins of a stripe, and never more than an eighth of the feature's.
        pitch_semitones: each clip is shifted by up to so many semitones, up or down; 0: not.
        stretch: each clip is played up to so much faster or slower at its own pitch: 0.25 is 0.8 to 1.25 times
            the speed; 0: not.
        noise_snr_db: white noise is added at a ratio from this to `LOUDEST_SNR_DB`; None: none is.
        ema_decay, ema_warmup: see `ema.decay_at`.
        eval_every: steps between two evaluations.
        patience: evaluations without a better one after which training ends; 0: it never does early.
        loss: "auto" takes softmax with cross-entropy, and sigmoid with binary cross-entropy as soon as any
            clip has several labels.
        label_smoothing: with softmax, the share of each target that all classes get alike.
        sampling: one of `loader.SAMPLINGS`.
        precision: the network's: "bf16" is autocast to bfloat16, with weights, features and loss in float32;
            "auto" takes it on CUDA.
        compile: the network by torch.compile.
        init: whether it is made for weights that were trained before (`--init`).
    """

    name: str
    model: str
    feature: str = "auto"
    about: str = ""
    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup: float = 0.3
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    crop_s: float = 0.0
    pad_s: float = 0.0
    mixup: str = "between-class"
    specaugment: bool = True
    mask_frames: int = 64
    mask_bins: int = 8
    pitch_semitones: float = 0.0
    stretch: float = 0.0
    noise_snr_db: float | None = None
    ema_decay: float = 0.999
    ema_warmup: bool = True
    eval_every: int = 500
    patience: int = 0
    loss: str = "auto"
    label_smoothing: float = 0.0
    sampling: str = "shuffled"
    precision: str = "auto"
    compile: bool = False
    init: bool = False

    def __post_init__(self) -> None:
        if self.noise_snr_db == math.inf:  # how a flag or a file says: none, after all
            object.__setattr__(self, "noise_snr_db", None)
        _check_types(self)
        choices = {
            "feature": FEATURE_CHOICES,
            "mixup": MIXUPS,
            "schedule": SCHEDULES,
            "loss": LOSSES,
            "sampling": SAMPLINGS,
            "precision": PRECISIONS,
        }
        for name, choice in choices.items():
            if getattr(self, name) not in choice:
                raise ConfigError(f"{flag(name)} {getattr(self, name)!r}: allowed are {', '.join(choice)}")
        for name in ("batch_size", "accumulate", "eval_every", "mask_frames", "mask_bins"):
            self._at_least(name, 1)
        for name in ("steps", "patience"):
            self._at_least(name, 0)
        if self.steps and self.epochs:
            raise ConfigError(f"--steps {self.steps} and --epochs {self.epochs:g}: allowed is one of them")
        if not (self.steps or self.epochs):
            raise ConfigError("--steps 0 and --epochs 0: allowed is any number above 0 for one of them")
        ranges = {
            "learning_rate": (0, math.inf, "any number above 0"),
            "epochs": (-1, math.inf, "any number above 0"),
            "weight_decay": (-1, 1, "0 (Adam) to below 1"),
            "clip_norm": (-1, math.inf, "0 (not clipped) or any number above"),
            "warmup": (-1, 1, "0 (none) to below 1"),
            "crop_s": (-1, math.inf, "0 (whole clips) or any number of seconds"),
            "pad_s": (-1, 3600, "0 (to whole seconds) to an hour, in seconds"),
            "pitch_semitones": (-1, 24.001, "0 (none) to 24"),
            "stretch": (-1, 3.001, "0 (none) to 3, four times as fast or slow"),
            "ema_decay": (-1, 1, "0 to below 1"),
            "label_smoothing": (-1, 1, "0 (none) to below 1"),
        }
        for name, (above, below, allowed) in ranges.items():
            value = getattr(self, name)
            if not above < value < below or -1 < value < 0:
                raise ConfigError(f"{flag(name)} {value:g}: allowed is {allowed}")
        if self.noise_snr_db is not None and not -40 <= self.noise_snr_db <= LOUDEST_SNR_DB:
            raise ConfigError(
                f"{flag('noise_snr_db')} {self.noise_snr_db}: allowed is -40 to {LOUDEST_SNR_DB:g} dB, or inf for none"
            )

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ConfigError(
                f"{flag(name)} {getattr(self, name)}: allowed is any whole number from {least} up"
            )

    def for_clips(self, clips: int) -> Recipe:
        """The same with its steps decided, where `epochs` says how long to train on so many clips."""
        if not self.epochs:
            return self
        return replace(self, steps=math.ceil(self.epochs * clips / self.batch_size), epochs=0.0)

    def on(self, device: str) -> Recipe:
        """The same with its precision decided, for a "cpu" or "cuda" device."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if device == "cuda" else "fp32")


@cache
def list_recipes() -> dict[str, Recipe]:
    """The recipes that come with clipmill, by name, in the order of their files."""
    return {path.stem: read_recipe(path) for path in sorted(HERE.glob("*.toml"), key=lambda path: path.stem)}


def read_recipe(path: Path) -> Recipe:
    """A recipe's file, with what it extends; its name is the file's.

    Raises:
        ConfigError: the file cannot be read, names a field that is none, or holds a value that cannot be.
    """
    try:
        return Recipe(name=path.stem, **_fields_of(path, ()))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _fields_of(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The fields in a file over those of what it extends."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror}); the recipes there are: pipeline recipes"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"is no TOML ({error})") from error
    allowed = {field.name for field in fields(Recipe)} - {"name"}
    if unknown := sorted(found.keys() - allowed - {"extends"}):
        raise ConfigError(
            f"has no field {', '.join(unknown)}: allowed are extends, {', '.join(sorted(allowed))}"
        )
    base = found.pop("extends", None)
    if base is None:
        if "model" not in found:
            raise ConfigError("names no model; allowed is a file with model, or with extends")
        return found
    other = next((p for p in (path.parent / f"{base}.toml", HERE / f"{base}.toml") if p.is_file()), None)
    if other is None or other in (*seen, path):
        raise ConfigError(f"extends {base!r}, which is {'not there' if other is None else 'itself'}")
    inherited = _fields_of(other, (*seen, path))
    return {**_without_other_length(inherited, found), **found}


def _without_other_length(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The fields without the steps where the changes say epochs, and the other way round."""
    other = {"steps": "epochs", "epochs": "steps"}
    gone = {other[name] for name in other if name in changes and other[name] not in changes}
    return {name: value for name, value in base.items() if name not in gone}


_BY_DATASET = {
    ("tones", "cpu"): ("tones", None),
    ("tones", "cuda"): ("tones", None),
    ("audioset", "cuda"): ("audioset", None),
    ("esc50", "cuda"): ("esc50-scratch", "esc50-finetune"),
    ("esc10", "cuda"): ("esc50-scratch", "esc50-finetune"),
    ("urbansound8k", "cuda"): ("urbansound8k-scratch", "urbansound8k-finetune"),
    ("ravdess", "cuda"): ("ravdess-scratch", "ravdess-finetune"),
    ("speechcommands", "cuda"): ("gmme-speechcommands", None),
}
"""Which recipe a dataset gets on a device: from scratch, and from other weights."""

_BY_DEVICE = {"cpu": "small-cpu", "cuda": "scratch"}


def choose_recipe(
    dataset: str, device: str, name: str | None = None, *, init: bool = False, **overrides: Any
) -> tuple[Recipe, str]:
    """The recipe for a dataset on a "cpu" or "cuda" device, and a line that says what was chosen and why.

    Args:
        dataset: the dataset's name, as its shards say.
        device: "cpu" or "cuda".
        name: a recipe asked for by name or as a .toml file, instead.
        init: whether the run starts from other weights.
        overrides: fields to change; None leaves a field as it is. `steps` replace `epochs`, and `epochs` `steps`.

    Raises:
        ConfigError: no recipe has that name, or a value cannot be; lists what is allowed.
    """
    recipes = list_recipes()
    if name is not None and (name.endswith(".toml") or "/" in name):
        base, why = read_recipe(Path(name)), f"asked for, {name}"
    elif name is not None:
        if name not in recipes:
            raise ConfigError(
                f"--recipe {name}: no such recipe; there are {', '.join(recipes)}, or a file of your own, "
                "whose name ends in .toml"
            )
        base, why = recipes[name], "asked for"
    elif (dataset, device) in _BY_DATASET:
        scratch, tuned = _BY_DATASET[dataset, device]
        base = recipes[tuned if init and tuned else scratch]
        why = f"for {dataset} on {device}" + (", from other weights" if init and tuned else "")
    else:
        base, why = recipes[_BY_DEVICE[device]], f"for any small dataset on {device}"
    changes = {field: value for field, value in overrides.items() if value is not None}
    kept = _without_other_length({"steps": base.steps, "epochs": base.epochs}, changes)
    recipe = replace(base, **{"steps": 0, "epochs": 0.0, **kept, **changes})
    recipe = recipe if changes.get("precision") == "auto" else recipe.on(device)
    changed = [flag(field) for field in changes if changes[field] != getattr(base, field)]
    return recipe, f"recipe {base.name}: {why}" + (f", changed by {', '.join(changed)}" if changed else "")


def describe(recipe: Recipe) -> str:
    """What a recipe does, in one line."""
    noise = "" if recipe.noise_snr_db is None else f"noise from {recipe.noise_snr_db:g} dB"
    parts = [
        recipe.model + (f" on {recipe.feature}" if recipe.feature != "auto" else ""),
        f"{recipe.steps} steps" if not recipe.epochs else f"{recipe.epochs:g} epochs",
        f"{recipe.batch_size} clips a step" + (f" in {recipe.accumulate} parts" * (recipe.accumulate > 1)),
        recipe.sampling,
        f"{recipe.crop_s:g} s crops" if recipe.crop_s else "whole clips",
        f"padded to {recipe.pad_s:g} s" * (recipe.pad_s > 0),
        f"mixup {recipe.mixup}",
        f"pitch by up to {recipe.pitch_semitones:g} semitones" * (recipe.pitch_semitones > 0),
        f"speed by up to {1 + recipe.stretch:g} times" * (recipe.stretch > 0),
        noise,
        "SpecAugment" if recipe.specaugment else "no SpecAugment",
        ("AdamW" if recipe.weight_decay else "Adam") + f" {recipe.learning_rate:g} {recipe.schedule}",
        f"EMA {recipe.ema_decay:g}",
        recipe.precision,
        "compiled" * recipe.compile,
    ]
    return ", ".join(part for part in parts if part)


def as_toml(recipe: Recipe) -> str:
    """A recipe as a file that `read_recipe` takes, with every field; one that is None is left out."""
    lines = []
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name != "name" and value is not None:
            # JSON's strings, numbers and booleans are TOML's.
            lines.append(f"{field.name} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """The learning rate of a step (from 0): a pure function, so that resuming needs no schedule's state.

    "one-cycle" is Smith's policy as torch's `OneCycleLR` has it: from a 25th of the highest rate up
    to it over `warmup` of the steps and down to a 250,000th, both as half a cosine.
    Adam's momentum stays as it is (the paper does not say that it moves).
    """
    if recipe.schedule == "constant":
        return recipe.learning_rate
    low, high, end = recipe.learning_rate / 25, recipe.learning_rate, recipe.learning_rate / 25e4
    peak = recipe.warmup * recipe.steps - 1
    if peak > 0 and step <= peak:
        return _half_cosine(low, high, step / peak)
    return _half_cosine(high, end, (step - peak) / (recipe.steps - 1 - peak))


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(part, 1.0))) / 2


def flag(field: str) -> str:
    """The flag that changes a field."""
    return f"--{field.replace('_', '-')}"


def _check_types(recipe: Recipe) -> None:
    """Raise ConfigError where a file gave a field another type; whole numbers become floats where those are meant."""
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,), "bool": (bool,), "int": (int,), "float": (int, float), "float | None": (int, float, type(None))
    }  # fmt: skip
    for field in fields(recipe):
        value, kind = getattr(recipe, field.name), str(field.type)
        if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise ConfigError(f"{flag(field.name)} {value!r}: allowed is a value of type {kind}")
        if kind.startswith("float") and isinstance(value, int):
            object.__setattr__(recipe, field.name, float(value))
