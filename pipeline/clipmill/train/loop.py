"""One training run, read from top to bottom: start or resume it, step, evaluate, save.

The state of a run is its weights, their average, Adam's moments and the step: clips, learning rate and augmentation are
pure functions of the step, so a resumed run goes on bit for bit (on one CPU, with as many threads).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmill import tables
from clipmill.errors import ShardError
from clipmill.loader import Bad, Batch, Damage, Digest, check_bad
from clipmill.train import checkpoint
from clipmill.train.compiling import compiling
from clipmill.train.held_out import Stopped, main_value, score_held_out
from clipmill.train.learner import Learner
from clipmill.train.log import Log, MakeSink, Meter
from clipmill.train.plan import Plan
from clipmill.train.prepare import read_samples
from clipmill.train.ranks import Ranks, launch, restarts
from clipmill.train.recipes import Recipe, learning_rate_at
from clipmill.train.timing import within_memory

ALONE = Ranks()

WORTH_SAVING_S = 300.0
"""What took so long is saved before an evaluation too, which may be long, and end badly."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the step it stands at, and the figures of its best and its last evaluation.

    `done` is False for a run that was stopped; `ran` is how many steps this call made. A run that is done before its
    last step has lost its patience.
    """

    step: int
    done: bool
    ran: int
    best: dict[str, Any] | None
    last: dict[str, Any] | None


def train(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    log_batches: bool = False,
    save_every: int | None = None,
    ranks: Ranks = ALONE,
    sinks: Sequence[MakeSink] = (),
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
        ranks: which of several processes this is, that all call this alike; the first of them writes.
        sinks: make those who are told of all figures, beside metrics.jsonl and TensorBoard.
        say: called with a line for a person, on the first rank.
        update: called with (steps done, facts) after each step.
        stop: asked after each step, and while evaluating; where it is True on any rank, all save and return.

    Raises:
        TrainError: see `checkpoint.start_or_resume`; memory runs out; the network cannot be compiled; or the
            loss is no longer finite.
        ShardError: more clips than `plan.feed.max_bad` allows cannot be read.
    """
    with ExitStack() as held:

        def begin() -> tuple[Path | None, list[str]]:
            held.enter_context(tables.locked(out))  # lest two processes train in one folder
            return checkpoint.start_or_resume(
                out, plan.config, resume=resume, launch=launch(), restarts=restarts()
            )

        saved, notes = ranks.from_first(begin)
        for note in notes:
            say(note)
        state = None if saved is None else checkpoint.read_state(saved)
        start, best, last = (state["step"], state["best"], state["last"]) if state else (0, None, None)
        if is_over(plan.recipe, best, last):
            return Outcome(start, True, 0, best, last)
        if start:
            say(f"going on from step {start} of {plan.recipe.steps}")
        so_far = Outcome(start, False, 0, best, last)
        with compiling() if plan.recipe.compile else nullcontext(), within_memory(_too_much(plan, ranks)):
            learner = Learner(plan, ranks, state)
            with Log(out, start, ranks, sinks, say) as log:
                return _learn(plan, learner, so_far, out, log, log_batches, save_every, ranks, update, stop)


