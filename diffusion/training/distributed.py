"""Distributed training: process groups, collectives, and data-parallel or sharded networks.

The launcher that starts the processes sets the environment variables RANK, WORLD_SIZE, ...
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
"""How long other processes wait while the main one evaluates, samples or writes. Lost processes are noticed at once."""
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|remote process|communicator was aborted|[Tt]imed out"
)


@dataclass(frozen=True)
class World:
    """Rank of this process and number of processes; by default a single one."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the main process, which writes files and reports."""
        return self.rank == 0

    def maximum(self, *values: float) -> list[float]:
        """Elementwise maximum of the values over all processes."""
        if self.size == 1:
            return [*values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors (B / size, ...) of all processes to one (B, ...), in rank order."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def broadcast(self, value: Any) -> Any:
        """Broadcast JSON data of the main process: numbers (NaN included), strings, lists and mappings."""
        return json.loads(self.broadcast_bytes(json.dumps(value).encode()))

    def broadcast_bytes(self, content: bytes) -> bytes:
        """Broadcast bytes (at least one) of the main process, so that machines need no shared files."""
        if self.size == 1:
            return content
        length = torch.tensor(len(content))
        dist.broadcast(length, src=0)
        buffer = torch.frombuffer(bytearray(content if self.main else int(length)), dtype=torch.uint8)
        dist.broadcast(buffer, src=0)
        return buffer.numpy().tobytes()


def is_worker() -> bool:
    """Whether this process was started by a distributed launcher."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


@contextmanager
def process_group(
    device: torch.device, store: Path | None = None, lost: type[UserError] = UserError, stage: str = "train"
) -> Iterator[World]:
    """Join the process group, and leave it at the end of the block.

    Args:
        device: the device on which this process trains.
        store: file for the rendezvous of processes on one machine, which avoids opening a port.
        lost: the type of error to raise if another process is lost.
        stage: its name, for messages.
    Raises:
        SystemExit: the GPU of this process has failed; the status os.EX_TEMPFAIL asks the launcher to start a new one.
    """
    size = int(os.environ["WORLD_SIZE"]) if is_worker() else 1
    if size == 1:
        yield World()
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Coordination uses CPU tensors and so never synchronizes with a GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    meeting = FileStore(str(store), size) if store else _torchrun_store()
    dist.init_process_group(backend, rank=rank, world_size=size, store=meeting, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield World(rank, size)
        dist.barrier()  # the main process may still be working
    except torch.AcceleratorError as error:  # all further CUDA calls of this process would fail as well
        say(f"{stage}: process {rank} of {size} lost its GPU ({str(error).splitlines()[0]})")
        raise SystemExit(os.EX_TEMPFAIL) from None
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise lost(
            f"process {rank} of {size} lost its connection to another one ({reason}); start again to resume from the "
            "last checkpoint"
        ) from None
    except UserError as error:
        if rank == 0:
            raise
        raise AlreadyReported(str(error)) from None  # rank 0 raises the same error
    dist.destroy_process_group()


def _torchrun_store() -> Store:
    """The rendezvous store of processes started by torchrun.

    The agent's own store survives a restart and still holds the addresses of the old processes, so keys get the restart
    count as a prefix. Agents on several machines count restarts independently, so the count cannot be used there.

    Raises:
        UserError: torchrun may restart processes on several machines and uses the agent's store.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))  # type: ignore[attr-defined]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise UserError(
            "torchrun --max-restarts on several machines needs --rdzv-backend c10d and "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment; restarted processes could not connect "
            "otherwise"
        )
    return PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)


def shard_weights(net: Network, options: TrainOptions, world: World) -> Network:
    """Shard the network's weights over the processes block by block (FSDP2), if `options.sharding` is weights."""
    if world.size > 1 and options.sharding == "weights":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload] # FSDP2 requires it
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about views that are never written to
        mesh = init_device_mesh(next(net.parameters()).device.type, (world.size,))
        for part in net.blocks():
            fully_shard(part, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net


def data_parallel(net: Network, options: TrainOptions, world: World) -> nn.Module:
    """Wrap the network so that gradients are averaged over all processes (DDP)."""
    if world.size == 1 or options.sharding == "weights":
        return net  # FSDP2 averages them in its hooks
    device = next(net.parameters()).device
    # static_graph fails with no_sync (github.com/pytorch/pytorch/issues/143580).
    return DistributedDataParallel(
        net,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


@contextmanager
def gradient_sync(net: nn.Module, now: bool) -> Iterator[None]:
    """Defer the synchronization of gradients between processes in this block, unless `now`."""
    if isinstance(net, DistributedDataParallel):
        with nullcontext() if now else net.no_sync():
            yield
        return
    if set_sync := getattr(net, "set_requires_gradient_sync", None):  # FSDP2
        set_sync(now)
    yield


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether the tensor is a DTensor; tested without importing its module, which takes a second."""
    return hasattr(tensor, "full_tensor")


def gather_full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective call); return any other tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def scatter_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Give a full tensor, equal in all processes, the sharding and memory format of `like`."""
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        tensor = tensor.to(like.device)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like).copy_(tensor)
