"""The few collectives that are needed. On one process every one of them is the identity."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

T = TypeVar("T")
DECISION = "GMAIL_LIGHTNING_DECISION"  # of the process that Lightning's launcher copies
_decisions = itertools.count()  # of every process of a launch alike
_servers: list[Any] = []  # of the first process, kept: Lightning's process group will come to the same one


def world_size() -> int:
    """Number of processes, 1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, 0 where ``torch.distributed`` is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(tensor: Tensor) -> Tensor:
    """Joins the rows of all ranks, in the order of the ranks, without gradient.

    Args:
        tensor: This rank's rows, shape (n, ...), the same shape and dtype on every rank.

    Returns:
        The rows of all W ranks, shape (W * n, ...); on one process ``tensor`` itself.
    """
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty((world_size() * len(tensor), *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.detach().contiguous())
    return gathered


def all_reduce(tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
    """Overwrites ``tensor`` by its sum or maximum over the ranks, without gradient, and returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return tensor


def reads_are_free(tensor: Tensor) -> bool:
    """Whether the host can look at a tensor without waiting for a device: on the CPU."""
    return tensor.device.type == "cpu"


def require_equal_rows(tensor: Tensor) -> None:
    """Raises on every rank alike unless all ranks hold as many rows as this one; a gather would hang or mix up rows.

    Raises:
        ValueError: If the numbers of rows differ. On a device, which is not waited for, its own assertion fails.
    """
    if world_size() == 1:
        return
    gathered = gather_rows(torch.full((1,), len(tensor), device=tensor.device))
    if not reads_are_free(tensor):
        torch._assert_async((gathered == len(tensor)).all(), "every rank needs the same number of rows: drop_last=True")
        return
    counts = gathered.tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"Every rank needs the same number of rows, got {counts} on ranks 0 to {world_size() - 1}. "
            "Drop the incomplete last batch (drop_last=True) or let the sampler make the shares equal."
        )


def on_first_rank(work: Callable[[], T], trainer: Trainer | None = None) -> T:
    """Runs ``work`` on the first rank alone; what it returns or raises, every rank returns or raises.

    Every rank must call it. An error of any kind ends all ranks with the same message, where otherwise the others would
    wait for the first until a timeout.

    Args:
        work: Called without arguments; what it returns must be picklable.
        trainer: Whose processes are meant; by default those of ``torch.distributed``.
    """
    size = world_size() if trainer is None else trainer.world_size
    if size == 1:
        return work()
    is_first = rank() == 0 if trainer is None else trainer.is_global_zero
    packed, own_error = _packed(work) if is_first else (None, None)
    if trainer is not None:
        packed = trainer.strategy.broadcast(packed)
    else:
        box = [packed]
        dist.broadcast_object_list(box, src=0)
        packed = box[0]
    return cast(T, _unpacked(packed, own_error))


def decided_once(decide: Callable[[], T], num_nodes: int = 1) -> T:
    """What the first process of a launch decides, in all of its processes, before ``torch.distributed`` is set up.

    The processes are those of torchrun, of SLURM, or of Lightning's own launcher, also on several nodes.

    Args:
        decide: Called in the first process; what it returns must be picklable. Its error is raised in all processes.
        num_nodes: Nodes on each of which Lightning's own launcher is started by hand.
    """
    handed = json.loads(os.environ.get(DECISION, "null"))
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 and handed is not None and handed["process"] == os.getppid():
        return cast(T, _unpacked(bytes.fromhex(handed["decision"])))
    number, size = _place(num_nodes)
    packed, own_error = _packed(decide) if number == 0 else (b"", None)
    if size > 1:
        store, *_ = next(rendezvous("env://", rank=number, world_size=size))
        key = f"gmail_lightning/{next(_decisions)}"
        if number == 0:
            store.set(key, packed)
            _servers.append(store)
        packed = store.get(key)
    os.environ[DECISION] = json.dumps({"process": os.getpid(), "decision": packed.hex()})
    return cast(T, _unpacked(packed, own_error))


def _place(num_nodes: int) -> tuple[int, int]:
    """Number of this process among those that were started side by side, and how many they are."""
    environment = os.environ
    if dist.is_available() and dist.is_torchelastic_launched():  # as Lightning tells torchrun's processes
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        if SLURMEnvironment.detect():
            slurm = SLURMEnvironment()
            _ = slurm.main_address, slurm.main_port  # each sets its variable, as Lightning will
            return slurm.global_rank(), slurm.world_size()
    if num_nodes > 1 and {"RANK", "WORLD_SIZE"} <= environment.keys():  # of nodes, as Kubeflow starts them
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if num_nodes > 1 and {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return int(environment["NODE_RANK"]), num_nodes
    return 0, 1


def _packed(work: Callable[[], Any]) -> tuple[bytes, Exception | None]:
    """What ``work`` returns or raises, pickled, and the error; one that cannot be pickled goes by type and message."""
    try:
        return pickle.dumps((work(), None)), None
    except Exception as error:
        try:
            packed = pickle.dumps((None, error))
            same = str(pickle.loads(packed)[1]) == str(error)
        except Exception:  # its class is local, or its constructor takes other arguments
            same = False
        return packed if same else pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"))), error


def _unpacked(packed: bytes | None, own_error: Exception | None = None) -> Any:
    """The result, or the error; in the first process itself with its traceback."""
    assert packed is not None
    result, error = pickle.loads(packed)
    if own_error is not None and type(error) is type(own_error):
        raise own_error
    if error is not None:
        raise error from own_error
    return result
