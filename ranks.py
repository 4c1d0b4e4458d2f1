"""What the processes (ranks) of a run do together. Each function works with a single process, too.

Works alone: torch is all it needs. Shapes: a global batch of B images is b = B / world_size a rank.
"""

import os
import shlex
import signal
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import wraps
from pathlib import Path

import torch
import torch.distributed as dist


class CommandError(Exception):
    """What ends a command: one line for the user, and the exit code."""
    exit_code = 2


class StartError(CommandError):
    """Processes that cannot work as they were started: one line that says how to start them."""


def command_line(main):
    """Decorates the main(argv) of a command. A CommandError, raised on all ranks, ends it with a line on
    stderr and its exit code. Characters that the terminal lacks are escaped."""
    script = Path(main.__code__.co_filename).name

    @wraps(main)
    def run(argv=None):
        if hasattr(sys.stdout, "reconfigure"):  # not where a program has replaced it
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main(argv)
        except CommandError as error:
            if rank() == 0:
                print(f"{script}: {error}", file=sys.stderr, flush=True)
            together(lambda: None)  # wait for it: where one rank has ended, torchrun ends the others
            leave()
            sys.exit(error.exit_code)
        leave()
    return run


def join():
    """Join the other processes of torchrun, if there are any, and return this one's device.

    Raises StartError for more processes than GPUs, and for processes that do not know of each other.
    """
    cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE") or 0)
    if not world:
        demand_one_process()
    if world > 1:
        needed = ("RANK", "MASTER_ADDR", "MASTER_PORT", *(("LOCAL_RANK",) if cuda else ()))
        missing = [name for name in needed if not os.environ.get(name)]
        if missing:
            raise StartError(f"WORLD_SIZE is {world}, without {' and '.join(missing)}: start with torchrun, "
                             f"or unset WORLD_SIZE")
        if cuda:
            local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local_rank >= count:
                raise StartError(f"--nproc_per_node: more processes than GPUs; give at most {count}")
            torch.cuda.set_device(local_rank)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait for the other ranks
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return torch.device("cuda" if cuda else "cpu")


def demand_one_process():
    """Raise StartError if srun or mpirun started several processes without WORLD_SIZE."""
    # A job's batch script has SLURM_NTASKS, too, but is no step of the job.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_JOB_ID" in os.environ else "SLURM_NTASKS"
    for launcher, variable in (("srun", tasks), ("mpirun", "OMPI_COMM_WORLD_SIZE"), ("mpirun", "PMI_SIZE")):
        count = int(os.environ.get(variable) or 1)
        if count == 1:
            continue
        if launcher == "srun":
            nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or 1)
            torchrun = f"srun --ntasks={nodes} --ntasks-per-node=1 torchrun --nproc_per_node={count // nodes}"
            if nodes > 1:
                torchrun += (f" --nnodes={nodes} --rdzv_backend=c10d "
                             f"--rdzv_endpoint=$(scontrol show hostnames | head -1):29500")
        else:
            torchrun = f"torchrun --nproc_per_node={count}"
        raise StartError(f"{launcher} started {count} processes that do not know of each other; as one run: "
                         f"{torchrun} {shlex.join(sys.argv)} (if each is a run of its own, set WORLD_SIZE=1)")


def demand_same_lists(lists):
    """Raise StartError, on all ranks, unless all have the same `lists`, {what: ids}. (Each machine may have
    its own copy of the data.)"""
    (first, ours), *others = gather_objects((socket.gethostname(), lists))
    for number, (host, theirs) in enumerate(others, 1):
        for what, ids in ours.items():
            missing = {number: set(ids) - set(theirs[what]), 0: set(theirs[what]) - set(ids)}
            lacking = [f"; rank {n} lacks {', '.join(sorted(missing[n])[:5])}" for n in missing if missing[n]]
            if ids != theirs[what]:
                raise StartError(f"rank {number} ({host}) has {len(theirs[what])} {what}, rank 0 ({first}) "
                                 f"{len(ids)}{''.join(lacking)}; make their copies of the data equal")


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


def gather_objects(value):
    """The values of all ranks: a list."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def own(whole):
    """This rank's part (b, ...) of a global batch (B, ...)."""
    return whole.chunk(world_size())[rank()]


def say(text):
    """Print a line on rank 0. A closed terminal ends no run."""
    if rank() == 0:
        with suppress(OSError):
            print(text, flush=True)


def progress(items, what, total=None, step=1):
    """Yields the items. Every five seconds rank 0 says how many are done, and how long the rest will take:
    "120 of 500 photographs, 0:01:20 left". Work of less than five seconds says nothing.

    what:   the items' name, in the plural.
    total:  how many there are, where items has no len; 0 if nobody knows.
    step:   how many an item stands for, such as 1 on each rank; total counts these.
    """
    total = len(items) if total is None else total
    began = said = time.monotonic()
    for i, item in enumerate(items):
        done, now = i * step, time.monotonic()
        if done and now - said >= 5:
            left = timedelta(seconds=round((now - began) / done * max(0, total - done)))
            say(f"{done} of {total} {what}, {left} left" if total else f"{done} {what}")
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
            error = next(filter(None, gather_objects(error)))
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
