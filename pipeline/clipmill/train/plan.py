"""Decide everything about a run before anything is written: its clips, recipe, network, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipmill import __version__
from clipmill.errors import ConfigError, TrainError
from clipmill.features import Feature, FrontEnd, StoredFrontEnd, create_feature
from clipmill.featurestore import StoredClips
from clipmill.loader import NO_PROMISE, Feed, Sampler, rank_positions
from clipmill.shards.read import Shards
from clipmill.stores import Store
from clipmill.train.lengths import check_heard
from clipmill.train.objective import choose_loss
from clipmill.train.prepare import crop_samples
from clipmill.train.recipes import Recipe
from clipmill.train.sees import front_end_of
from clipmill.train.split import Split, choose_split, few, learnt_from
from clipmill.train.transfer import began_with, features_of, initialise, said_by
from clipmill_models import ModelError, Tagger, create_model, outline_model


@dataclass(frozen=True)
class Plan:
    """All that a run is made from; `config` is what config.json says of it, `notes` what to tell the user.

    `clips` are those of `shards` to train on, `sampler` says which of them stands where; a stream has none.
    """

    shards: Shards
    split: Split
    clips: Shards
    sampler: Sampler | None
    recipe: Recipe
    seed: int
    device: torch.device
    init: Path | None
    feed: Feed
    config: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def default_out(self) -> Path:
        """Where it goes if it is not told where."""
        return self.named(self.split.tag)

    def named(self, tag: str) -> Path:
        """runs/<dataset>-<model>-<tag>; with the feature where it is no log-mel, and -init with another's weights."""
        feature = (self.config["features"]["feature"] or {}).get("name", "logmel")
        parts = [self.shards.name, self.config["model"], *[feature] * (feature != "logmel"), tag]
        return Path("runs") / "-".join(parts + ["init"] * (self.init is not None))

    def front_end(self) -> FrontEnd | StoredFrontEnd:
        """What stands between the clips, sound or stored features, and the network."""
        return front_end_of(self.shards, self.config["features"])

    @property
    def held_out(self) -> Shards:
        """The clips that judge."""
        return self.shards.take(self.split.held_out)


