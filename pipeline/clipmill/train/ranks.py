"""Several processes that train one network: who they are, what they tell each other, BatchNorm over all of them.

torchrun, or a job of `--engine slurm`, starts the processes and says by the environment which each is. Tensors on a GPU
travel by NCCL, those on the CPU by gloo, in one group.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipmill.errors import ClipmillError, ConfigError, TrainError

T = TypeVar("T")

SILENCE = timedelta(minutes=30)
"""How long a rank waits for another: the slowest thing between two meetings is the evaluation of one of them."""


@dataclass(frozen=True)
class Ranks:
    """Which of `count` processes this is, from 0; alone by default, and then every exchange is free."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def meet(self, stop: bool, found: list[Any]) -> tuple[bool, list[Any]]:
        """Whether any rank is to stop, and what all of them have found: the same answer for each."""
        if self.count == 1:
            return stop, list(found)
        both = torch.tensor([int(stop), len(found)])  # on the CPU: the device is not waited for
        dist.all_reduce(both)
        everything = [one for part in self.gathered(found) for one in part] if both[1] else []
        return bool(both[0]), everything

    def gathered(self, value: T) -> list[T]:
        """What each rank has, in their order: small things, or arrays on the CPU."""
        if self.count == 1:
            return [value]
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, value)
        return parts

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all; where it raises, it alone says so, and all end with its exit code."""
        if self.count == 1:
            return make()
        said: list[Any] = [None, None]
        failed: ClipmillError | None = None
        if self.first:
            try:
                said[0] = make()
            except ClipmillError as error:
                failed, said[1] = error, error.exit_code
        dist.broadcast_object_list(said)
        if failed is not None:
            raise failed
        if said[1] is not None:
            sys.exit(said[1])
        made: T = said[0]
        return made

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks, of any shape."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.count
        return value

    def widest(self, size: int) -> int:
        """The largest of the ranks' sizes."""
        if self.count == 1:
            return size
        sizes = torch.tensor(size)
        dist.all_reduce(sizes, dist.ReduceOp.MAX)
        return int(sizes)

    def joined(self, part: Tensor) -> Tensor:
        """The batch of all ranks, in the order of its positions, of equal parts `[B, ...]`: `[count * B, ...]`."""
        if self.count == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)  # position p of a step is rank p % count's

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of what `joined` gives, or of anything in that order."""
        return whole[self.rank :: self.count]

    def shared(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The network as the ranks train it together: gradients averaged, BatchNorm over the batch of all."""
        if self.count == 1:
            return model
        on_cuda = device.type == "cuda"
        model = (
            nn.SyncBatchNorm.convert_sync_batchnorm(model) if on_cuda else _synced_on_cpu(model, self.count)
        )
        options: dict[str, Any] = {
            "gradient_as_bucket_view": True,
            "device_ids": [device] if on_cuda else None,
        }
        # Statistics are equal already, being those of the whole batch. The flag has another name from torch 2.14 on.
        known = signature(DistributedDataParallel).parameters
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        return DistributedDataParallel(model, **options)


@contextmanager
def joined_ranks(device: str) -> Iterator[tuple[Ranks, str]]:
    """Join the others that the environment speaks of (WORLD_SIZE), and leave them at the end.

    Yields:
        Who this is, and its device: "auto" and "cuda" become the GPU of its own where there are several ranks.

    Raises:
        ConfigError: one device for all ranks, or fewer devices than ranks on this machine; or the environment does not
            say who this is.
        TrainError: another rank has ended, or does not answer.
    """
    count = _told("WORLD_SIZE", 1, least=1)
    if count == 1:
        yield Ranks(), device
        return
    device = _device_of_rank(device, count)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if lacking := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE is {count}, and the environment lacks {', '.join(lacking)}: start the ranks by torchrun, or "
            "unset WORLD_SIZE to train alone"
        )
    rank = _told("RANK")
    try:
        store, rank, count = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # A store that outlives a restart still says where the ranks before were. (Machines count alike
            # only how often they themselves restarted: on several of them torch's own store must do.)
            store = dist.PrefixStore(f"clipmill-{restarts()}", store)
        dist.init_process_group(backend, timeout=SILENCE, store=store, rank=rank, world_size=count)
        yield Ranks(rank, count), device
        dist.destroy_process_group()  # a rank that fails does not wait here for the others, who wait elsewhere
    except ClipmillError as error:
        raise type(error)(f"rank {rank}: {error}") if rank else error from None
    except RuntimeError as error:
        words = ("gloo", "nccl", "tcpstore", "connection", "timed out", "timeout")
        if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in words):
            raise
        said = str(error).strip().partition("\n")[0]
        raise TrainError(
            f"rank {rank}: another rank has ended or does not answer, which its own message may explain ({said}). "
            "The same command with --resume goes on; torchrun --max-restarts N does so by itself"
        ) from error


