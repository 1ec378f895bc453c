"""Score whole clips with a trained network, and a whole run on the clips it held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from clipmill.augment import to_float
from clipmill.errors import ConfigError, ShardError, TrainError
from clipmill.loader import Bad, Feed, WholeClips, check_bad
from clipmill.loader.batches import Batch
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import Described, Run, read_config
from clipmill.train.device import SECONDS_AT_ONCE
from clipmill.train.lengths import check_heard
from clipmill.train.metrics import confusions, main_figure, measure_scores
from clipmill.train.objective import clip_loss, probabilities
from clipmill.train.sees import front_end_of
from clipmill.train.split import held_out_again, labelled, learnt_from
from clipmill.train.timing import within_memory

T = TypeVar("T")
Update = Callable[[int, str], None]

HEARD = 3
"""Classes that are told of a hard clip."""


@dataclass(frozen=True)
class Scored:
    """What a network makes of clips.

    Attributes:
        rows: int64 `[scored]`, the clips that could be read, in the order of the shards.
        scores: float32 `[scored, classes]`, probabilities, or what else `score_clips` was asked for.
        losses: float32 `[scored]`, of each clip.
        loss: the mean of a clip.
        unread: the clips that could not be read.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    losses: NDArray[np.float32]
    loss: float
    unread: list[Bad]


@dataclass(frozen=True)
class HardClip:
    """A clip that a network does badly on.

    Attributes:
        key: the clip's.
        row: in the shards that were given to be scored, so that `shards.read(row)` is its sound.
        shard: file name of its shard.
        labels: the classes that it has.
        heard: the `HEARD` likeliest classes with their probabilities, likeliest first.
        loss: of this clip.
    """

    key: str
    row: int
    shard: str
    labels: tuple[str, ...]
    heard: tuple[tuple[str, float], ...]
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """One scoring of a run's clips: `figures` as `evaluate_run` gives them, and the hardest clips, worst first."""

    figures: dict[str, Any]
    hardest: list[HardClip]


class Fetched:
    """A tensor on its way from the device, which meanwhile works on; on a CPU it is there at once."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._here = tensor
            return
        self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._here.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(tensor.device))

    @property
    def there(self) -> bool:
        """Whether nobody need wait for it."""
        return self._arrived is None or self._arrived.query()

    def numpy(self) -> NDArray[Any]:
        """The tensor, waited for; not what the device was sent after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here.numpy()


@torch.inference_mode()
def score_clips(
    model: nn.Module,
    features: nn.Module,
    shards: Shards,
    loss: str,
    device: torch.device,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    update: Update = lambda done, facts: None,
    tell: Callable[[Bad], None] = lambda bad: None,
    answer: Callable[[torch.Tensor, str], torch.Tensor] = probabilities,
) -> Scored:
    """Score whole clips; `tell` hears of each that cannot be read.

    Clips of one length are scored together, so that none is padded for another's sake.
    `model` must be in evaluation mode; `answer` makes the scores of its logits and the loss.

    Raises:
        ShardError: none of the clips can be read.
        TrainError: the network's answers are not finite, or memory runs out.
    """
    most = SECONDS_AT_ONCE[device.type] * shards.sample_rate
    # Whoever asks decides what to do about clips that cannot be read, once all that can be scored is.
    clips = WholeClips(
        shards, most, workers=feed.workers, device=device, max_bad=1.0, check=feed.check, tell=tell
    )
    rows: list[NDArray[np.int64]] = []
    found: list[NDArray[np.float32]] = []
    losses: list[NDArray[np.float32]] = []
    done = 0
    longest_s = int(shards.samples.max(initial=0)) / shards.sample_rate
    on_gpu = ", and --device cpu uses the machine's own memory" if device.type == "cuda" else ""
    much = f"clips of up to {longest_s:g} s; --where 'duration_s < ...' leaves the longest out{on_gpu}"
    with within_memory(much), closing(clips.batches()) as batches:
        # The device goes on while the answers to the batch before are read.
        for scored, scores, each in _one_behind(_sent(model, features, batches, loss, answer)):
            rows.append(scored)
            found.append(scores.numpy())
            losses.append(each.numpy())
            done += len(scored)
            update(done, "")
    if not found:
        raise ShardError(
            f"none of the {len(shards)} clips to score can be read; the first: {clips.damage.found[0]}"
        )
    answers = np.concatenate(found)
    if not np.isfinite(answers).all():
        raise TrainError(
            "the network answers NaN: its training has diverged; begin again with a lower --learning-rate"
        )
    read = np.concatenate(rows)
    order = np.argsort(read)
    each_loss = np.concatenate(losses)[order]
    mean = float(each_loss.mean(dtype=np.float64))
    return Scored(read[order], answers[order], each_loss, mean, clips.damage.found)