def plan_run(
    shards: Shards,
    recipe: Recipe,
    device: torch.device,
    *,
    fold: int | None = None,
    seed: int = 0,
    split_seed: int | None = None,
    ranks: int = 1,
    allow_leak: bool = False,
    allow_missing: bool = False,
    where: str | None = None,
    init: Path | None = None,
    place: Callable[[Plan], Path] | None = None,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    set_weights: Sequence[float] | None = None,
) -> Plan:
    """Decide everything about a run, and write nothing.

    Args:
        shards: the clips, of one or several sets; or those of a feature store.
        recipe: how to train.
        device: where.
        fold: to hold out; see `choose_split` for what is without one.
        seed: of all that is random.
        split_seed: of the groups to hold out, where they are drawn; by default `seed`.
        ranks: into how many parts each step is divided.
        allow_leak: let a group stand on both sides of the split.
        allow_missing: let classes be held out that no clip to train on has.
        where: an expression as `Shards.where` takes it: the run then neither learns from other clips nor holds
            them out.
        init: what `transfer.read_weights` takes: the run starts from those weights.
        place: where the run is to be, given its plan without them. One that began there with `init` and has saved
            its state has weights of its own: `init` is not read again, and may have changed or gone.
        feed: how clips are read.
        set_weights: one for each of the sets of `shards`: what share of the clips to learn from comes from each.

    Raises:
        ConfigError: the recipe's model is not known, it wants weights to start from, or what a feature store does
            not hold; `where` cannot be read, or a stream cannot do what is asked.
        FeatureError: the network does not take the feature.
        TrainError: the clips cannot be split, or have fewer than two classes; a class is held out that cannot be
            learnt; `init` cannot be read, or less than half of the model fits.
    """
    if len(shards.labels) < 2:
        raise TrainError(f"{shards.place}: has {len(shards.labels)} class; a tagger needs at least two")
    if recipe.init and init is None:
        raise ConfigError(
            f"--recipe {recipe.name} goes on from trained weights: name them with --init RUN|FILE, or choose a "
            "recipe from scratch"
        )
    feed.check_fit(shards)
    rank_positions(0, recipe.batch_size, 0, ranks)  # says where the ranks cannot share a batch
    split_seed = seed if split_seed is None else split_seed
    split = choose_split(shards, fold, split_seed, allow_leak=allow_leak, where=where)
    clips = shards.take(split.train)
    recipe = recipe.for_clips(len(clips)).on(device.type)
    sampler = feed.sampler(clips, recipe.sampling, seed, set_weights)
    loss = choose_loss(shards.label_counts, recipe.loss)
    feature, rate = _feature(shards, recipe)
    bins = None if feature is None else feature.bins
    network = create_network(recipe.model, len(shards.labels), bins, outline_model)
    features = FrontEnd.of(network, rate, feature, recipe.pad_s)
    stored = None
    if isinstance(shards, StoredClips):
        stored = {"place": _absolute(shards.sets[0].store), "spec": shards.spec.sha256}
    config = {
        "dataset": shards.name,
        "shards": shards.sound
        if isinstance(shards, StoredClips)
        else [_absolute(part.store) for part in shards.sets],
        "stored": stored,
        "root_sha256": shards.root_sha256,
        "files": shards.some_files,
        "clips": {"train": len(split.train), "held_out": len(split.held_out)},
        "held_out": {"by": split.by, "value": split.value},
        "where": where,
        "access": feed.access,
        "set_weights": None if set_weights is None else list(set_weights),
        "labels": shards.labels,
        "sample_rate": rate,
        "features": features.config,
        "model": network.name,
        "loss": loss,
        "recipe": asdict(recipe),
        "seed": seed,
        "init": None,
        "allow_leak": allow_leak,
        "device": device.type,
        "versions": {"clipmill": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    crop = crop_samples(recipe, shards.sample_rate)
    longest = crop or int(clips.samples.max())
    what = "the crop" if crop else "the longest clip to train on"
    sees = front_end_of(shards, features.config)
    check_heard(network, sees, longest, what, "--crop-s {most:g} cuts clips to that")
    check_heard(network, sees, int(shards.samples[split.held_out].max()), "the longest clip held out")
    notes = [f"{len(split.train)} clips to train on, {len(split.held_out)} held out: {split.why}"]
    notes += _unlearnable(shards, split, allow_missing)
    if network.input == "waveform":
        if recipe.mixup in ("between-class-logmel", "standard-features"):
            raise ConfigError(
                f"--mixup {recipe.mixup}: {network.name} takes waveforms and has no features to mix"
            )
        if recipe.specaugment:
            notes.append(f"no SpecAugment: {network.name} takes waveforms")
    if recipe.label_smoothing and loss == "sigmoid":
        notes.append("no label smoothing: clips have several labels, each of its own")
    if recipe.precision == "bf16" and device.type == "cpu":
        notes.append(
            "--precision bf16 on a CPU: torch 2.14.1's convolutions were seen to give NaN now and then, which ends a "
            "run; --precision fp32 is safe"
        )
    if feed.access == "stream":
        notes.append(NO_PROMISE)
    plan = Plan(shards, split, clips, sampler, recipe, seed, device, init, feed, config, tuple(notes))
    if init is None:
        return plan
    if place is not None and (origin := began_with(place(plan), init)):
        return replace(plan, config={**config, "init": origin})
    transferred, origin = initialise(network, init, shards.labels, loss)
    _check_features(init, features)
    first = [f"weights of {init}: {'; '.join(transferred.lines())}", *_learnt_before(init, shards, split)]
    return replace(plan, config={**config, "init": origin}, notes=(*first, *notes))


def create_network(
    name: str, classes: int, bins: int | None = None, build: Callable[..., Tagger] = create_model
) -> Tagger:
    """The network called `name`, for features of `bins` (None: its own); raises ConfigError where there is none."""
    try:
        return build(name, classes, bins)
    except ModelError as error:
        raise ConfigError(f"--model {name}: {error}") from error


def fresh_network(plan: Plan, *, resumed: bool) -> Tagger:
    """The network with the weights that the run starts from; drawing them leaves the caller's random stream alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        bins = FrontEnd(**plan.config["features"]).bins
        model = create_network(plan.config["model"], len(plan.config["labels"]), bins)
    if plan.init is not None and not resumed:
        initialise(model, plan.init, plan.config["labels"], plan.config["loss"])
    # Channels last in memory is what convolutions are fastest in, on a CPU as well.
    return model.to(plan.device).to(memory_format=torch.channels_last).train()


def _feature(shards: Shards, recipe: Recipe) -> tuple[Feature | None, int]:
    """The feature that the network is to see, None for its own; and the sample rate of the sound that it is made from.

    Raises:
        ConfigError: the recipe asks of a feature store what it does not hold.
    """
    if not isinstance(shards, StoredClips):
        rate = shards.sample_rate
        return None if recipe.feature == "auto" else create_feature(recipe.feature, sample_rate=rate), rate
    feature = shards.spec.create()
    if recipe.feature not in ("auto", feature.NAME):
        raise ConfigError(
            f"--feature {recipe.feature}: these clips of {shards.place} are stored as {feature.NAME}"
        )
    asked = {
        f"--mixup {recipe.mixup}": recipe.mixup in ("standard", "between-class", "between-class-logmel"),
        f"--pitch-semitones {recipe.pitch_semitones:g}": bool(recipe.pitch_semitones),
        f"--stretch {recipe.stretch:g}": bool(recipe.stretch),
        f"--noise-snr-db {recipe.noise_snr_db}": recipe.noise_snr_db is not None,
    }
    if impossible := [flag for flag, wanted in asked.items() if wanted]:
        mends = (
            "--mixup none (or standard-features)", "--pitch-semitones 0", "--stretch 0", "--noise-snr-db inf"
        )  # fmt: skip
        mend = " and ".join(mends[place] for place, wanted in enumerate(asked.values()) if wanted)
        raise ConfigError(
            f"{', '.join(impossible)}: needs waveforms, and a feature store holds none ({shards.place}); give "
            f"{mend}, or train from sound: --shards SHARDS --feature {feature.NAME} without --features"
        )
    return feature, int(feature.config["sample_rate"])


def _learnt_before(init: Path, shards: Shards, split: Split) -> list[str]:
    """A note where the weights to start from know clips that are held out here."""
    said = said_by(init)
    if "held_out" not in said:  # no run of ours, or a file exported from one
        return []
    try:
        learnt = int(learnt_from(shards, said)[split.held_out].sum())
    except ConfigError:  # these shards lack a column by which that run chose its clips
        return []
    return [
        f"{init} learnt from {learnt} of the {len(split.held_out)} clips held out here, so the figures will flatter "
        "this run; hold out the same fold in both"
    ] * (learnt > 0)


def _check_features(init: Path, features: FrontEnd) -> None:
    """Raise TrainError where the weights to start from know other features: their bins would mean other sounds."""
    theirs, ours = (features_of(init) or {}).get("feature"), features.config["feature"]
    if theirs is None or ours is None or theirs == ours:
        return
    if theirs["name"] != ours["name"]:
        raise TrainError(
            f"{init}: was trained on {theirs['name']}, not {ours['name']}; --feature {theirs['name']}"
        )
    was, is_ = ({"version": said["version"], **said["settings"]} for said in (theirs, ours))
    told = ", ".join(
        f"{name} {was.get(name)} and not {is_[name]}" for name in is_ if was.get(name) != is_[name]
    )
    raise TrainError(
        f"{init}: was trained on another {ours['name']} ({told}); `pipeline shard --sample-rate "
        f"{was['sample_rate']}` makes shards that fit a rate"
    )


def _unlearnable(shards: Shards, split: Split, allowed: bool) -> list[str]:
    """A note on classes that no clip to train on has; raises TrainError where clips held out have them all the same."""
    learnt, judged = (np.unique(shards.take(rows).label_ids[0]) for rows in (split.train, split.held_out))
    lost = [shards.labels[c] for c in np.setdiff1d(judged, learnt)]
    if lost and not allowed:
        raise TrainError(
            f"no clip to train on has {few(lost)}, and clips held out do ({split.why}): what cannot be learnt would "
            "only spoil the figures. Hold out others with --fold, leave those clips out with --where, or accept it "
            "with --allow-missing"
        )
    absent = [shards.labels[c] for c in np.setdiff1d(np.arange(len(shards.labels)), learnt)]
    return [f"cannot be learnt, for no clip to train on has it: {few(absent)}"] if absent else []


def _absolute(store: Store) -> str:
    return str(Path(store.place).resolve()) if store.near else store.place
