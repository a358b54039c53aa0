"""Several processes that train one network together: their places, and all that they have to agree on.

A launcher has started them and says in the environment which is which (RANK, WORLD_SIZE, ...).
"""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from diffusion.errors import AlreadyReported, UserError
from diffusion.nn.layers import Network
from diffusion.progress import say
from diffusion.training.options import TrainOptions

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

COLLECTIVE_TIMEOUT = timedelta(hours=12)
"""How long the others wait while the main process measures, draws or writes. A lost one is noticed at once."""
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|remote process|communicator was aborted|[Tt]imed out"
)


@dataclass(frozen=True)
class World:
    """The place of this process among those that train together; by default it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes files and is watched."""
        return self.rank == 0

    def maximum(self, *values: float) -> list[float]:
        """The largest of each value over all processes: what one of them wants, all of them do."""
        if self.size == 1:
            return [*values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors (B / size, ...) of all processes as one (B, ...), in the order of their ranks."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def broadcast(self, value: Any) -> Any:
        """The plain data that the main process has: numbers, NaN among them, lists and mappings."""
        return json.loads(self.broadcast_bytes(json.dumps(value).encode()))

    def broadcast_bytes(self, content: bytes) -> bytes:
        """The bytes, at least one, that the main process has: files need not be shared between machines."""
        if self.size == 1:
            return content
        length = torch.tensor(len(content))
        dist.broadcast(length, src=0)
        buffer = torch.frombuffer(bytearray(content if self.main else int(length)), dtype=torch.uint8)
        dist.broadcast(buffer, src=0)
        return buffer.numpy().tobytes()


def is_worker() -> bool:
    """Whether this process was started by a launcher."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


@contextmanager
def process_group(
    device: torch.device, store: Path | None = None, lost: type[UserError] = UserError
) -> Iterator[World]:
    """The world of this process, connected with the others.

    Args:
        device: where it trains.
        store: file through which the processes of one machine find each other, so that no port is opened for it.
        lost: the kind of error that ends the block when another process is lost.
    Raises:
        SystemExit: the GPU of this process has failed, which a new one may survive; has the status os.EX_TEMPFAIL.
    """
    size = int(os.environ["WORLD_SIZE"]) if is_worker() else 1
    if size == 1:
        yield World()
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The processes agree over CPU tensors, so that a GPU never waits for it.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    meeting = FileStore(str(store), size) if store else _torchrun_store()
    dist.init_process_group(backend, rank=rank, world_size=size, store=meeting, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield World(rank, size)
        dist.barrier()  # the main one may still have been at work
    except torch.AcceleratorError as error:  # whatever this process asked of its GPU next, it would fail as well
        say(f"train: process {rank} of {size} has lost its GPU ({str(error).splitlines()[0]})")
        raise SystemExit(os.EX_TEMPFAIL) from None
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise lost(
            f"process {rank} of {size} has lost another one ({reason}); the next start goes on from the last checkpoint"
        ) from None
    except UserError as error:
        if rank == 0:
            raise
        raise AlreadyReported(str(error)) from None  # all have come to it together
    dist.destroy_process_group()


def _torchrun_store() -> Store:
    """The store through which the processes that torchrun has started find each other.

    The agent's own store outlives a restart, and with it the addresses of the processes before. torchrun's agents on
    several machines count their restarts apart from each other, so that the count is no name for an attempt there.

    Raises:
        UserError: torchrun would restart processes on several machines, with such a store.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))  # type: ignore[attr-defined]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise UserError(
            "torchrun --max-restarts on several machines: add --rdzv-backend c10d, and set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun, or the restarts would not connect"
        )
    return PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)


def shard_weights(net: Network, options: TrainOptions, world: World) -> Network:
    """The network with its weights shared out over the processes, block by block, if `options` say so (FSDP2)."""
    if world.size > 1 and options.sharding == "weights":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload] # FSDP2 takes no other
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of views that nobody writes to
        mesh = init_device_mesh(next(net.parameters()).device.type, (world.size,))
        for part in net.blocks():
            fully_shard(part, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net


def data_parallel(net: Network, options: TrainOptions, world: World) -> nn.Module:
    """The network as one whose gradients are the means over all processes."""
    if world.size == 1 or options.sharding == "weights":
        return net  # FSDP2's hooks do it
    device = next(net.parameters()).device
    # No static_graph: it fails with no_sync (github.com/pytorch/pytorch/issues/143580), and all parameters are used.
    return DistributedDataParallel(
        net,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


@contextmanager
def gradient_sync(net: nn.Module, now: bool) -> Iterator[None]:
    """A block whose gradients are only added up, not yet exchanged between processes, unless `now`."""
    if isinstance(net, DistributedDataParallel):
        with nullcontext() if now else net.no_sync():
            yield
        return
    if set_sync := getattr(net, "set_requires_gradient_sync", None):  # FSDP2's
        set_sync(now)
    yield


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each process holds a part of the tensor, a DTensor; its module takes a second to import."""
    return hasattr(tensor, "full_tensor")


def gather_full(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a part, as a whole (all of them call this together); any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def scatter_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, laid out over them and in memory as `like` is."""
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        tensor = tensor.to(like.device)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like).copy_(tensor)