def launch() -> str | None:
    """What torchrun calls this start of all ranks, and their restarts; None without it."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def restarts() -> int:
    """How often torchrun has started this machine's ranks anew."""
    return _told("TORCHELASTIC_RESTART_COUNT")


def _told(name: str, otherwise: int = 0, *, least: int = 0) -> int:
    """What the environment says of the ranks."""
    value = os.environ.get(name, str(otherwise))
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(
            f"{name}={value}: allowed is a whole number from {least} up, as torchrun says it; without WORLD_SIZE a run "
            "trains alone"
        )
    return int(value)


def _device_of_rank(device: str, count: int) -> str:
    if device.startswith("cuda:"):
        raise ConfigError(
            f"--device {device}: each of {count} ranks takes a GPU of its own; --device cuda, or leave it away"
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local, here = _told("LOCAL_RANK"), _told("LOCAL_WORLD_SIZE")
    if device == "cpu" or (device == "auto" and not found):
        return "cpu"
    if local >= found:
        raise ConfigError(
            f"{max(here, local + 1)} ranks on this machine, and torch finds {found or 'no'} CUDA devices: start as "
            "many ranks as there are (torchrun --nproc-per-node), or --device cpu"
        )
    return f"cuda:{local}"


class _SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batch of all ranks on a CPU, for which torch's own SyncBatchNorm has no kernels.

    Every rank must have as large a part: `[B, C, ...]`.
    """

    ranks = 1
    sum_of: Callable[[Tensor], Tensor]

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape from `[B, C]` on."""

    def forward(self, input: Tensor) -> Tensor:
        """The same shape and dtype."""
        if not self.training:
            return super().forward(input)
        x, axes = input.float(), [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        mean = self.sum_of(x.mean(axes)) / self.ranks
        apart = x - mean.view(shape)
        variance = self.sum_of(apart.square().mean(axes)) / self.ranks
        if self.track_running_stats:
            self._remember(mean.detach(), variance.detach(), self.ranks * x.numel() // x.shape[1])
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (apart * scale.view(shape) + self.bias.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)


class _SumOfRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks, for all of which it is worked out, and so is its gradient."""

    @staticmethod
    def forward(context: Any, part: Tensor) -> Tensor:
        """The sum."""
        return _SumOfRanks.backward(context, part)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Each part adds to every rank's sum."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sum(part: Tensor) -> Tensor:
    total: Tensor = _SumOfRanks.apply(part)
    return total


def _synced_on_cpu(model: nn.Module, ranks: int) -> nn.Module:
    """The network with its BatchNorms, parameters and buffers among them, replaced by synced ones."""
    for name, layer in model.named_children():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            synced = _SyncedBatchNorm(layer.num_features, layer.eps, layer.momentum)
            synced.weight, synced.bias, synced.ranks = layer.weight, layer.bias, ranks
            synced.sum_of = torch.compiler.disable(_sum)  # a compiler cannot see through it
            for buffer, tensor in layer.named_buffers():
                setattr(synced, buffer, tensor)
            setattr(model, name, synced.train(layer.training))
        else:
            _synced_on_cpu(layer, ranks)
    return model