def _sent(
    model: nn.Module,
    features: nn.Module,
    batches: Iterable[Batch],
    loss: str,
    answer: Callable[[torch.Tensor, str], torch.Tensor],
) -> Iterator[tuple[NDArray[np.int64], Fetched, Fetched]]:
    """The rows of each batch, and its scores `[B, classes]` and losses `[B]`, on their way."""
    one_loss = torch.vmap(partial(clip_loss, loss=loss))
    for batch in batches:
        logits = model(features(to_float(batch.waves))).float()
        # Each clip as a batch of its own.
        each = one_loss(logits[:, None], batch.targets[:, None])
        yield batch.rows.numpy(), Fetched(answer(logits, loss)), Fetched(each)


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """Each item once the next one is made."""
    before: T | None = None
    for item in items:
        if before is not None:
            yield before
        before = item
    if before is not None:
        yield before


def evaluate_run(
    run: Run,
    shards: Shards,
    device: torch.device,
    *,
    fold: int | None = None,
    split: str | None = None,
    where: str | None = None,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    update: Update = lambda done, facts: None,
    tell: Callable[[Bad], None] = lambda bad: None,
) -> dict[str, Any]:
    """Every figure of `measure_scores` for the clips chosen, with `confusions`, `loss` and what was scored.

    The clips are those that the run held out, or those of `fold` and `split` (both: those of both).
    `where` is an expression as `Shards.where` takes it, and leaves only the clips that fulfil it; without
    it, those held out are the ones that fulfil the run's own. What comes back counts under
    `learnt_from` those of the clips that the run learnt from, so that the figures flatter it (None: not known), and
    under `unread` those that could not be read, which no figure is of; `tell` hears of each.

    Raises:
        ConfigError: `where` cannot be read.
        ShardError: more clips than `feed.max_bad` allows cannot be read.
        TrainError: the shards do not fit the run, no clip is chosen, or one is longer than the network takes.
    """
    return evaluate_clips(
        run, shards, device, fold=fold, split=split, where=where, feed=feed, update=update, tell=tell
    ).figures


def evaluate_clips(
    run: Run,
    shards: Shards,
    device: torch.device,
    *,
    hardest: int = 0,
    fold: int | None = None,
    split: str | None = None,
    where: str | None = None,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    update: Update = lambda done, facts: None,
    tell: Callable[[Bad], None] = lambda bad: None,
) -> Evaluation:
    """The figures of `evaluate_run` and, from the same scoring, the `hardest` clips: those of the highest loss.

    Takes and raises what `evaluate_run` does.
    """
    feed.check_fit(shards)
    shards = fitting(run, shards)
    rows, what = choose_clips(run, shards, fold, split, where)
    chosen = shards.take(rows)
    features = (
        run.features if chosen.bins is None else front_end_of(chosen, run.config["features"]).to(device)
    )
    check_heard(run.model, features, int(chosen.samples.max()), f"the longest clip of {what}")
    scored = score_clips(run.model, features, chosen, run.loss, device, feed, update, tell)
    check_bad(scored.unread, len(chosen), feed.max_bad)
    targets = chosen.targets_of(scored.rows)
    figures = measure_scores(targets, scored.scores, run.labels, run.loss)
    found = {
        "run": str(run.folder),
        "weights": run.weights,
        "model": run.config["model"],
        "shards": shards.place,
        "scored": what,
        "learnt_from": _learnt_among(run, shards, rows),
        "unread": len(scored.unread),
        "unread_clips": [asdict(bad) for bad in scored.unread],
        "loss": scored.loss,
        "main_figure": main_figure(run.loss),
        "confusions": confusions(figures, run.labels),
        **figures,
    }
    return Evaluation(found, _hardest(run, shards, rows, scored, targets, hardest))


def _learnt_among(run: Described, shards: Shards, rows: NDArray[np.int64]) -> int | None:
    """How many of these clips the run, or any run of a fused model, learnt from; None where that cannot be told."""
    members = [
        read_config((run.folder / member["run"]).resolve()) for member in run.config.get("members", ())
    ]
    learnt = np.zeros(len(rows), bool)
    try:
        for config in members or [run.config]:
            learnt |= learnt_from(shards, config)[rows]
    except ConfigError:  # these shards lack a column by which the run chose its clips
        return None
    return int(learnt.sum())


