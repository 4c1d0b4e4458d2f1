"""What only a GPU shows. Where there is none, the tests run their logic on the CPU, and skip the rest."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def device():
    """The GPU, in full float32 precision (no TF32), or else the CPU."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@pytest.fixture
def hide_gpu(monkeypatch):
    """A function behind which commands run on the CPU."""
    return lambda: monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pytest_collection_modifyitems(items):
    """What is slow on a CPU is quick on a GPU: there `pytest -m "not slow"` takes all of them."""
    for item in items:
        if torch.cuda.is_available() and item.path.parent == Path(__file__).parent:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
