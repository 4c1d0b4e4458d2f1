"""The batches of a run: seeded draws, loader threads, and the tensors of a global batch.

Every random draw is a function of (seed, iteration, slot in the global batch). No generator outlives an
iteration, so a run can resume anywhere, on any number of ranks and workers.
"""

import queue
import threading
from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

import augment
from data import IGNORE, SegmentationData, reading

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
PAD_COLOUR = tuple(round(255 * m) for m in MEAN)

# The streams of draws: (seed, stream, iteration, slot) is the whole state of a generator.
ORDER_X, ORDER_U, AUGMENT_X, AUGMENT_U, CUTMIX = range(5)


def generator(seed, stream, *counters):
    return np.random.default_rng((seed, stream, *counters))


@lru_cache(maxsize=8)
def shuffled(count, seed, stream, epoch):
    return generator(seed, stream, epoch).permutation(count)


@dataclass
class TrainingDraws:
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

    def drawn_id(self, ids, stream, iteration, slot):
        """The id in a slot of an iteration's global batch: the ids, shuffled anew for each epoch."""
        epoch, position = divmod(iteration * self.batch_size + slot, len(ids))
        return ids[shuffled(len(ids), self.seed, stream, epoch)[position]]

    def ids(self, iteration):
        """The ids of a whole batch: (labelled, unlabelled)."""
        return tuple([self.drawn_id(ids, stream, iteration, slot) for slot in range(self.batch_size)]
                     if ids else [] for ids, stream in ((self.labelled, ORDER_X), (self.unlabelled, ORDER_U)))

    def labelled_item(self, iteration, slot):
        name = self.drawn_id(self.labelled, ORDER_X, iteration, slot)
        rng = generator(self.seed, AUGMENT_X, iteration, slot)
        image, mask = self.weak(name, self.data.mask(name), rng)
        return {"x": self.to_tensor(image, PAD_COLOUR), "y": self.to_tensor(mask, IGNORE)}

    def unlabelled_item(self, iteration, slot):
        name = self.drawn_id(self.unlabelled, ORDER_U, iteration, slot)
        rng = generator(self.seed, AUGMENT_U, iteration, slot)
        image, _ = self.weak(name, None, rng)
        valid = np.zeros((self.crop_size, self.crop_size), bool)
        valid[:image.height, :image.width] = True
        item = {"weak": self.to_tensor(image, PAD_COLOUR), "valid": torch.from_numpy(valid)}
        if self.strong:
            item["strong"] = self.to_tensor(augment.strong_augment(image, rng), PAD_COLOUR)
        return item

    def weak(self, name, mask, rng):
        image = self.data.image(name)
        with reading(self.data.images[name]):  # a photograph is decoded here, and may be truncated
            return augment.weak_augment(image, mask, self.crop_size, rng, self.scale, self.max_side)

    def to_tensor(self, picture, fill):
        return picture_to_tensor(augment.pad(picture, self.crop_size, fill))


def picture_to_tensor(picture):
    """Pillow RGB or L -> uint8 (3, H, W), channels last in memory as Pillow has them, or (H, W)."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels


def stack_items(items):
    """Items -> a batch. Images are stacked as they lie in memory, channels last, which is several times
    faster. NumPy does so without threads of its own; torch would start some in each loader thread."""
    return {name: torch.from_numpy(np.stack([item[name].numpy() for item in items])) for name in items[0]}


def training_batches(draws, slots, start, stop, workers, pin_memory=False, check=None):
    """Iterates over the batches of iterations start..stop-1: of their items, those in `slots`."""
    device = torch.cuda.current_device() if pin_memory else None

    def make(iteration):
        batch = stack_items([draws[iteration, slot] for slot in slots])
        if pin_memory:
            torch.cuda.set_device(device)  # the device and the number of threads are set per thread
            torch.set_num_threads(1)
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch
    return loaded(make, range(start, stop), workers, check)


def loaded(make, keys, workers, check=None):
    """Yields make(key) for each of the keys, in their order. `workers` threads work ahead.

    An error of make is raised in the turn of its key. During a wait for an item, check() is called every
    second; its errors end the wait. Threads make more items a second than as many processes do, and need no
    shared memory and no sockets. They hold Python's lock for a quarter of their time, so a rank's threads
    make at most four times what one does.
    """
    if not workers:
        yield from map(make, keys)
        return
    tasks, ahead = queue.SimpleQueue(), deque()

    def work():
        for future, key in iter(tasks.get, None):
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(make(key))
                except Exception as error:
                    future.set_exception(error)

    def finished(future):
        while not wait([future], timeout=1).done:
            if check:
                check()
        return future.result()

    # Daemons, unlike the threads of a ThreadPoolExecutor, for which Python waits at its exit: one may wait
    # for a disk for ever.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for key in keys:
            ahead.append(Future())
            tasks.put((ahead[-1], key))
            if len(ahead) > 2 * workers:
                yield finished(ahead.popleft())
        while ahead:
            yield finished(ahead.popleft())
    finally:
        for future in ahead:
            future.cancel()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join(2 / workers)


def normalize(images):
    """uint8 (B, 3, H, W) on any device -> float32, normalised with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(v)[:, None, None].mul(255).to(images.device, non_blocking=True)
                 for v in (MEAN, STD))
    return (images - mean) / std