def _hardest(
    run: Run, shards: Shards, rows: NDArray[np.int64], scored: Scored, targets: NDArray[np.float32], most: int
) -> list[HardClip]:
    """The scored clips of the highest loss; `rows` are those of `shards` that were to be scored."""
    # Stable, so that ties keep the order of the shards, and those of a clip's classes theirs.
    worst = np.argsort(-scored.losses, kind="stable")[:most]
    places = rows[scored.rows[worst]]
    keys, files = shards.keys_of(places), shards.columns.at("shard", places)
    found = []
    for n, row, key, shard in zip(worst, places, keys, files, strict=True):
        likeliest = np.argsort(-scored.scores[n], kind="stable")[:HEARD]
        heard = tuple((run.labels[c], float(scored.scores[n, c])) for c in likeliest)
        labels = tuple(run.labels[c] for c in np.flatnonzero(targets[n]))
        found.append(HardClip(key, int(row), shard, labels, heard, float(scored.losses[n])))
    return found


def fitting(run: Described, shards: Shards) -> Shards:
    """The shards with the run's classes, of which they may have some, in any order.

    Raises:
        TrainError: they have classes that the run does not know, or another sample rate.
    """
    if not set(shards.labels) <= set(run.labels):
        unknown = sorted(set(shards.labels) - set(run.labels))
        lacking = sorted(set(run.labels) - set(shards.labels))
        sides = (("unknown to the run", unknown), ("lacking", lacking))
        parts = [f"{what}: {_few(names)}" for what, names in sides if names]
        raise TrainError(
            f"{shards.place}: its {len(shards.labels)} classes are not the {len(run.labels)} that {run.folder} "
            f"was trained on ({'; '.join(parts)}); give --shards of the same dataset"
        )
    if shards.bins is None and shards.sample_rate != run.sample_rate:
        raise TrainError(
            f"{shards.place}: is at {shards.sample_rate} Hz, while {run.folder} was trained at {run.sample_rate} Hz; "
            f"make shards with `pipeline shard --sample-rate {run.sample_rate}`"
        )
    return shards.with_labels(run.labels)


def choose_clips(
    run: Described, shards: Shards, fold: int | None, split: str | None, where: str | None = None
) -> tuple[NDArray[np.int64], str]:
    """The rows to score, and what they are in words; raises TrainError when there are none."""
    if fold is None and split is None:
        held = run.config["held_out"]
        if held is None:
            raise TrainError(
                f"{run.folder}: its runs held out different clips; say which to score with --fold or --split"
            )
        same = (shards.root_sha256, shards.some_files) == (run.config["root_sha256"], run.config.get("files"))
        if held["by"] == "groups" and not same:
            raise TrainError(
                f"{shards.place}: {run.folder} held out some groups of other shards; say which clips to score "
                "with --fold or --split (--split all: clips without a split)"
            )
        rows = held_out_again(shards, held["by"], held["value"])
        # A run's figures come again only from the very clips it was measured on.
        where = run.config.get("where") if where is None else where
        return _some(rows, shards, _words(held), where)
    chosen = labelled(shards)
    if fold is not None:
        chosen &= shards.folds == fold
    if split is not None:
        chosen &= shards.in_splits(split)
    what = " and ".join([f"fold {fold}"] * (fold is not None) + [f"split {split}"] * (split is not None))
    return _some(np.flatnonzero(chosen), shards, what, where)


def _some(
    rows: NDArray[np.int64], shards: Shards, what: str, where: str | None
) -> tuple[NDArray[np.int64], str]:
    if len(rows) and where is not None:
        kept = rows[shards.fulfilling(where)[rows]]
        if not len(kept):
            raise TrainError(
                f"{shards.place}: --where {where!r} keeps none of the {len(rows)} clips of {what}"
            )
        rows, what = kept, f"{what} where {where}"
    if len(rows):
        return rows, what
    folds = sorted(set(shards.folds[shards.folds >= 0].tolist()))
    raise TrainError(
        f"{shards.place}: no clip is in {what}; its folds are {', '.join(map(str, folds)) or 'none'} (--fold), "
        f"its splits {', '.join(shards.splits)} (--split)"
    )


def _words(held: dict[str, Any]) -> str:
    return {"fold": f"fold {held['value']}", "split": f"split {held['value']}"}.get(
        held["by"], f"the groups held out by seed {held['value']}"
    )


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
