"""Several ranks and one GPU: two share it over gloo, as NCCL refuses to; NCCL and SyncBatchNorm with one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_gpu_commands import HERE, TINY, gammas, metrics
from test_gpu_step import build, make_batch, on, settings
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train


@pytest.mark.slow
def test_two_ranks_on_one_gpu_are_one(device, tmp_path):
    # On a GPU SyncBatchNorm makes them one; on a CPU each rank has its own statistics.
    flags = [*TINY, "--iters", "6", "--eval-every", "99"]
    train.main([*flags, "--out", str(tmp_path / "one")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "tests/gpu/two_ranks.py", *flags, "--out", tmp_path / "two", "--workers", "1"], cwd=HERE,
        env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"on 2 x {device.type}" in done.stdout
    assert gammas(tmp_path / "two")[0] == gammas(tmp_path / "one")[0]
    if device.type == "cuda":
        np.testing.assert_allclose(gammas(tmp_path / "two")[1], gammas(tmp_path / "one")[1], atol=0.02)
        for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
            assert ours == pytest.approx(theirs, rel=0.02, abs=0.02)


@pytest.fixture
def group(device, tmp_path):
    """A process group of this process alone, over NCCL on a GPU."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_nccl_with_one_rank(device, group):
    for tensor in (torch.arange(8, dtype=torch.uint8), torch.rand(3, 5)):
        tensor = tensor.to(device)
        whole = torch.empty_like(tensor)
        dist.all_gather([whole], tensor)  # as ranks.gather
        assert whole.equal(tensor)
        dist.all_reduce(whole)
        dist.broadcast(whole, 0)
        assert whole.equal(tensor)
    box = [{"a": 1}]
    dist.broadcast_object_list(box)
    assert box == [{"a": 1}]


@pytest.mark.filterwarnings("ignore:.*broadcast_buffers:FutureWarning")
@pytest.mark.parametrize("flags", [pytest.param("", marks=pytest.mark.slow), "--accumulate 2"])
def test_a_step_under_ddp_and_syncbatchnorm_is_the_bare_step(flags, device, group):
    args, batch = settings(flags, device), on(device, make_batch(4, 49))
    found = []
    for wrapped in (False, True):
        student, teacher, _ = build(args, device)
        if wrapped:
            if device.type == "cuda":
                student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
            student = DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD([{"params": student.parameters(), "initial_lr": 0.01}], 0.01)
        scalars, gamma = train.train_step(student, teacher, optimizer, batch, 3, args)
        found.append(torch.cat([scalars, gamma]).cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
