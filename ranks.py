"""What the processes (ranks) of a run do together. With one process each function is the plain thing.

Works alone: torch is all it needs. Shapes: a global batch of B images is b = B / world_size a rank.
"""

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist


def join():
    """This process's device, after it joined the others of torchrun, if there are any.

    Raises ValueError where torchrun was told to start more processes than there are GPUs, and where
    it is only half said what the others are.
    """
    cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        needed = ["RANK", "MASTER_ADDR", "MASTER_PORT"] + ["LOCAL_RANK"] * cuda
        missing = [name for name in needed if not os.environ.get(name)]
        if missing:
            raise ValueError(f"WORLD_SIZE is {world}, but {' and '.join(missing)} are not set: start with "
                             f"torchrun, or unset WORLD_SIZE")
        if cuda:
            local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local_rank >= count:
                raise ValueError(f"--nproc_per_node: there are {count} GPUs here; give at most {count}")
            torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return torch.device("cuda" if cuda else "cpu")


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(local):
    """The ranks' parts (b, ...) of a global batch, in the order of the ranks: (B, ...)."""
    if world_size() == 1:
        return local
    whole = local.new_empty(world_size() * len(local), *local.shape[1:])
    dist.all_gather(list(whole.chunk(world_size())), local.contiguous())
    return whole


def own(whole):
    """This rank's part (b, ...) of a global batch (B, ...)."""
    return whole.chunk(world_size())[rank()]


def say(text):
    """Print a line, once. That nobody listens any more ends no run."""
    if rank() == 0:
        with suppress(OSError):
            print(text, flush=True)


def end(script, error, code=2):
    """End a command on all ranks with one line on stderr. (Where a rank has ended, torchrun ends the others,
    so they wait until it is said.)"""
    if rank() == 0:
        print(f"{script}: {error}", file=sys.stderr, flush=True)
    together(tuple)
    leave()
    sys.exit(code)


def progress(items, what, total=None, step=1):
    """Yields the items. Every five seconds rank 0 says how many are done, and how long the rest will take:
    "120 of 500 photographs, 0:01:20 left". Work of less than five seconds says nothing.

    what:   the items' name, in the plural.
    total:  how many there are, where items has no len.
    step:   how many an item stands for, such as 1 on each rank; total counts these.
    """
    total = len(items) if total is None else total
    began = said = time.monotonic()
    for i, item in enumerate(items):
        done, now = i * step, time.monotonic()
        if done and now - said >= 5:
            left = timedelta(seconds=round((now - began) / done * (total - done)))
            say(f"{done} of {total} {what}, {left} left")
            said = now
        yield item


def together(function, *arguments):
    """function(*arguments) on every rank; an exception of any rank is raised on all of them."""
    result = error = None
    try:
        result = function(*arguments)
    except Exception as caught:
        error = caught
    if world_size() > 1:
        failed = torch.tensor(error is not None, dtype=torch.uint8)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed:  # objects are pickled, which is slow
            errors = [None] * world_size()
            dist.all_gather_object(errors, error)
            error = next(filter(None, errors))
    if error is not None:
        raise error
    return result


def sum_over_ranks(tensor):
    """The sum of the ranks' tensors, on the host."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor.cpu()


def average_buffers(network):
    """Give every rank the mean of the ranks' BatchNorm statistics: SyncBatchNorm needs GPUs."""
    buffers = [b for b in network.buffers() if b.is_floating_point()]
    flat = torch.cat([b.flatten() for b in buffers])
    dist.all_reduce(flat)
    means = (flat / world_size()).split([b.numel() for b in buffers])
    for buffer, mean in zip(buffers, means):
        buffer.copy_(mean.view_as(buffer))
