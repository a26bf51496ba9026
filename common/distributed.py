"""One run on several GPUs: a process for each, started by `torchrun --nproc-per-node 4 afa.py ...`. Without torchrun
nothing in here does anything, and a script computes the same bits as if its calls were not there.

A third file beside data.py and pgd.py, because both use it, and whoever has one GPU need not read it.

Two things are split: the training batch, whose gradients are averaged, and the samples that `survivors` and `unbroken`
attack. All else every process computes alike. So nobody waits long for another, and all take the same decisions; the
first one alone prints, logs and saves.

BatchNorm in training sees the share of its own process. The running statistics are averaged when an epoch ends, before
they are evaluated or saved. SyncBatchNorm would take the statistics of the whole batch, but it exists on CUDA only (no
test on a CPU could cover it), talks in every layer of every pass, and each method's own layers would need one too. A
share of 32 images or more is about what these recipes are used to; with smaller ones results will differ.
"""

import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

_host = None  # group for messages on the host: there the others wait while the first downloads or decodes data


def start():
    """Join the processes that torchrun has started, if it has. Only the first one may print from here on."""
    global _host
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        return
    # When a process dies torchrun ends the others at once. The timeout is for one that hangs; it covers compiling.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            timeout=timedelta(minutes=30))  # fmt: skip
    _host = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    sys.excepthook = show


def show(kind, error, trace):
    """As Python shows an error. A connection that breaks is another process's end, whose own message should be read
    first, and ends this one too."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        time.sleep(5)
    sys.__excepthook__(kind, error, trace)


def finish():
    """Leave in good order; after an error a process just ends, for leaving would wait for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launcher(processes=None):
    """What starts a script with so many processes (None: as many as now)."""
    processes = processes or world()
    return "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"


def seed(value):
    """A seed for what must differ between processes, as the noise of attacks; the first one keeps the value."""
    return value + 1_000_000_007 * rank()


class Silent:
    """In the place of the first process's writer the others have this: every call does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def agree(value=None):
    """The first process's value, in all of them; all wait until all are here."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_host)
    dist.barrier(group=_host)
    return box[0]


@contextmanager
def first_alone():
    """What the first process does in here the others do after it: download, decode, and then find it done."""
    if rank() > 0:
        agree()
    yield
    if rank() == 0:
        agree()


def share(n):
    """This process's slice of n things; it may be empty."""
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def everywhere(mask):
    """Where a boolean mask holds in all processes."""
    if world() == 1:
        return mask
    mask = mask.to(torch.uint8)
    dist.all_reduce(mask, dist.ReduceOp.MIN)
    return mask.bool()


def gather(x):
    """The tensors (n, ...) of all processes, of one shape, in one (processes * n, ...)."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def mean(x):
    """The mean of a tensor over the processes."""
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world()


def _average(tensors, dtype):
    if not tensors:  # a network without BatchNorm has no statistics
        return
    flat = mean(torch.cat([t.flatten().to(dtype) for t in tensors]))
    for t, value in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(value.view_as(t))


@torch.no_grad()
def average_gradients(optimizer):
    """Average the gradients that the optimizer is about to use: shares are equal (`data.steps_per_epoch`), so the mean
    of their means is that of the batch.

    By hand, for DistributedDataParallel wants one pass of one module per step, and the methods make several, of parts
    of the network, with an attack in between. It would also hide the exchange behind the backward pass, which wins
    little here: there is one exchange for the many passes of an attack.
    """
    if world() > 1:
        _average([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None],
                 torch.float32)  # fmt: skip


@torch.no_grad()
def average_statistics(net):
    """Average BatchNorm's running statistics, and all other buffers that are floats.

    In double: what all processes have alike, as a frozen network, stays as it is, whatever their number.
    """
    if world() > 1:
        _average([b for b in net.buffers() if b.is_floating_point()], torch.float64)