def _learn(
    plan: Plan,
    learner: Learner,
    so_far: Outcome,
    out: Path,
    log: Log,
    log_batches: bool,
    save_every: int | None,
    ranks: Ranks,
    update: Callable[[int, str], None],
    stop: Callable[[], bool],
) -> Outcome:
    """The loop: evaluate and save where that is due, end or go on, step."""
    recipe, held_out, found = plan.recipe, plan.held_out, list[Bad]()
    start = step = so_far.step
    best, last = so_far.best, so_far.last  # figures of evaluations
    stopping = saving = False  # told to stop; at one of the steps of `save_every`
    account, saved_at = Damage(len(plan.clips), plan.feed.max_bad), time.monotonic()

    def save() -> None:
        if ranks.first:
            checkpoint.save_last(out, {"step": step, "best": best, "last": last, **learner.state()})

    with (
        _saved_at_a_loss(lambda: save() if step > start else None),
        _telling(found, log),
        closing(batches_of(plan, ranks, start, found.append, log.batch if log_batches else None)) as batches,
    ):
        meter = Meter(out, recipe.batch_size, ranks)
        while True:
            unread: list[Bad] = []
            evaluated = False
            if _evaluation_due(recipe, step, last) and not stopping:
                if step > start and time.monotonic() - saved_at > WORTH_SAVING_S:
                    save()
                try:
                    figures, unread = score_held_out(
                        learner.ema.module, learner.features, held_out, plan.config, plan.device, plan.feed, ranks, stop
                    )  # fmt: skip
                except Stopped:  # a resumed run begins with it
                    stopping = True
                else:
                    last, evaluated = {"step": step, **figures}, True
                    log.evaluation(last, unread)
                    if best is None or main_value(last) > main_value(best):
                        best = last
                        if ranks.first:
                            checkpoint.save_best(out, learner.ema.module.state_dict(), step=step)
                    meter.rest()
            if evaluated or saving or (stopping and step > start):
                save()
                saved_at = time.monotonic()
            if unread:
                check_bad(unread, len(held_out), plan.feed.max_bad)
            if step > start:
                update(step, meter.facts(last))
            if stopping or is_over(recipe, best, last):
                return Outcome(step, not stopping, step - start, best, last)

            began = time.perf_counter()
            batch = next(batches)
            waited_s = time.perf_counter() - began
            loss = learner.step(batch, step)
            step += 1

            stopping, bads = ranks.meet(stop(), found)
            log.bad(bads)
            found.clear()
            account.note(bads)  # all ranks together may not lose more than one alone
            saving = save_every is not None and step % save_every == 0
            look = stopping or saving or _evaluation_due(recipe, step, last)
            if measured := meter.step(step, loss, learning_rate_at(recipe, step - 1), waited_s, look=look):
                log.train(step, measured)


def batches_of(
    plan: Plan,
    ranks: Ranks,
    start: int,
    tell: Callable[[Bad], None] = lambda bad: None,
    watch: Callable[[int, Digest], None] | None = None,
) -> Generator[Batch, None, None]:
    """The batches of a run's steps from `start` on, on the device.

    `tell` hears of clips that cannot be read, `watch` of what each step saw.
    """
    recipe = plan.recipe
    loader = plan.feed.loader(
        plan.clips,
        recipe.batch_size,
        sampler=plan.sampler,
        seed=plan.seed,
        crop=read_samples(recipe, plan.clips.sample_rate),
        device=plan.device,
        tell=tell,
        watch=watch,
        rank=ranks.rank,
        ranks=ranks.count,
    )
    return loader.batches(start, recipe.steps)


def _too_much(plan: Plan, ranks: Ranks) -> str:
    """What memory ran out with, and the flags that would take less of it."""
    recipe, own = plan.recipe, plan.recipe.batch_size // ranks.count
    seconds = recipe.crop_s or int(plan.clips.samples.max()) / plan.clips.sample_rate
    mends = {
        "a smaller --batch-size": own > 1,
        f"--accumulate {2 * recipe.accumulate}": recipe.accumulate < own,
        "a shorter --crop-s": True,
        "--precision bf16": recipe.precision == "fp32" and plan.device.type == "cuda",
    }
    each = "each step" if ranks.count == 1 else f"each step of each of {ranks.count} ranks"
    what = f"{own} clip{'s' * (own > 1)} of {'' if recipe.crop_s else 'up to '}{seconds:g} s in {each}"
    return f"{what}; each of these takes less: {', '.join(mend for mend, helps in mends.items() if helps)}"


@contextmanager
def _saved_at_a_loss(save: Callable[[], None]) -> Iterator[None]:
    """Where more clips are lost than may be, save first: --resume with a higher --max-bad goes on from there."""
    try:
        yield
    except ShardError:
        save()
        raise


@contextmanager
def _telling(found: list[Bad], log: Log) -> Iterator[None]:
    """Log what was found even where it ends the run."""
    try:
        yield
    finally:
        log.bad(found)


def _evaluation_due(recipe: Recipe, step: int, last: dict[str, Any] | None) -> bool:
    """Whether the step is one to evaluate at, and that has not been done."""
    wanted = step > 0 and (step % recipe.eval_every == 0 or step == recipe.steps)
    return wanted and (last is None or last["step"] != step)


def is_over(recipe: Recipe, best: dict[str, Any] | None, last: dict[str, Any] | None) -> bool:
    """Whether all steps are done and evaluated, or so many evaluations brought nothing better that patience is lost."""
    if best is None or last is None:
        return False
    since = (last["step"] - best["step"]) / recipe.eval_every
    return bool(last["step"] >= recipe.steps or (recipe.patience > 0 and since >= recipe.patience))
