"""Seeded draws, and the batches that loader threads make of them."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from batches import TrainingDraws, loaded, normalize, training_batches
from data import IGNORE, InputError, Shapes, open_data, split_ids
from test_data import custom, problems, save


def draws(**options):
    shapes = Shapes()
    labelled, unlabelled = split_ids(shapes, "shapes", "1_16")
    return TrainingDraws(shapes, **{"labelled": labelled, "unlabelled": unlabelled, "batch_size": 4,
                                    "crop_size": 24, "seed": 3, **options})


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_batches_are_uint8_and_padding_is_marked():
    batch = next(training_batches(draws(), range(4), 0, 1, workers=0))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in batch.items()} == {
        "x": (torch.uint8, (4, 3, 24, 24)), "y": (torch.uint8, (4, 24, 24)),
        "weak": (torch.uint8, (4, 3, 24, 24)), "strong": (torch.uint8, (4, 3, 24, 24)),
        "valid": (torch.bool, (4, 24, 24))}
    items = [draws(scale=(0.5, 0.5))[0, place] for place in range(4)]
    for item in items:  # 32-pixel images at half size in a crop of 24
        assert item["valid"][:16, :16].all() and item["valid"].sum() == 16 * 16
        assert (item["y"][16:] == IGNORE).all() and (item["y"][:, 16:] == IGNORE).all()
        assert (item["y"][:16, :16] != IGNORE).all()
    for name in items[0]:  # and items are stacked as they are
        assert batch[name].equal(torch.stack([draws()[0, place][name] for place in range(4)]))


def test_draws_depend_on_seed_iteration_and_place_alone():
    sequence = list(training_batches(draws(), range(4), 0, 6, workers=0))
    with_workers = list(training_batches(draws(), range(4), 0, 6, workers=2))
    assert all(same(a, b) for a, b in zip(sequence, with_workers))
    resumed = list(training_batches(draws(), range(4), 4, 6, workers=0))
    assert same(resumed[0], sequence[4]) and same(resumed[1], sequence[5])
    ranks = [list(training_batches(draws(), places, 0, 6, workers=0))
             for places in (range(0, 2), range(2, 4))]
    for whole, *shares in zip(sequence, *ranks):
        assert same(whole, {name: torch.cat([s[name] for s in shares]) for name in whole})
    other = next(training_batches(draws(seed=4), range(4), 0, 1, workers=0))
    assert not same(other, sequence[0])
    assert not sequence[0]["weak"].equal(sequence[1]["weak"])


def square_after(key):
    time.sleep(key % 3 / 100)  # later items may be ready earlier
    if key == 11:
        raise InputError("11: a broken file")
    return key * key


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_items_come_in_order_and_an_error_in_its_turn(workers):
    found, before = [], threading.active_count()
    with pytest.raises(InputError, match="11: a broken file"):
        for item in loaded(square_after, itertools.count(), workers):
            found.append(item)
    assert found == [key * key for key in range(11)]
    assert threading.active_count() == before


def test_loader_threads_work_no_further_ahead_than_two_items_each_and_end_with_the_loop():
    made, before = [], threading.active_count()
    items = loaded(made.append, range(100), workers=2)
    next(items)
    time.sleep(0.2)
    assert len(made) == 5 and threading.active_count() == before + 2
    items.close()
    assert threading.active_count() == before and len(made) == 5


def test_a_wait_for_a_disk_ends_when_the_run_is_asked_to_stop():
    disk, began = threading.Event(), time.monotonic()

    def check():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        list(loaded(lambda key: disk.wait(8), range(3), 2, check))
    assert time.monotonic() - began < 5
    disk.set()


def test_an_epoch_sees_every_unlabelled_image_once_and_labelled_ones_in_turn():
    few = draws(labelled=["train_000", "train_016", "train_032"],
                unlabelled=[f"train_{i:03d}" for i in range(1, 9)])
    x, u = zip(*(few.ids(iteration) for iteration in range(6)))
    u, x = sum(u, []), sum(x, [])
    for epoch in range(3):
        assert sorted(u[8 * epoch:8 * epoch + 8]) == few.unlabelled
    assert u[:8] != u[8:16] != u[16:]
    assert all(sorted(x[3 * i:3 * i + 3]) == few.labelled for i in range(8))


def test_unlabelled_images_never_need_a_mask(tmp_path):
    found = open_data("custom", custom(tmp_path))
    labelled, unlabelled = split_ids(found, "custom", None)
    assert not set(unlabelled) & found.masks.keys()
    item = TrainingDraws(found, labelled, unlabelled, 2, 16, seed=0)[0, 0]
    assert item["weak"].shape == (3, 16, 16)


def test_normalize_by_hand():
    pixel = torch.tensor([255, 0, 128], dtype=torch.uint8).reshape(1, 3, 1, 1)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    assert normalize(pixel).flatten().tolist() == pytest.approx(expected)


def test_masks_are_checked_again_where_they_are_read(tmp_path):
    root = custom(tmp_path, masks=8)
    found = open_data("custom", root)
    assert problems(found, found.labelled, []) == []
    save(root / "SegmentationClass" / "im1.png", np.full((12, 16), 9))
    with pytest.raises(InputError, match="im1.png: holds the ids 9, but there are 2 classes"):
        TrainingDraws(found, ["im1"], [], 2, 16, seed=0)[0, 0]
