"""Algorithm 1 a step at a time, and the real command: whole, killed, on several ranks, misused."""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import train
from augment import box_masks, random_boxes
from data import CUTMIX, PROTOCOLS, generator, normalize
from hardness import IGNORE, instance_hardness
from test_data import custom, save
from train import METRICS, parse_arguments, strong_views, supervised_loss, train_step, update_teacher

HERE = Path(__file__).parent
TINY = ("--backbone resnet18 --channels 16 --crop-size 32 --batch-size 4 --tau 0.3 --log-every 2 "
        "--weights none --no-amp").split()


def settings(*flags):
    args = parse_arguments([*TINY, *flags])
    args.iters = args.iters or 100
    return args


class TinyNetwork(nn.Module):
    """A convolution and a BatchNorm, which remembers how it was called."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.calls = []

    def forward(self, images):
        logits = self.norm(self.conv(images))
        self.calls.append((images.detach().clone(), logits.detach().clone(), self.training,
                           torch.is_grad_enabled()))
        return logits


def one_step(*flags, iteration=3, batch=4, **changes):
    """Runs train_step on tiny networks. Returns everything that one may want to look at."""
    args = settings(*flags)
    g = torch.Generator().manual_seed(1)
    images = lambda: torch.randint(0, 256, (batch, 3, 8, 8), generator=g, dtype=torch.uint8)
    valid = torch.ones(batch, 8, 8, dtype=torch.bool)
    valid[0, 5:] = False
    batch = {"x": images(), "y": torch.randint(0, 6, (batch, 8, 8), generator=g, dtype=torch.uint8),
             "weak": images(), "strong": images(), "valid": valid, **changes}
    batch["y"][0, :2] = IGNORE
    student, teacher = TinyNetwork(), TinyNetwork().eval().requires_grad_(False)
    with torch.no_grad():
        teacher.conv.weight.mul_(1.5)
    optimizer = torch.optim.SGD([{"params": student.parameters(), "initial_lr": 0.1}], lr=0.1)
    buffers = [b.clone() for b in teacher.buffers()]
    scalars, gamma = train_step(student, teacher, optimizer, batch, iteration, args)
    return dict(zip(METRICS, scalars.tolist())), gamma, student, teacher, batch, args, optimizer, buffers


def test_a_step_is_algorithm_1():
    values, gamma, student, teacher, batch, args, _, _ = one_step("--lambda-u", "2")
    (weak, z_s, *mode_s), (images, logits, *mode) = student.calls
    (weak_t, z_t, *mode_t), = teacher.calls
    # Lines 3 and 4: the weak views, without gradient, in evaluation mode (R8).
    assert weak.equal(weak_t) and weak.equal(normalize(batch["weak"]))
    assert mode_s == [False, False] and mode_t == [False, False]
    # Line 5.
    p_s, p_t = z_s.softmax(1), z_t.softmax(1)
    assert torch.allclose(gamma, instance_hardness(p_t, p_s, args.tau, batch["valid"]))
    assert 0 < gamma.mean() < 1
    # Line 7: one forward in training mode on the labelled images, A^I(u) and A^C(u).
    assert mode == [True, True] and len(images) == 12
    g = gamma[:, None, None, None]
    strong = normalize(batch["strong"])
    x, a_i, a_c = images.split(4)
    assert torch.allclose(a_i, g * weak + (1 - g) * strong, atol=1e-5)  # Eq. 8 with R1
    assert x.equal(normalize(batch["x"]))
    # Pseudo-labels, and Eq. 9 image by image, with the coin and the boxes of this iteration.
    confidence, labels = p_t.max(1)
    labels[(confidence < args.tau) | ~batch["valid"]] = IGNORE
    rng = generator(args.seed, CUTMIX, 3)
    fires = rng.random() > gamma.mean()
    masks = box_masks(random_boxes(4, 8, 8, rng), 8, 8)
    mixed, order = labels.clone(), gamma.argsort().tolist()
    for m in range(4):
        n = order[3 - order.index(m)]
        if fires:
            mixed[m] = torch.where(masks[m], labels[n], labels[m])
        expected = torch.where(masks[m] & fires, weak[n], weak[m])
        assert torch.allclose(a_c[m], expected, atol=1e-5)
    assert values["cutmix"] == fires
    # Eq. 3, 10 and 1, image by image.
    loss_x = loss_u = 0
    z_x, z_i, z_c = logits.split(4)
    for i in range(4):
        H = lambda z, y: F.cross_entropy(z[None], y[None].long(), ignore_index=255, reduction="sum")
        loss_x += H(z_x[i], batch["y"][i]) / 64 / 4
        loss_u += (1 - gamma[i]) / 2 * (H(z_i[i], labels[i]) + H(z_c[i], mixed[i])) / 64 / 4
    assert values["loss_x"] == pytest.approx(loss_x.item(), rel=1e-5)
    assert values["loss_u"] == pytest.approx(loss_u.item(), rel=1e-5) and loss_u > 0
    assert values["loss"] == pytest.approx((loss_x + 2 * loss_u).item(), rel=1e-5)
    assert values["hardness_mean"] == pytest.approx(gamma.mean().item())
    kept = (labels != IGNORE).sum() / batch["valid"].sum()
    assert values["confident"] == pytest.approx(kept.item()) and 0 < kept < 1


def test_padding_is_never_supervised():
    # R6. No pseudo-label of image 0 may lie below its fifth row, unless CutMix pasted it there.
    args = settings("--cutmix", "none", "--intensity", "none")
    _, _, student, _, batch, _, _, _ = one_step("--cutmix", "none", "--intensity", "none", "--tau", "0")
    labels = torch.zeros(4, 8, 8, dtype=torch.uint8)
    (view, same), = strong_views(batch, normalize(batch["weak"]), labels, torch.rand(4), 0, args)[0]
    assert same is labels and view.equal(normalize(batch["weak"]))
    seen = one_step("--cutmix", "none", "--intensity", "none", "--tau", "0")[0]["confident"]
    assert seen == 1  # of the valid pixels


@pytest.mark.parametrize("flags, views, weighted", [
    ("--loss standard --intensity none --cutmix none", 1, False),
    ("--loss hardness --intensity none --cutmix none", 1, True),
    ("--loss standard --intensity standard --cutmix none", 1, False),
    ("--loss standard --intensity hardness --cutmix none", 1, False),
    ("--loss standard --intensity none --cutmix standard", 1, False),
    ("--loss standard --intensity none --cutmix hardness", 1, False),
    ("--loss standard --intensity standard --cutmix standard", 2, False),
    ("--loss hardness --intensity hardness --cutmix hardness", 2, True)])
def test_the_rows_of_table_4(flags, views, weighted):
    values, gamma, student, _, batch, args, _, _ = one_step(*flags.split())
    images, logits, *_ = student.calls[-1]
    assert len(images) == 4 * (1 + views)
    if args.intensity == "standard":
        assert torch.allclose(images[4:8], normalize(batch["strong"]))
    if flags.endswith("--intensity none --cutmix none"):
        assert images[4:].equal(normalize(batch["weak"]))
        p_t = (TinyNetwork().eval().calls or [None])
    if views == 1 and args.cutmix == "none":
        p_t = one_step(*flags.split())[3].calls[0][1].softmax(1)
        confidence, labels = p_t.max(1)
        labels[(confidence < args.tau) | ~batch["valid"]] = IGNORE
        loss = F.cross_entropy(logits[4:], labels, ignore_index=255, reduction="none").mean((1, 2))
        weight = 1 - gamma if weighted else torch.ones(4)
        assert values["loss_u"] == pytest.approx((weight * loss).mean().item(), rel=1e-5)


def test_supervised_training_sees_labelled_images_alone():
    values, gamma, student, teacher, *_ = one_step("--supervised")
    assert gamma is None and len(student.calls) == 1 and not teacher.calls
    assert len(student.calls[0][0]) == 4 and values["loss"] == values["loss_x"] > 0
    assert values["loss_u"] == values["cutmix"] == 0


def cutmix_fires(gamma, *flags):
    args = settings(*flags)
    batch = {"weak": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
             "strong": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}
    weak, labels = normalize(batch["weak"]), torch.zeros(4, 8, 8, dtype=torch.uint8)
    return np.mean([bool(strong_views(batch, weak, labels, torch.full((4,), gamma), t, args)[1])
                    for t in range(400)])


@pytest.mark.parametrize("flags, probability", [
    ([], 0.8), (["--as-printed"], 0.2), (["--cutmix", "standard"], 0.5)])
def test_cutmix_fires_when_the_coin_is_higher_than_the_mean_hardness(flags, probability):
    assert cutmix_fires(0.2, *flags) == pytest.approx(probability, abs=0.06)  # R2


def test_cutmix_that_does_not_fire_leaves_the_weak_view(monkeypatch):
    # R7: at gamma-bar 1 no coin is higher, and the term stays, on A_w(u).
    g = torch.Generator().manual_seed(0)
    batch = {"weak": torch.randint(0, 256, (4, 3, 8, 8), generator=g, dtype=torch.uint8)}
    weak = normalize(batch["weak"])
    labels = torch.randint(0, 5, (4, 8, 8), generator=g, dtype=torch.uint8)
    (view, same), = strong_views(batch, weak, labels, torch.ones(4), 0,
                                 settings("--intensity", "none"))[0]
    assert view.equal(weak) and same.equal(labels)


def test_as_printed_reverses_eq_8():
    _, gamma, student, _, batch, *_ = one_step("--as-printed")
    g = gamma[:, None, None, None]
    weak, strong = normalize(batch["weak"]), normalize(batch["strong"])
    assert torch.allclose(student.calls[-1][0][4:8], g * strong + (1 - g) * weak, atol=1e-5)


def test_accumulation_gives_the_same_step_where_batchnorm_does_not_see_the_batch(monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))
    whole, _, student, *_ = one_step()
    parts, _, other, *_ = one_step("--accumulate", "2")
    assert [len(call[0]) for call in other.calls] == [4, 6, 6]
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(other.conv.weight, student.conv.weight)


def test_the_teacher_is_averaged_and_no_forward_changes_its_batchnorm():
    _, _, student, teacher, _, args, _, buffers = one_step(iteration=3)
    # R9: alpha = min(0.996, 1 - 1/4); the student's new statistics enter by a quarter.
    mean, var, count = buffers
    assert torch.allclose(teacher.norm.running_mean, 0.75 * mean + 0.25 * student.norm.running_mean)
    assert torch.allclose(teacher.norm.running_var, 0.75 * var + 0.25 * student.norm.running_var)
    assert teacher.norm.num_batches_tracked == count == 0 and student.norm.num_batches_tracked == 1
    assert not teacher.training


@pytest.mark.parametrize("iteration, alpha", [(0, 0), (1, 0.5), (9, 0.9), (248, 1 - 1 / 249),
                                              (249, 0.996), (250, 0.996), (10 ** 6, 0.996)])
def test_eq_2(iteration, alpha):
    student, teacher = TinyNetwork(), TinyNetwork()
    for p in student.parameters():
        nn.init.constant_(p, 1.0)
    for p in teacher.parameters():
        nn.init.constant_(p, 3.0)
    update_teacher(teacher, student, 0.996, iteration)
    for p in teacher.parameters():
        torch.testing.assert_close(p.data, torch.full_like(p, 3 * alpha + (1 - alpha)))


def test_the_learning_rate_decays_with_power_09():
    *_, optimizer, _ = one_step("--iters", "10", iteration=4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.6 ** 0.9)


def test_supervised_loss_by_hand():
    # Eq. 3: two pixels of two images cost log 2, two are void: 2 log 2 over all four pixels.
    logits, labels = torch.zeros(2, 2, 1, 2), torch.tensor([[[0, 255]], [[255, 1]]])
    assert supervised_loss(logits, labels, settings()).item() == pytest.approx(math.log(2) / 2)


def test_ohem_keeps_the_pixels_below_07_and_at_least_100000(monkeypatch):
    args = settings("--ohem")
    # 400 x 400 = 160,000 pixels: 20 hard ones (probability 0.5), the rest at 0.9.
    logits = torch.zeros(1, 2, 400, 400)
    logits[:, 0] = math.log(9)
    logits[0, 0, 0, :20] = 0
    labels = torch.zeros(1, 400, 400, dtype=torch.uint8)
    easy, hard = -math.log(0.9), math.log(2)
    # All easy pixels tie at the 100,000th place, so all of them are kept.
    expected = (20 * hard + (160_000 - 20) * easy) / 160_000
    assert supervised_loss(logits, labels, args).item() == pytest.approx(expected, rel=1e-4)
    # With 150,000 hard ones the easy ones are left out, and so is the void.
    logits[0, 0].view(-1)[:150_000] = 0
    labels.view(-1)[:1000] = IGNORE
    assert supervised_loss(logits, labels, args).item() == pytest.approx(hard, rel=1e-4)


def test_protocols_are_those_of_section_5():
    voc, city = parse_arguments(["--dataset", "voc"]), parse_arguments(["--dataset", "cityscapes"])
    row = lambda a: (a.crop_size, a.epochs, a.tau, a.encoder_lr, a.lr, a.weight_decay, a.batch_size,
                     a.lambda_u, a.ema, a.backbone, a.output_stride, a.window)
    assert row(voc) == (513, 80, 0.95, 0.001, 0.01, 1e-4, 16, 3, 0.996, "resnet50", 16, None)  # R10
    assert row(city) == (769, 240, 0.7, 0.01, 0.01, 5e-4, 16, 3, 0.996, "resnet50", 16, 769)
    assert PROTOCOLS["voc_classic"] == PROTOCOLS["voc"]
    scratch = parse_arguments(["--dataset", "voc", "--weights", "none", "--lr", "0.02"])
    assert (scratch.encoder_lr, scratch.lr) == (0.02, 0.02)


def compute_views(rank, world, port, out):
    """One rank's strong views of a global batch of 4, with hardness given."""
    if world > 1:
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank,
                                             world_size=world)
    g = torch.Generator().manual_seed(0)
    weak = torch.randint(0, 256, (4, 3, 16, 16), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 5, (4, 16, 16), generator=g, dtype=torch.uint8)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    gamma, views = torch.tensor([0.3, 0.1, 0.4, 0.2]), []
    args = parse_arguments(["--intensity", "none"])
    for iteration in range(12):
        batch = {"weak": weak[mine]}
        (view, fired) = strong_views(batch, normalize(weak[mine]), labels[mine], gamma, iteration, args)
        views.append((*view[0], fired))
    torch.save(views, f"{out}/{world}-{rank}.pt")


def test_pairs_coin_and_boxes_are_the_global_batchs_on_any_number_of_ranks(tmp_path):
    # R11: the shares of 2 and of 4 ranks, side by side, are what one process makes.
    context = multiprocessing.get_context("spawn")
    compute_views(0, 1, None, tmp_path)
    whole = torch.load(tmp_path / "1-0.pt")
    assert 0 < sum(bool(fired) for *_, fired in whole) < 12
    for world in (2, 4):
        port = 20000 + random.randrange(20000)
        ranks = [context.Process(target=compute_views, args=(r, world, port, tmp_path))
                 for r in range(world)]
        [p.start() for p in ranks]
        [p.join(60) for p in ranks]
        shares = [torch.load(tmp_path / f"{world}-{r}.pt") for r in range(world)]
        for iteration, (images, labels, fired) in enumerate(whole):
            assert torch.cat([s[iteration][0] for s in shares]).equal(images)
            assert torch.cat([s[iteration][1] for s in shares]).equal(labels)
            assert all(s[iteration][2] == fired for s in shares)
