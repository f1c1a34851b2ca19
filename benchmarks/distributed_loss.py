"""Frozen-teacher `clip_loss` on two gloo ranks against open_clip's ClipLoss with local_loss and gather_with_grad.

CPU seconds of each process for forward and backward of 4096 pairs in all, peer and ours in turn, one thread a rank,
first repetition dropped, medians, mean over the ranks. The peer gets features that are normalised already; ours
normalises them once more. Collectives in the backward are counted as calls of torch.distributed, without the data
parallelism that would add its own.

    python benchmarks/distributed_loss.py
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from gmail_lightning.losses import clip_loss

RANKS, ROWS, DIM, REPETITIONS = 2, 4096, 512, 7
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "broadcast", "gather", "reduce")
COLLECTIVES += ("reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "recv", "isend", "irecv")


@contextmanager
def count_collectives() -> Iterator[list[str]]:
    calls: list[str] = []

    def counted(name: str, function: Callable) -> Callable:
        return lambda *args, **kwargs: (calls.append(name), function(*args, **kwargs))[1]

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, counted(name, getattr(dist, name))))
        yield calls


def step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, int]:
    """CPU seconds of forward and backward, and collectives in the backward."""
    for tensor in inputs:
        tensor.grad = None
    dist.barrier()
    start = time.process_time()
    value = loss(*inputs)
    with count_collectives() as calls:
        value.backward()
    return time.process_time() - start, len(calls)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the peer's gather is deprecated
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    share = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    student, teacher = F.normalize(torch.randn(2, ROWS, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    losses = {
        "open_clip": ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=RANKS),
        "tiled": clip_loss,
    }
    inputs = {
        name: [student[share].clone().requires_grad_(), teacher[share], torch.tensor(1 / 0.07, requires_grad=True)]
        for name in losses
    }
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    collectives = {}
    for _ in range(REPETITIONS + 1):
        for name, loss in losses.items():
            spent, collectives[name] = step(loss, inputs[name])
            seconds[name].append(spent)
    peer, ours = (inputs[name][0].grad for name in losses)
    unit = student[share]
    peer -= unit * (unit * peer).sum(1, keepdim=True)  # the part that normalising inside leaves
    result = {name: {"seconds": median(seconds[name][1:]), "collectives": collectives[name]} for name in losses}
    result["difference"] = ((peer - ours).norm() / peer.norm()).item()
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__]
        processes = [subprocess.Popen([*command, str(rank), folder]) for rank in range(RANKS)]
        if any([process.wait() for process in processes]):
            return 1
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]
    seconds = {name: mean(rank[name]["seconds"] for rank in ranks) for name in ("open_clip", "tiled")}
    print(
        f"{ROWS} rows on {RANKS} ranks: " + ", ".join(f"{name} {value:.3f} s a rank" for name, value in seconds.items())
    )
    print(f"collectives in the backward of open_clip: {max(rank['open_clip']['collectives'] for rank in ranks)}")
    results = [
        ("gradient_difference", max(rank["difference"] for rank in ranks), "<=", 1e-5),
        ("backward_collectives", max(rank["tiled"]["collectives"] for rank in ranks), "<=", 0),
        ("time_ratio_frozen_2_ranks", seconds["open_clip"] / seconds["tiled"], ">=", 1.8),
    ]
    for name, value, sign, goal in results:
        print(f"{name}: {value:.3g} (goal {sign} {goal:g})")
    return int(not all(value >= goal if sign == ">=" else value <= goal for _, value, sign, goal in results))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run_rank(int(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(main())
