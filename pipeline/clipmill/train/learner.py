"""One step of training, and what it changes: the network, its average, its optimizer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clipmill.errors import TrainError
from clipmill.loader import Batch, step_seed
from clipmill.train.ema import Ema
from clipmill.train.objective import clip_loss
from clipmill.train.plan import Plan, fresh_network
from clipmill.train.prepare import Preparation
from clipmill.train.ranks import Ranks
from clipmill.train.recipes import Recipe, learning_rate_at


class Learner:
    """What a run learns with.

    Args:
        plan: from `plan_run`.
        ranks: which of several processes this is.
        state: from `checkpoint.read_state`, to go on from, in place of fresh weights or those of `plan.init`.

    Attributes:
        features: the front end, on the device.
        model: the network as it is saved.
        ema: its average, which is evaluated.
        network: the network as it is called: by all ranks together, compiled.

    Raises:
        TrainError: `state` is of another network.
    """

    def __init__(self, plan: Plan, ranks: Ranks, state: dict[str, Any] | None = None) -> None:
        recipe = plan.recipe
        self.recipe, self.ranks, self.seed, self.loss = recipe, ranks, plan.seed, plan.config["loss"]
        self.features = plan.front_end().to(plan.device)
        self.prepare = Preparation(recipe, self.features, plan.seed, ranks)
        self.model = fresh_network(plan, resumed=state is not None)
        self.ema = Ema(self.model, recipe.ema_decay, warmup=recipe.ema_warmup)
        self.optimizer = make_optimizer(self.model, recipe)
        if state is not None:
            self._restore(state)
        self.network: nn.Module = ranks.shared(self.model, plan.device)
        if recipe.compile:
            self.network = torch.compile(self.network)  # type: ignore[assignment]

    def step(self, batch: Batch, step: int) -> Tensor:
        """Learn from the batch of a step (from 0); the loss, a scalar on the device, of this rank's clips."""
        rate = learning_rate_at(self.recipe, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(self.seed, step * self.ranks.count + self.ranks.rank))  # of dropout
        inputs, targets = self.prepare(batch, step)
        loss = backward(self.network, inputs, targets, self.recipe, self.loss)
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        return loss

    def state(self) -> dict[str, Any]:
        """The tensors to save: with the step they are all that a run goes on from."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise TrainError(
                f"the training state is not of this run ({error}): --resume goes on only with the network that was "
                "saved; another --out begins anew"
            ) from error


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, which is Adam where nothing decays: matrices and kernels do, biases and BatchNorm's weights do not."""
    kernels = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": kernels, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, recipe.learning_rate, fused=True)


def backward(network: nn.Module, inputs: Tensor, targets: Tensor, recipe: Recipe, loss: str) -> Tensor:
    """Add the gradients of a batch to the network's; the loss, a scalar on the device.

    Args:
        network: as the ranks train it.
        inputs: `[B, bins, frames]` or `[B, samples]`; put through in `recipe.accumulate` parts.
        targets: `[B, classes]`.
        recipe: says the precision.
        loss: softmax or sigmoid.
    """
    total = torch.zeros((), device=inputs.device)
    unsynced = getattr(network, "no_sync", nullcontext)
    parts = list(zip(inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True))
    for number, (x, y) in enumerate(parts, 1):
        # Ranks exchange gradients with the last part alone.
        with unsynced() if number < len(parts) else nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                logits = network(x)
            part = clip_loss(logits.float(), y, loss, recipe.label_smoothing) * (len(x) / len(inputs))
            part.backward()
        total += part.detach()
    return total
