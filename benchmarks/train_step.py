"""What a whole training step costs beside the bare network's: loader, augmentation, features, average and all.

    python benchmarks/train_step.py SHARDS                                     the recipe that this machine would take
    python benchmarks/train_step.py SHARDS --recipe esc50-scratch --workers 8 --compile --json out.json

full       what `pipeline train` does in a step, by its own code: the next batch from the shards, augmentation,
           features, forward, loss, backward, Adam, the average of the weights, the meter.
bare       forward, loss, backward and Adam of a second network like it, on features that lie on the device.
prepare    augmentation and features alone, of a batch that lies on the device.

Each round times a block of steps of each, in turns, in one process; the device is idle before a block and waited for
after it, and runs ahead within it, as in training. Ratios are taken in each round, and their median is shown, with the
least and the most. `data wait` is the share of full's time in which the loop waited for its next batch.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from statistics import median
from typing import Any

import torch

from clipmill import tables
from clipmill.loader import Feed
from clipmill.shards.read import Shards
from clipmill.train.device import default_workers, pick_device
from clipmill.train.learner import Learner, backward, make_optimizer
from clipmill.train.log import Meter
from clipmill.train.loop import batches_of
from clipmill.train.plan import fresh_network, plan_run
from clipmill.train.ranks import Ranks
from clipmill.train.recipes import choose_recipe, describe
from clipmill.train.timing import device_name, time_in_turn

ALONE = Ranks()


def main() -> None:
    options = _options()
    device = pick_device(options.device)
    shards = Shards.open(options.shards)
    fields = {
        name: getattr(options, name) for name in ("model", "batch_size", "crop_s", "mixup", "precision")
    }
    fields |= {"compile": options.compile or None, "steps": 10**6, "eval_every": 10**6}
    recipe, why = choose_recipe(shards.name, device.type, options.recipe, **fields)
    workers = default_workers(device) if options.workers is None else options.workers
    plan = plan_run(shards, recipe, device, fold=options.fold, feed=Feed(workers))
    print(f"{why}\n{describe(plan.recipe)}, {workers} workers, on {device_name(device)}")
    learner = Learner(plan, ALONE)
    meter = Meter(options.shards, recipe.batch_size, ALONE)
    waits: list[float] = []

    with closing(batches_of(plan, ALONE, 0)) as batches:
        first = next(batches)
        inputs, targets = learner.prepare(first, 0)
        network = fresh_network(plan, resumed=False)
        optimizer = make_optimizer(network, recipe)
        bare_network: Any = torch.compile(network) if recipe.compile else network
        done = 0

        def full() -> None:
            nonlocal done
            waited_s = 0.0
            for _ in range(options.block):
                began = time.perf_counter()
                batch = next(batches)
                waited_s += time.perf_counter() - began
                loss = learner.step(batch, done)
                done += 1
                meter.step(done, loss, recipe.learning_rate, 0.0, look=False)
            waits.append(waited_s)

        def bare() -> None:
            for _ in range(options.block):
                backward(bare_network, inputs, targets, recipe, learner.loss)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        def prepare() -> None:
            for step in range(options.block):
                learner.prepare(first, step)

        timed = time_in_turn({"full": full, "bare": bare, "prepare": prepare}, device, options.rounds)
    took = {name: [seconds / options.block for seconds in one.seconds] for name, one in timed.items()}
    ratios = [whole / part for whole, part in zip(took["full"], took["bare"], strict=True)]
    wait = [w / options.block / t for w, t in zip(waits[-options.rounds :], took["full"], strict=True)]
    found = {
        "device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "recipe": describe(plan.recipe), "workers": workers, "rounds": options.rounds, "block": options.block,
        "ms": {name: round(1e3 * median(seconds), 2) for name, seconds in took.items()},
        "full_over_bare": [round(f(ratios), 4) for f in (median, min, max)],
        "data_wait": round(median(wait), 5),
        "clips_per_s": round(recipe.batch_size / median(took["full"]), 1),
    }  # fmt: skip
    for name, ms in found["ms"].items():
        print(f"{name:8} {ms:9.2f} ms a step")
    print("full / bare: median {:.3f}, least {:.3f}, most {:.3f}".format(*found["full_over_bare"]))
    print(f"data wait {found['data_wait']:.2%}; {found['clips_per_s']} clips/s")
    if options.json:
        tables.write_json(options.json, found)


def _options() -> argparse.Namespace:
    from pathlib import Path

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("--fold", type=int)
    parser.add_argument("--recipe")
    parser.add_argument("--model")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--crop-s", type=float)
    parser.add_argument("--mixup")
    parser.add_argument("--precision")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--block", type=int, default=5, help="steps in a round")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
