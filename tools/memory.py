"""The peak memory of a training step, computed: what is alive at once in train.train_step, run on fake
tensors, which have a shape and a dtype and no content. A row per network, a column per --accumulate.

    python tools/memory.py                          the table of docs/speed.md
    python tools/memory.py --precision fp32         without --amp

Not counted: the CUDA context, cuDNN's workspaces and what the allocator cannot fit together.
"""

import argparse
import multiprocessing
import sys
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

ROWS = {  # name: the flags of train.py, the number of classes
    "VOC, ResNet-50": ("--dataset=voc", 21),
    "VOC, ResNet-50, stride 8": ("--dataset=voc --output-stride=8", 21),
    "VOC, ResNet-101": ("--dataset=voc --backbone=resnet101", 21),
    "VOC, ResNet-101, stride 8": ("--dataset=voc --backbone=resnet101 --output-stride=8", 21),
    "Cityscapes, ResNet-50": ("--dataset=cityscapes", 19),
    "Cityscapes, ResNet-50, --aux --ohem": ("--dataset=cityscapes --aux --ohem", 19),
    "crop 321, ResNet-50": ("--dataset=voc --crop-size=321", 21),
    "crop 321, ResNet-18, 64 channels": (
        "--dataset=voc --crop-size=321 --backbone=resnet18 --channels=64", 21),
}


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


def peak(flags, classes):
    """GiB at the peak of a step. It is the CPU's kernels that are asked what they would allocate."""
    warnings.simplefilter("ignore")
    args = train.parse_arguments([*flags, "--weights=none", "--iters=100"])
    args.cuda, batch, size = False, args.batch_size, args.crop_size
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


def main():
    parser = argparse.ArgumentParser(description="Compute the peak memory of a training step.")
    parser.add_argument("--accumulate", nargs="+", default=["1", "2", "4", "8"])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    args = parser.parse_args()
    print("| GiB | " + " | ".join(args.accumulate) + " |\n" + "|---" * (1 + len(args.accumulate)) + "|")
    for row in args.only:
        (flags, classes), cells = ROWS[row], []
        for accumulate in args.accumulate:
            amp = "--amp" if args.precision == "bf16" else "--no-amp"
            # A process each: what fake tensors leave behind in torch crashes the next.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                cells.append(process.submit(
                    peak, [*flags.split(), f"--accumulate={accumulate}", amp], classes).result())
        print(f"| {row} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
