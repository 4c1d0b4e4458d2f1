"""The peak memory of a training step: settings.step_memory against what is alive at once in train_step, run
on fake tensors, which have a shape and a type and no content."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from settings import parse_arguments, step_memory


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, in the blocks of 512 that CUDA's allocator gives."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, (storage.nbytes() + 511) // 512 * 512
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            self.see(tensor)
        return result


def parse(flags):
    return parse_arguments(["--dataset=voc", "--weights=none", "--iters=100", *flags.split()])


def counted_peak(flags, classes=21):
    """GiB at the peak of a step, of what the CPU's kernels would allocate."""
    args = parse(flags)
    batch, size = args.batch_size, args.crop_size
    with FakeTensorMode(), LiveMemory() as memory:
        student, teacher = (train.DeepLabV3Plus(classes, args.backbone, args.output_stride, args.channels,
                                                aux=args.aux) for _ in range(2))
        teacher.eval().requires_grad_(False)
        optimizer = torch.optim.SGD([{"params": student.parameters(), "initial_lr": args.lr}], args.lr,
                                    momentum=0.9, weight_decay=args.weight_decay, fused=True)
        for parameter in student.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # makes the momentum
        images = torch.empty(3, batch, 3, size, size, dtype=torch.uint8)
        maps = torch.empty(2, batch, size, size, dtype=torch.uint8)
        inputs = {"x": images[0], "weak": images[1], "strong": images[2],
                  "y": maps[0], "valid": maps[1].bool()}
        train.train_step(student, teacher, optimizer, inputs, 1, args)
    return memory.peak / 2 ** 30


@pytest.mark.parametrize("flags, counted", [  # by counted_peak
    ("--backbone=resnet50", 31.22), ("--backbone=resnet50 --amp", 17.24),
    ("--backbone=resnet50 --accumulate=8", 4.62), ("--backbone=resnet50 --batch-size=4", 8.14),
    ("--backbone=resnet50 --crop-size=129", 2.55), ("--backbone=resnet50 --crop-size=769", 69.01),
    ("--backbone=resnet50 --channels=64", 27.66), ("--backbone=resnet50 --aux", 32.70),
    ("--backbone=resnet50 --supervised", 10.98),
    ("--backbone=resnet50 --cutmix=none --intensity=none", 20.94),
    ("--backbone=resnet50 --output-stride=8", 55.48), ("--backbone=resnet18", 13.42),
    ("--backbone=resnet18 --channels=64 --amp", 6.40), ("--backbone=resnet34", 16.26),
    ("--backbone=resnet34 --output-stride=8 --channels=64", 20.66), ("--backbone=resnet101", 41.61),
    ("--backbone=resnet101 --output-stride=8", 95.15),
    ("--backbone=resnet101 --output-stride=8 --amp", 49.35)])
def test_the_formula_gives_what_was_counted(flags, counted):
    assert step_memory(parse(f"--no-amp {flags}")) == pytest.approx(counted, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("flags, before", [("--amp", 1.734), ("--no-amp --accumulate=2", 1.447)])
def test_a_step_takes_no_more_than_before(flags, before):
    # One more map of all weak views, kept until the step ends, would be 0.7 %.
    flags += " --backbone=resnet18 --channels=64 --crop-size=257"
    counted = counted_peak(flags)
    assert counted < 1.003 * before and step_memory(parse(flags)) == pytest.approx(counted, rel=0.1)


def test_ranks_share_the_batch():
    assert step_memory(parse("--batch-size=16"), ranks=4) == step_memory(parse("--batch-size=4"))
