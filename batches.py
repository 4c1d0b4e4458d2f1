"""The batches of a run: seeded draws, loader processes, and the tensors of a global batch.

Every random draw is a function of (seed, iteration, slot in the global batch): no generator lives
from one iteration to the next, so a run can resume anywhere, on any number of ranks and workers.
"""

import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import resource_tracker

import numpy as np
import torch

import augment
from data import IGNORE, InputError, SegmentationData, reading

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
PAD_COLOUR = tuple(round(255 * m) for m in MEAN)

# The streams of draws: (seed, stream, iteration, slot) is the whole state of a generator.
ORDER_X, ORDER_U, AUGMENT_X, AUGMENT_U, CUTMIX = range(5)


def generator(seed, stream, *counters):
    return np.random.default_rng((seed, stream, *counters))


@lru_cache(maxsize=8)
def shuffled(count, seed, stream, epoch):
    return generator(seed, stream, epoch).permutation(count)


def drawn_id(ids, batch_size, seed, stream, iteration, slot):
    """The id in a slot of an iteration's global batch: the ids, shuffled anew for each epoch."""
    epoch, position = divmod(iteration * batch_size + slot, len(ids))
    return ids[shuffled(len(ids), seed, stream, epoch)[position]]


@dataclass
class TrainingDraws(torch.utils.data.Dataset):
    """Item (iteration, slot): the labelled and the unlabelled image in a slot of the global batch.

    A dict of uint8 tensors, S the crop size: x (3, S, S) and its labels y (S, S), 255 on void and
    padding; weak and strong (3, S, S), the views A_w(u) and A_s(u); and the bool map valid (S, S),
    False on padding. Without `unlabelled` (None), x and y alone; with strong=False, no strong view.
    """
    data: SegmentationData
    labelled: list
    unlabelled: list | None
    batch_size: int
    crop_size: int
    seed: int
    scale: tuple = (0.5, 2.0)
    max_side: int | None = None
    strong: bool = True

    def __getitem__(self, key):
        item = self.labelled_item(*key)
        return item | self.unlabelled_item(*key) if self.unlabelled else item

    def ids(self, iteration):
        """The ids of a whole batch: (labelled, unlabelled)."""
        return tuple([drawn_id(ids, self.batch_size, self.seed, stream, iteration, slot)
                      for slot in range(self.batch_size)] if ids else []
                     for ids, stream in ((self.labelled, ORDER_X), (self.unlabelled, ORDER_U)))

    def labelled_item(self, iteration, slot):
        name = drawn_id(self.labelled, self.batch_size, self.seed, ORDER_X, iteration, slot)
        rng = generator(self.seed, AUGMENT_X, iteration, slot)
        image, mask = self.weak(name, self.data.mask(name), rng)
        return {"x": self.to_tensor(image, PAD_COLOUR), "y": self.to_tensor(mask, IGNORE)}

    def unlabelled_item(self, iteration, slot):
        name = drawn_id(self.unlabelled, self.batch_size, self.seed, ORDER_U, iteration, slot)
        rng = generator(self.seed, AUGMENT_U, iteration, slot)
        image, _ = self.weak(name, None, rng)
        valid = torch.zeros(self.crop_size, self.crop_size, dtype=torch.bool)
        valid[:image.height, :image.width] = True
        item = {"weak": self.to_tensor(image, PAD_COLOUR), "valid": valid}
        if self.strong:
            item["strong"] = self.to_tensor(augment.strong_augment(image, rng), PAD_COLOUR)
        return item

    def weak(self, name, mask, rng):
        image = self.data.image(name)
        if mask is not None and mask.size != image.size:
            raise InputError(f"{self.data.masks[name]}: not of the size of its image; export it again")
        with reading(self.data.images[name]):  # a photograph is decoded here, and may be truncated
            return augment.weak_augment(image, mask, self.crop_size, rng, self.scale, self.max_side)

    def to_tensor(self, picture, fill):
        return picture_to_tensor(augment.pad(picture, self.crop_size, fill))


def picture_to_tensor(picture):
    """Pillow RGB or L -> uint8 (3, H, W), channels last in memory as Pillow has them, or (H, W)."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels


def stack_items(items):
    """default_collate of images as they lie in memory, channels last, which is several times faster."""
    pixels = [{name: t.permute(1, 2, 0) if t.ndim == 3 else t for name, t in item.items()}
              for item in items]
    return {name: t.permute(0, 3, 1, 2) if t.ndim == 4 else t
            for name, t in torch.utils.data.default_collate(pixels).items()}


def training_batches(draws, slots, start, stop, workers, pin_memory=False):
    """Iterates over the batches of iterations start..stop-1: of their items, those in `slots`."""
    keys = ([(iteration, slot) for slot in slots] for iteration in range(start, stop))
    return loaded(draws, workers, batch_sampler=keys, pin_memory=pin_memory, collate_fn=stack_items)


def loaded(dataset, workers, **options):
    """Yields what DataLoader(dataset, num_workers=workers, **options) does. Its processes end with the
    generator, and until then leave the signals that stop a run to the process that they load for.
    Raises the InputError of an item as one line, and another for a process that died.

    Beside other ranks they come from a fork server, as DDP's documentation asks: a fork beside the
    threads of gloo can inherit a lock of Python's that nobody there lets go of, and hang. They import
    the script, which so needs its `if __name__ == "__main__"`.
    """
    distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    context = None
    if workers and distributed:
        context = "forkserver" if hasattr(os, "fork") else "spawn"  # Windows
        multiprocessing.set_forkserver_preload(["torchvision"])  # once, and not once a process
        resource_tracker.ensure_running()  # its start would unblock the signals
    with loader_signals():
        items = iter(torch.utils.data.DataLoader(
            dataset, num_workers=workers, multiprocessing_context=context,
            worker_init_fn=end_with_parent, **options))
    try:
        yield from items
    except InputError as error:  # a loader process puts its traceback before the message
        text = str(error).strip().splitlines()[-1].removeprefix("data.InputError: ")
        raise InputError(text) from error.with_traceback(None)  # its frames would hold `items`
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"a loader process died ({reason}); lower --workers, or free memory") from None
    finally:
        del items


def end_with_parent(_):
    """End a loader process when the process that it loads for has ended, were it killed. (torch asks for
    the process that it was forked by, which may be the server.)"""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


@contextmanager
def loader_signals():
    """Processes started within it, or by a fork server that was, inherit that the signals which stop a run
    are blocked. A loader's death is noticed when its next item is asked for, and not, as torch has it, at
    any line of code."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1,
                                                     signal.SIGHUP})
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)


def normalize(images):
    """uint8 (B, 3, H, W) on any device -> float32, normalised with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(v)[:, None, None].mul(255).to(images.device, non_blocking=True)
                 for v in (MEAN, STD))
    return (images - mean) / std
