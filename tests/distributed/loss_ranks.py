"""Every batch loss on two gloo ranks under DistributedDataParallel; `tests/test_distributed.py` launches and judges it.

Run as ``python loss_ranks.py RANK FOLDER``; results are left in ``FOLDER/RANK.pt``.
"""

import os
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gmail_lightning import distributed
from gmail_lightning.losses import (
    alignment_loss,
    clip_loss,
    prediction_contrast_loss,
    principal_components,
    reciprocal_consistency_loss,
    sigmoid_loss,
)

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *("barrier", "broadcast", "gather", "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor"),
    *("scatter", "send", "batch_isend_irecv"),
)
RANKS = 2
ROWS = 7  # of each rank
#: loss of two sides of features, then what is trained beside the first side
CASES = {
    "clip": (lambda m, a, b, ids: clip_loss(a, b, m.scale.exp()), {"second", "scale"}),
    "clip, ids": (lambda m, a, b, ids: clip_loss(a, b, m.scale.exp(), ids=ids), {"second", "scale"}),
    "clip, frozen": (lambda m, a, b, ids: clip_loss(a, b, m.scale.exp(), ids=ids), {"scale"}),
    "clip, first frozen": (lambda m, a, b, ids: clip_loss(b, a, m.scale.exp()), {"scale"}),
    "clip, fixed scale": (lambda m, a, b, ids: clip_loss(a, b, 30.0), {"second"}),
    "clip, safe path": (  # in float64, since cosines near 1 and -1 leave little of a gradient in fp32
        lambda m, a, b, ids: clip_loss((a + m.far).double(), (b + m.far.abs()).double(), 150.0, ids=ids),
        {"second"},
    ),
    "clip, smoothed": (lambda m, a, b, ids: clip_loss(a, b, m.scale.exp(), label_smoothing=0.1), {"second", "scale"}),
    "clip, smoothed, ids": (
        lambda m, a, b, ids: clip_loss(a, b, m.scale.exp(), ids=ids, label_smoothing=0.3),
        {"second", "scale"},
    ),
    "clip, smoothed, frozen": (lambda m, a, b, ids: clip_loss(b, a, 9.0, ids=ids, label_smoothing=0.1), set()),
    "clip, components": (
        lambda m, a, b, ids: clip_loss(
            principal_components(a, 3), b, m.scale.exp(), ids=ids, label_smoothing=0.1, normalize_images=False
        ),
        {"second", "scale"},
    ),
    "sigmoid": (lambda m, a, b, ids: sigmoid_loss(a, b, m.scale.exp(), m.bias), {"second", "scale", "bias"}),
    "sigmoid, ids": (lambda m, a, b, ids: sigmoid_loss(a, b, m.scale.exp(), m.bias, ids=ids), {"scale", "bias"}),
    "sigmoid, first frozen": (lambda m, a, b, ids: sigmoid_loss(b, a, m.scale.exp(), m.bias), {"bias", "scale"}),
    "alignment": (lambda m, a, b, ids: alignment_loss(a, b), set()),
    "alignment, ids": (lambda m, a, b, ids: alignment_loss(a, b, temperature=(-m.scale).exp(), ids=ids), {"scale"}),
    "alignment, real trained": (lambda m, a, b, ids: alignment_loss(a, b, ids=ids), {"second"}),
    "alignment, only real trained": (lambda m, a, b, ids: alignment_loss(b, a, ids=ids), set()),
    "alignment, symmetric": (lambda m, a, b, ids: alignment_loss(a, b, ids=ids, symmetric=True), set()),
    "alignment, symmetric, real trained": (
        lambda m, a, b, ids: alignment_loss(a, b, temperature=(-m.scale).exp(), ids=ids, symmetric=True),
        {"second", "scale"},
    ),
}


def consistency(**settings):
    def loss(m, a, b, ids):
        weight = 0.1 + ids / 10
        return reciprocal_consistency_loss(
            a, b, (a + b).roll(1, dims=1), logit_scale=3.0, weight=weight, ids=ids, **settings
        )

    return loss, {"second"}


#: Those that do communicate in the backward.
GATHERING = {
    "consistency": consistency(),
    "consistency, no target held": consistency(stop_gradient="none"),
    "consistency, infonce": consistency(distance="infonce"),
    "consistency, cosine": consistency(distance="cosine"),
    "prediction contrast": (
        lambda m, a, b, ids: prediction_contrast_loss(a, b[:, None], (a - b).roll(2, dims=1)[:, None]),
        {"second"},
    ),
}


class TwoTowers(nn.Module):
    """Two linear encoders, a log-scale and a bias; its output is the loss."""

    def __init__(self, loss, trained):
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.first, self.second = nn.Linear(6, 10), nn.Linear(5, 10)
        self.scale, self.bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-4.0))
        for name in {"second", "scale", "bias"} - trained:
            getattr(self, name).requires_grad_(False)
        self.far = torch.zeros(0)

    def forward(self, x, y, ids, far):
        self.far = far
        return self.loss(self, self.first(x), self.second(y), ids)


def joined_batch():
    """Inputs of all ranks; ids are shared within a rank and across ranks; the last rows point away, see `far`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(RANKS * ROWS, 6, generator=generator)
    y = torch.randn(RANKS * ROWS, 5, generator=generator)
    ids = torch.arange(RANKS * ROWS) % 9
    ids[1] = 0
    far = torch.full((RANKS * ROWS, 1), 8.0)
    far[-2:] *= -1
    return x, y, ids, far


@contextmanager
def count_collectives():
    """Counts calls of the collectives of torch.distributed, but not those of DistributedDataParallel itself."""
    calls = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, counted(name, getattr(dist, name))))
        yield calls


def backward(model, batch):
    """Loss, gradients by name, and the number of collectives in forward and backward."""
    with count_collectives() as forward_calls:
        loss = model(*batch)
    with count_collectives() as backward_calls:
        loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None},
        "forward_calls": forward_calls.total(),
        "backward_calls": backward_calls.total(),
    }


def gather_with_gradient(model, a, b, ids):
    """A loss that does communicate in the backward: shows that the count sees it."""
    gathered = torch.distributed.nn.functional.all_gather(b)
    return (a @ torch.cat(gathered).T).square().mean()


def refusal(rank):
    """The error of a rank when rank 1 has one row more."""
    features = torch.randn(3 + rank, 4)
    try:
        clip_loss(features, features, 1.0)
    except ValueError as error:
        return str(error)
    return None


def decisions(rank):
    """Two decisions of the first rank, one of them an error, as torchrun starts ranks, before there is a group."""

    def refuse():
        raise ValueError(f"rank {rank} does not like it")

    os.environ.update(TORCHELASTIC_RUN_ID="one", RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
    decided = [distributed.decided_once(lambda: {"folder": f"made by rank {rank}"})]
    try:
        distributed.decided_once(refuse)
    except ValueError as error:
        decided.append(str(error))
    return decided


def main(rank, folder):
    decided = decisions(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    batch = [tensor[mine] for tensor in joined_batch()]
    results = {"rank": distributed.rank(), "world_size": distributed.world_size(), "refusal": refusal(rank)}
    results["decided"] = decided
    results["gathered"] = distributed.gather_rows(batch[0].T.contiguous().T)  # strides other than those of rows
    for name, (loss, trained) in (CASES | GATHERING).items():
        results[name] = backward(DistributedDataParallel(TwoTowers(loss, trained)), batch)
    results["control"] = backward(TwoTowers(gather_with_gradient, {"second"}), batch)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # DDP keeps gloo's threads beyond the group, and one that frees a tensor while Python ends aborts
