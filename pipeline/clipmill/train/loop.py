"""One training run, read from top to bottom: plan it, start or resume it, step, evaluate, save.

The state of a run is its weights, their average, Adam's moments and the step: clips, learning
rate and noise are pure functions of the step, so a resumed run goes on bit for bit (on one
CPU, with as many threads).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipmill import __version__
from clipmill.augment import crop, mix_between_class, mix_standard, specaugment, to_float
from clipmill.errors import ConfigError, TrainError
from clipmill.features import FrontEnd
from clipmill.loader import NO_PROMISE, Bad, Batch, Feed, Sampler, check_bad, step_seed
from clipmill.shards.read import Shards
from clipmill.stores import Store
from clipmill.train import checkpoint
from clipmill.train.ema import Ema
from clipmill.train.evaluate import score_clips
from clipmill.train.lengths import check_heard
from clipmill.train.log import Log
from clipmill.train.metrics import main_figure, measure_scores
from clipmill.train.objective import choose_loss, clip_loss
from clipmill.train.recipes import Recipe, learning_rate_at
from clipmill.train.split import Split, choose_split
from clipmill.train.transfer import initialise
from clipmill_models import ModelError, Tagger, create_model, outline_model

WIDEST_STRIPE = 64
"""Frames of SpecAugment's widest stripe over time, as in PANNs; crops below 4 s get an eighth of their own."""


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
        """runs/<dataset>-<model>-<what is held out>, with -init where the weights come from elsewhere."""
        name = f"{self.shards.name}-{self.config['model']}-{self.split.tag}"
        return Path("runs") / (f"{name}-init" if self.init else name)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the step it stands at, and the figures of its best and its last evaluation.

    `done` is False for a run that was stopped; `ran` is how many steps this call made.
    """

    step: int
    done: bool
    ran: int
    best: dict[str, Any] | None
    last: dict[str, Any] | None


def plan_run(
    shards: Shards,
    recipe: Recipe,
    device: torch.device,
    *,
    fold: int | None = None,
    seed: int = 0,
    allow_leak: bool = False,
    where: str | None = None,
    init: Path | None = None,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    set_weights: Sequence[float] | None = None,
) -> Plan:
    """Decide everything about a run, and write nothing.

    `feed` is how clips are read; `set_weights`, one for each of the sets of `shards`, says what share of the
    clips to learn from comes from each.

    `where` is an expression as `Shards.where` takes it: the run then neither learns from other clips nor
    holds them out. `init` is what `transfer.read_weights` takes: the run starts from those weights.

    Raises:
        ConfigError: the recipe's model is not known, `where` cannot be read, or a stream cannot do what is asked.
        TrainError: the clips cannot be split, or have fewer than two classes; `init` cannot be read, or
            less than half of the model fits.
    """
    if len(shards.labels) < 2:
        raise TrainError(f"{shards.place}: has {len(shards.labels)} class; a tagger needs at least two")
    feed.check_fit(shards)
    split = choose_split(shards, fold, seed, allow_leak=allow_leak, where=where)
    clips = shards.take(split.train)
    sampler = feed.sampler(clips, recipe.sampling, seed, set_weights)
    loss = choose_loss(shards.label_counts, recipe.loss)
    network = _create(recipe.model, len(shards.labels), outline_model)
    features = FrontEnd.of(network, shards.sample_rate)
    config = {
        "dataset": shards.name,
        "shards": [_absolute(part.store) for part in shards.sets],
        "root_sha256": shards.root_sha256,
        "files": shards.some_files,
        "clips": {"train": len(split.train), "held_out": len(split.held_out)},
        "held_out": {"by": split.by, "value": split.value},
        "where": where,
        "access": feed.access,
        "set_weights": None if set_weights is None else list(set_weights),
        "labels": shards.labels,
        "sample_rate": shards.sample_rate,
        "features": features.config,
        "model": network.name,
        "loss": loss,
        "recipe": asdict(recipe),
        "seed": seed,
        "init": None,
        "allow_leak": allow_leak,
        "device": str(device),
        "versions": {"clipmill": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    crop = _crop_samples(recipe, shards.sample_rate)
    learnt_from = crop or int(clips.samples.max())
    what = "the crop" if crop else "the longest clip to train on"
    check_heard(network, features, learnt_from, what, "--crop-s {most:g} cuts clips to that")
    check_heard(network, features, int(shards.samples[split.held_out].max()), "the longest clip held out")
    learnable = np.unique(clips.label_ids[0])
    unlearnable = [shards.labels[c] for c in np.setdiff1d(np.arange(len(shards.labels)), learnable)]
    notes = []
    if init is not None:
        transferred, config["init"] = initialise(network, init, shards.labels, loss)
        notes = [f"weights of {init}: {'; '.join(transferred.lines())}"]
    if recipe.specaugment and network.input == "waveform":
        notes.append(f"no SpecAugment: {network.name} takes waveforms")
    notes += [f"{len(split.train)} clips to train on, {len(split.held_out)} held out: {split.why}"]
    if unlearnable:
        notes.append(
            f"cannot be learnt, for no clip to train on has it: {', '.join(unlearnable[:5])}"
            + (f" and {len(unlearnable) - 5} more" if len(unlearnable) > 5 else "")
        )
    if feed.access == "stream":
        notes.append(NO_PROMISE)
    return Plan(shards, split, clips, sampler, recipe, seed, device, init, feed, config, tuple(notes))


def train(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    log_batches: bool = False,
    save_every: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    update: Callable[[int, str], None] = lambda done, facts: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train, evaluate and save under `out`.

    Args:
        plan: from `plan_run`.
        out: the run's folder; see `checkpoint` for what it comes to hold.
        resume: go on with the run that is there, from its last saved step.
        log_batches: write which clips and samples each step saw, as hashes.
        save_every: steps between two saves of last.pt, beside those at each evaluation.
        say: called with a line for a person.
        update: called with (steps done, facts) after each step.
        stop: asked after each step; True saves and returns.

    Raises:
        TrainError: see `checkpoint.start_or_resume`; or the loss is no longer finite.
        ShardError: more clips than `plan.feed.max_bad` allows cannot be read.
    """
    recipe, device = plan.recipe, plan.device
    state, note = checkpoint.start_or_resume(out, plan.config, resume=resume)
    if note:
        say(note)
    features = FrontEnd(**plan.config["features"]).to(device)
    model = _fresh_model(plan, resumed=state is not None)
    ema = Ema(model, recipe.ema_decay, warmup=recipe.ema_warmup)
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    start, best, last = 0, None, None
    if state:
        start, best, last = _restore(state, out, model, ema, optimizer)
    if start >= recipe.steps:
        return Outcome(start, True, 0, best, last)
    if start:
        say(f"going on from step {start} of {recipe.steps}")
    held_out = plan.shards.take(plan.split.held_out)
    noise = torch.Generator(device)
    with (
        Log(out, start, recipe.batch_size, say) as log,
        closing(_batches(plan, start, log, log_batches)) as batches,
    ):
        for done, batch in enumerate(batches, start + 1):
            step = done - 1
            _seed(step_seed(plan.seed, step), noise)
            rate = learning_rate_at(recipe, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs, targets = prepare(batch, features, recipe, noise)
            loss = clip_loss(model(inputs), targets, plan.config["loss"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            ema.update(model, step)

            evaluating = done % recipe.eval_every == 0 or done == recipe.steps
            stopping = stop() and done < recipe.steps
            saving = evaluating or stopping or (save_every is not None and done % save_every == 0)
            log.train(done, loss, rate, look=saving)
            if evaluating:
                last, unread = _evaluate(plan, ema.module, features, held_out, log.bad, done)
                log.evaluation(last)
                if best is None or _main(last) > _main(best):
                    best = last
                    checkpoint.save_best(out, ema.module.state_dict(), step=done)
            if saving:
                checkpoint.save_last(out, _state(done, model, ema, optimizer, best, last))
            if evaluating:  # now that nothing is lost by it
                check_bad(unread, len(held_out), plan.feed.max_bad)
            update(done, _facts(log.loss, last))
            if stopping:
                return Outcome(done, False, done - start, best, last)
    return Outcome(recipe.steps, True, recipe.steps - start, best, last)


def prepare(
    batch: Batch, features: FrontEnd, recipe: Recipe, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A batch on the device of `noise` as it is learnt from: cropped where it is not, mixed, as log-mel, masked.

    Returns:
        float32 log-mel `[B, bins, frames]`, or `[B, samples]` for a network on waveforms, which
        SpecAugment leaves alone; and soft targets `[B, classes]`.
    """
    rate = features.sample_rate
    waves, lengths, targets = batch[:3]
    wanted = _crop_samples(recipe, rate)
    if wanted and waves.shape[1] != wanted:  # as from a stream: else no more than the crop was read
        waves = crop(waves, lengths, wanted, noise)
    sound = to_float(waves)
    if recipe.mixup == "standard":
        sound, targets = mix_standard(sound, targets, noise)
    elif recipe.mixup == "between-class":
        sound, targets = mix_between_class(sound, targets, rate, noise)
    heard = features(sound)
    if recipe.specaugment and features.logmel is not None:
        heard = specaugment(heard, noise, time_width=min(WIDEST_STRIPE, heard.shape[2] // 8))
    return heard, targets


def _batches(plan: Plan, start: int, log: Log, log_batches: bool) -> Generator[Batch, None, None]:
    """The batches of the steps from `start` on."""
    recipe = plan.recipe
    loader = plan.feed.loader(
        plan.clips,
        recipe.batch_size,
        sampler=plan.sampler,
        seed=plan.seed,
        crop=_crop_samples(recipe, plan.clips.sample_rate),
        device=plan.device,
        tell=log.bad,
        watch=log.batch if log_batches else None,
    )
    return loader.batches(start, recipe.steps)


def _crop_samples(recipe: Recipe, rate: int) -> int:
    return round(recipe.crop_s * rate)


def _absolute(store: Store) -> str:
    return str(Path(store.place).resolve()) if store.near else store.place


def _create(name: str, classes: int, build: Callable[[str, int], Tagger] = create_model) -> Tagger:
    try:
        return build(name, classes)
    except ModelError as error:
        raise ConfigError(f"--model {name}: {error}") from error


def _fresh_model(plan: Plan, *, resumed: bool) -> Tagger:
    """The network with the weights that the run starts from; drawing them leaves the caller's random stream alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = _create(plan.config["model"], len(plan.config["labels"]))
    if plan.init is not None and not resumed:
        initialise(model, plan.init, plan.config["labels"], plan.config["loss"])
    # Channels last in memory is what convolutions are fastest in, on a CPU as well.
    return model.to(plan.device).to(memory_format=torch.channels_last).train()


def _evaluate(
    plan: Plan,
    model: nn.Module,
    features: nn.Module,
    held_out: Shards,
    tell: Callable[[Bad], None],
    step: int,
) -> tuple[dict[str, Any], list[Bad]]:
    """The figures of the averaged weights on the clips held out, whole, without the tables; and those not read."""
    loss = plan.config["loss"]
    scored = score_clips(model, features, held_out, loss, plan.device, plan.feed, tell=tell)
    targets = held_out.targets_of(scored.rows)
    figures = measure_scores(targets, scored.scores, plan.shards.labels, loss)
    short = {name: value for name, value in figures.items() if not isinstance(value, list)}
    unread = len(scored.unread)
    figures = {"step": step, "main_figure": main_figure(loss), "loss": scored.loss, "unread": unread, **short}
    return figures, scored.unread


def _main(figures: dict[str, Any]) -> float:
    value = figures[figures["main_figure"]]
    return -1.0 if value is None else float(value)


def _facts(loss: float, last: dict[str, Any] | None) -> str:
    """What stands beside the progress bar."""
    facts = [] if math.isnan(loss) else [f"loss {loss:.3f}"]  # not measured yet
    return ", ".join(facts + ([f"{last['main_figure']} {_main(last):.3f}"] if last else []))


def _seed(seed: int, noise: torch.Generator) -> None:
    """Seed all that is random in a step: the augmentation, and the global stream, which dropout draws from."""
    noise.manual_seed(seed)
    torch.manual_seed(seed)


def _state(
    step: int, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, best: Any, last: Any
) -> dict[str, Any]:
    return {
        "step": step,
        "model": model.state_dict(),
        "ema": ema.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": best,
        "last": last,
    }


def _restore(
    state: dict[str, Any], out: Path, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any] | None, dict[str, Any] | None]:
    try:
        model.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"]), state["best"], state["last"]
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise TrainError(
            f"{out / checkpoint.LAST}: is not of this run ({error}); remove it and --resume starts from the beginning"
        ) from error
