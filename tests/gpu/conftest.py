"""What only a GPU shows. Where there is none, the tests run their logic on the CPU, and skip the rest."""

import pytest
import torch


@pytest.fixture
def device():
    """The GPU, in full float32 precision (no TF32), or else the CPU."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.fixture
def hide_gpu(monkeypatch):
    """A function behind which commands run on the CPU."""
    return lambda: monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pytest_collection_modifyitems(items):
    """What is slow on a CPU is quick on a GPU: there `pytest -m "not slow"` takes all of them."""
    if torch.cuda.is_available():
        for item in items:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
