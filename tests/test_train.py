"""Algorithm 1 a step at a time, and the real command: on several ranks, and misused."""

import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import evaluate
import train
from augment import box_masks, random_boxes
from batches import CUTMIX, generator, normalize
from data import InputError
from hardness import IGNORE, instance_hardness, pseudo_label
from model import DeepLabV3Plus
from run_folder import METRICS
from settings import PROTOCOLS, parse_arguments
from test_data import custom, save
from train import strong_views, supervised_loss, train_step, update_teacher

HERE = Path(__file__).parent.parent
TINY = ("--backbone resnet18 --channels 16 --crop-size 32 --batch-size 4 --tau 0.3 --log-every 2 "
        "--weights none --no-amp").split()
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


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


class AuxiliaryNetwork(TinyNetwork):
    """With auxiliary logits in training mode, three times the others."""
    def forward(self, images):
        logits = super().forward(images)
        return (logits, 3 * logits) if self.training else logits


def one_step(*flags, iteration=3, batch=4, network=None, wrap=lambda student: student, **changes):
    """Runs train_step on tiny networks. Returns everything that one may want to look at."""
    args = settings(*flags)
    g = torch.Generator().manual_seed(1)
    images = lambda: torch.randint(0, 256, (batch, 3, 8, 8), generator=g, dtype=torch.uint8)
    valid = torch.ones(batch, 8, 8, dtype=torch.bool)
    valid[0, 5:] = False
    batch = {"x": images(), "y": torch.randint(0, 6, (batch, 8, 8), generator=g, dtype=torch.uint8),
             "weak": images(), "strong": images(), "valid": valid, **changes}
    batch["y"][0, :2] = IGNORE
    network = network or TinyNetwork
    student, teacher = network(), network().eval().requires_grad_(False)
    with torch.no_grad():
        teacher.conv.weight.mul_(1.5)
    optimizer = torch.optim.SGD([{"params": student.parameters(), "initial_lr": 0.1}], lr=0.1)
    buffers = [b.clone() for b in teacher.buffers()]
    scalars, gamma = train_step(wrap(student), teacher, optimizer, batch, iteration, args)
    values = dict(zip(METRICS, scalars.tolist(), strict=True))
    return values, gamma, student, teacher, batch, args, optimizer, buffers


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
    assert values["cutmix_fired"] == fires
    # Eq. 3, 10 and 1, image by image.
    loss_x = loss_u = 0
    z_x, z_i, z_c = logits.split(4)
    for i in range(4):
        H = lambda z, y: F.cross_entropy(z[None], y[None].long(), ignore_index=255, reduction="sum")
        loss_x += H(z_x[i], batch["y"][i]) / 64 / 4
        loss_u += (1 - gamma[i]) / 2 * (H(z_i[i], labels[i]) + H(z_c[i], mixed[i])) / 64 / 4
    assert values["L_x"] == pytest.approx(loss_x.item(), rel=1e-5)
    assert values["L_u"] == pytest.approx(loss_u.item(), rel=1e-5) and loss_u > 0
    assert values["L"] == pytest.approx((loss_x + 2 * loss_u).item(), rel=1e-5)
    assert values["gamma"] == pytest.approx(gamma.mean().item())
    assert values["gamma_std"] == pytest.approx(np.std(gamma.numpy()))
    kept = [(labels[i] != IGNORE).sum() / batch["valid"][i].sum() for i in range(4)]
    assert values["confident"] == pytest.approx(sum(kept).item() / 4) and 0 < sum(kept) < 4


@pytest.mark.parametrize("flags, loss, loss_u, gamma, student_weights", [
    ("", 4.38544, 0.73615, 0.27553, 15.70088),
    ("--as-printed", 3.71777, 0.52157, 0.27553, 15.70283),
    ("--supervised", 2.13001, 0, 0, 15.71361),
    ("--loss standard --intensity standard --cutmix standard", 5.79147, 1.22426, 0.27553, 15.67283),
    ("--hardness loss", 2.95727, 0.26385, 0.64645, 15.70089),
    ("--hardness confidence", 4.61864, 0.81876, 0.22422, 15.69703),
    ("--ignore-background", 4.36149, 0.72803, 0.27705, 15.70063)])
def test_a_seeded_step_gives_what_it_always_gave(flags, loss, loss_u, gamma, student_weights):
    # No truth of their own: numbers that a change of form must leave (README, "Working on it").
    values, _, student, *_ = one_step(*flags.split())
    found = values["L"], values["L_u"], values["gamma"], student.conv.weight.abs().sum().item()
    assert found == pytest.approx((loss, loss_u, gamma, student_weights), abs=2e-5, rel=1e-5)


def test_padding_is_never_supervised():
    # R6. Image 0 has none below its fifth row, and no pseudo-label there.
    flags = "--cutmix none --intensity none --tau 0".split()
    assert one_step(*flags)[0]["confident"] == 1  # of the valid pixels
    # Nor where an image is all padding, or all but one pixel.
    valid = torch.ones(4, 8, 8, dtype=torch.bool)
    valid[1:3] = False
    valid[2, 0, 0] = True
    assert one_step(*flags, valid=valid)[0]["confident"] == 0.75


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
        assert values["L_u"] == pytest.approx((weight * loss).mean().item(), rel=1e-5)


def test_supervised_training_sees_labelled_images_alone():
    values, gamma, student, teacher, *_ = one_step("--supervised")
    assert gamma is None and len(student.calls) == 1 and not teacher.calls
    assert len(student.calls[0][0]) == 4 and values["L"] == values["L_x"] > 0
    assert values["L_u"] == values["cutmix_fired"] == 0


def test_supervised_training_takes_any_batch():
    values = one_step("--supervised", batch=2)[0]
    assert values["L"] == values["L_x"] > 0 and values["gamma"] == 0


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


def test_cutmix_that_does_not_fire_leaves_the_weak_view():
    # R7: at gamma-bar 1 no coin is higher, and the term stays, on A_w(u).
    g = torch.Generator().manual_seed(0)
    batch = {"weak": torch.randint(0, 256, (4, 3, 8, 8), generator=g, dtype=torch.uint8)}
    weak = normalize(batch["weak"])
    labels = torch.randint(0, 5, (4, 8, 8), generator=g, dtype=torch.uint8)
    (view, same, weight), = strong_views(batch, weak, labels, torch.ones(4), 0,
                                 settings("--intensity", "none"))[0]
    assert view.equal(weak) and same.equal(labels) and weight == 1


def test_as_printed_reverses_eq_8():
    _, gamma, student, _, batch, *_ = one_step("--as-printed")
    g = gamma[:, None, None, None]
    weak, strong = normalize(batch["weak"]), normalize(batch["strong"])
    assert torch.allclose(student.calls[-1][0][4:8], g * strong + (1 - g) * weak, atol=1e-5)


@pytest.mark.parametrize("gamma, weights", [(1.0, [1, 0]), (0.0, [0.5, 0.5])])
def test_as_released_leaves_out_the_term_of_a_cutmix_that_does_not_fire(gamma, weights):
    # At gamma-bar 1 no coin is higher, at 0 each is.
    batch = {name: torch.zeros(4, 3, 8, 8, dtype=torch.uint8) for name in ("weak", "strong")}
    weak, labels = normalize(batch["weak"]), torch.zeros(4, 8, 8, dtype=torch.uint8)
    views, _ = strong_views(batch, weak, labels, torch.full((4,), gamma), 0, settings("--as-released"))
    assert [float(weight) for *_, weight in views] == weights


def test_as_released_gives_a_single_view_all_the_weight():
    batch = {"weak": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}
    weak, labels = normalize(batch["weak"]), torch.zeros(4, 8, 8, dtype=torch.uint8)
    (view,), fired = strong_views(batch, weak, labels, torch.zeros(4), 0,
                                  settings("--as-released", "--intensity", "none"))
    assert fired == 1 and view[2] == 1


def test_as_released_is_what_the_authors_code_does_on_each_data_set():
    flags = "ignore_background", "multi_grid", "ohem", "aux"
    for dataset, street in (("voc", False), ("cityscapes", True)):
        args = parse_arguments(["--dataset", dataset, "--as-released"])
        assert [getattr(args, flag) for flag in flags] == [True, True, street, street]
    with pytest.raises(InputError, match="--as-released: not allowed with argument --as-printed"):
        parse_arguments(["--as-printed", "--as-released"])


@pytest.mark.parametrize("iteration, fires", [(3, True), (5, False)])
def test_as_released_by_hand(iteration, fires):
    # Class 0 out of wIoU; L_u is the mean of both terms where CutMix fired, else the intensity's alone.
    values, gamma, student, teacher, batch, args, *_ = one_step("--as-released", iteration=iteration)
    p_s, p_t = student.calls[0][1].softmax(1), teacher.calls[0][1].softmax(1)
    assert torch.allclose(gamma, instance_hardness(p_t, p_s, args.tau, batch["valid"], ignore_class=0))
    labels = pseudo_label(p_t, args.tau, batch["valid"])
    (_, mixed, _), = strong_views(batch, normalize(batch["weak"]), labels, gamma, iteration,
                                  settings("--intensity", "none"))[0]
    terms = [F.cross_entropy(logits, y.long(), ignore_index=255, reduction="none").mean((1, 2))
             for logits, y in zip(student.calls[1][1].split(4)[1:], (labels, mixed))]
    expected = (1 - gamma) * (sum(terms) / 2 if fires else terms[0])
    assert values["cutmix_fired"] == fires and values["L_u"] == pytest.approx(expected.mean().item())


def test_accumulation_gives_the_same_step_where_batchnorm_does_not_see_the_batch(monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))
    whole, _, student, *_ = one_step()
    parts, _, other, *_ = one_step("--accumulate", "2")
    assert [len(call[0]) for call in other.calls] == [2, 2, 6, 6]  # the passes without gradient too
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(other.conv.weight, student.conv.weight)


def test_logits_are_let_go_before_the_backward_pass(monkeypatch):
    # At the paper's size they are 0.6 GiB that backward does not need.
    logits, seen = [], []

    class Watched(TinyNetwork):
        def forward(self, images):
            out = super().forward(images)
            if torch.is_grad_enabled():
                logits.append(weakref.ref(out))
            return out

    backward = torch.Tensor.backward
    monkeypatch.setattr(sys.modules[__name__], "TinyNetwork", Watched)
    monkeypatch.setattr(torch.Tensor, "backward",
                        lambda loss: (seen.append([ref() for ref in logits]), backward(loss)))
    one_step("--accumulate", "2")
    assert seen == [[None], [None, None]]


def test_a_step_starts_without_the_gradients_of_the_step_before():
    _, _, student, teacher, batch, args, optimizer, _ = one_step()
    fresh, its_teacher = TinyNetwork(), TinyNetwork().eval().requires_grad_(False)
    fresh.load_state_dict(student.state_dict())
    its_teacher.load_state_dict(teacher.state_dict())
    its_optimizer = torch.optim.SGD([{"params": fresh.parameters(), "initial_lr": 0.1}], lr=0.1)
    train_step(student, teacher, optimizer, batch, 4, args)
    train_step(fresh, its_teacher, its_optimizer, batch, 4, args)
    assert all(a.equal(b) for a, b in zip(student.parameters(), fresh.parameters()))


def test_the_auxiliary_loss_is_added_to_eq_3_with_weight_04():
    values, _, student, _, batch, *_ = one_step("--supervised", "--aux", network=AuxiliaryNetwork)
    H = lambda z: F.cross_entropy(z, batch["y"].long(), ignore_index=255, reduction="sum").item() / 256
    logits = student.calls[0][1]
    assert values["L_x"] == pytest.approx(H(logits) + 0.4 * H(3 * logits), rel=1e-5)
    # Unlabelled images have none: the labelled ones are the first of each batch.
    values, _, student, _, batch, *_ = one_step("--aux", network=AuxiliaryNetwork)
    logits = student.calls[1][1][:4]
    assert values["L_x"] == pytest.approx(H(logits) + 0.4 * H(3 * logits), rel=1e-5)


def test_ranks_add_their_gradients_once_when_all_micro_batches_are_done(tmp_path):
    # Real DDP, whose hook sees what the ranks would add: all of a step's gradient, of which it makes half.
    def wrap(student):
        ranked = DistributedDataParallel(student)
        ranked.register_comm_hook(None, halve)
        return ranked

    def halve(_, bucket):
        seen.append(bucket.buffer().clone())
        done = torch.futures.Future()
        done.set_result(bucket.buffer() / 2)
        return done

    seen = []
    _, _, alone, *_ = one_step("--accumulate", "2")
    whole = [p.grad.clone() for p in alone.parameters()]
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        _, _, student, *_ = one_step("--accumulate", "2", wrap=wrap)
    finally:
        torch.distributed.destroy_process_group()
    assert len(seen) == 1
    for parameter, gradient in zip(student.parameters(), whole):
        torch.testing.assert_close(parameter.grad, gradient / 2)


@pytest.mark.parametrize("ranks, cuda, averaged", [(2, False, True), (2, True, False), (1, False, False)])
def test_ranks_without_syncbatchnorm_average_their_buffers_before_the_teacher_takes_them(
        monkeypatch, ranks, cuda, averaged):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(train, "world_size", lambda: ranks)
    monkeypatch.setattr(train, "average_buffers", lambda network: network.norm.running_mean.fill_(7))
    _, _, student, teacher, _, _, _, buffers = one_step(iteration=3)
    assert (student.norm.running_mean == 7).all() == averaged
    expected = 0.75 * buffers[0] + 0.25 * student.norm.running_mean
    torch.testing.assert_close(teacher.norm.running_mean, expected)


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


def test_ohem_keeps_the_pixels_below_07_and_at_least_100000():
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
    # Where fewer than 100,000 are not void, the void does not fill their places.
    labels.view(-1)[:149_990] = labels.view(-1)[150_030:] = IGNORE
    assert supervised_loss(logits, labels, args).item() == pytest.approx((hard + 3 * easy) / 4, rel=1e-4)
    # In two micro-batches it is 50,000 of each: here 60,000 of a probability of 0.75, else easy ones too.
    labels.zero_()
    logits[0, 0] = math.log(9)
    logits[0, 0].view(-1)[:60_000] = math.log(3)
    mean = (60_000 * -math.log(0.75) + 100_000 * easy) / 160_000
    for parts, expected in (("1", mean), ("2", -math.log(0.75))):
        args = settings("--ohem", "--accumulate", parts)
        assert supervised_loss(logits, labels, args).item() == pytest.approx(expected, rel=1e-4)


def test_ohem_counts_pixels_exactly():
    # 160,000 pixels of evenly rising probability, in float64 so that no two are equal: easy, then hard.
    labels = torch.zeros(1, 400, 400, dtype=torch.uint8)
    for low in (1.0, 0.0):
        logits = torch.zeros(1, 2, 400, 400, dtype=torch.float64)
        logits[0, 0] = torch.linspace(low, low + 1, 160_000, dtype=torch.float64).view(400, 400)
        below = (logits.softmax(1)[:, 0] < 0.7).sum().item()
        logits.requires_grad_()
        supervised_loss(logits, labels, settings("--ohem")).backward()
        assert (logits.grad[0, 0] != 0).sum() == max(100_000, below)
    # All void, and all but one pixel.
    labels.fill_(IGNORE)
    assert supervised_loss(logits, labels, settings("--ohem")) == 0
    labels[0, 0, 0] = 0
    assert supervised_loss(logits, labels, settings("--ohem")).item() == pytest.approx(math.log(2))


def test_protocols_are_those_of_section_5():
    voc, city = parse_arguments(["--dataset", "voc"]), parse_arguments(["--dataset", "cityscapes"])
    row = lambda a: (a.crop_size, a.epochs, a.tau, a.encoder_lr, a.lr, a.weight_decay, a.batch_size,
                     a.lambda_u, a.ema, a.backbone, a.output_stride, a.window)
    assert row(voc) == (513, 80, 0.95, 0.001, 0.01, 1e-4, 16, 3, 0.996, "resnet50", 16, None)  # R10
    assert row(city) == (769, 240, 0.7, 0.01, 0.01, 5e-4, 16, 3, 0.996, "resnet50", 16, 769)
    assert PROTOCOLS["voc_classic"] == PROTOCOLS["voc"]
    scratch = parse_arguments(["--dataset", "voc", "--weights", "none", "--lr", "0.02"])
    assert (scratch.encoder_lr, scratch.lr) == (0.02, 0.02)


def compute_views(rank, world, out):
    """One rank's strong views of a global batch of 4, with hardness given."""
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{out}/meet-{world}", rank=rank,
                                             world_size=world)
    g = torch.Generator().manual_seed(0)
    weak = torch.randint(0, 256, (4, 3, 16, 16), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 5, (4, 16, 16), generator=g, dtype=torch.uint8)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    gamma, views = torch.tensor([0.3, 0.1, 0.4, 0.2]), []
    args = parse_arguments(["--intensity", "none"])
    for iteration in range(12):
        batch = {"weak": weak[mine]}
        (view,), fired = strong_views(batch, normalize(weak[mine]), labels[mine], gamma, iteration, args)
        views.append((*view[:2], fired))
    torch.save(views, f"{out}/{world}-{rank}.pt")


@pytest.mark.slow
def test_pairs_coin_and_boxes_are_the_global_batchs_on_any_number_of_ranks(tmp_path):
    # R11: the shares of 4 ranks, side by side, are what one process makes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "pytest"])  # imported once for all four
    compute_views(0, 1, tmp_path)
    whole = torch.load(tmp_path / "1-0.pt")
    assert 0 < sum(bool(fired) for *_, fired in whole) < 12
    ranks = [context.Process(target=compute_views, args=(rank, 4, tmp_path)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    shares = [torch.load(tmp_path / f"4-{rank}.pt") for rank in range(4)]
    for iteration, (images, labels, fired) in enumerate(whole):
        assert torch.cat([s[iteration][0] for s in shares]).equal(images)
        assert torch.cat([s[iteration][1] for s in shares]).equal(labels)
        assert all(s[iteration][2] == fired for s in shares)


# The real command. TINY on the embedded data set takes seconds.

def launch(*flags, ranks=None, script="train.py", **options):
    """Run the real command, under torchrun if `ranks` is given. A GPU is hidden: equal bits are promised
    without one, and two ranks need two."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={ranks}"] if ranks else [sys.executable]
    return subprocess.run([*starter, str(HERE / script), *map(str, flags)], capture_output=True,
                          text=True, timeout=300, cwd=HERE,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | HIDDEN, **options)


def lines(out, name="metrics.jsonl"):
    """The records of a run without what the clock gave, and without the single classes."""
    records = [json.loads(line) for line in (Path(out) / name).read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "images_per_second" and not k.startswith("iou")}
            for record in records]


FROZEN = """
import sys; sys.path.insert(0, {here!r})
from torch import nn
nn.modules.batchnorm._BatchNorm.train = lambda self, mode=True: nn.Module.train(self, False)
import train
if __name__ == "__main__":
    train.main()
"""


@pytest.mark.slow
def test_nothing_depends_on_ranks_workers_or_accumulation(tmp_path):
    # With BatchNorm in evaluation mode: its own statistics are those of a rank's share on a CPU. Some crops
    # are padded, and the weights come from a file, which rank 0 alone reads.
    script, weights = tmp_path / "frozen.py", tmp_path / "weights.pth"
    script.write_text(FROZEN.format(here=str(HERE)))
    torch.save(DeepLabV3Plus(5, "resnet18", channels=16).state_dict(), weights)
    runs = {"one": ([], None), "two": (["--workers", 1, "--accumulate", 2], 2),
            "workers": (["--workers", 2], None)}
    run = lambda name: launch(*TINY, "--iters", 4, "--out", tmp_path / name, "--log-every", 1, "--lr", 0.001,
                              "--weights", weights, "--scale", 0.6, 1.25, *runs[name][0],
                              ranks=runs[name][1], script=script)
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run, runs):
            assert result.returncode == 0, result.stderr
    table = lambda name: [line.rsplit(",", 1) for line in
                          (tmp_path / name / "hardness.csv").read_text().splitlines()[1:]]
    for name in ("two", "workers"):
        assert [place for place, _ in table(name)] == [place for place, _ in table("one")]
        np.testing.assert_allclose([float(gamma) for _, gamma in table(name)],
                                   [float(gamma) for _, gamma in table("one")], atol=2e-4)
        for ours, theirs in zip(lines(tmp_path / name), lines(tmp_path / "one")):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5)
    assert lines(tmp_path / "workers") == lines(tmp_path / "one")


# Nothing is silently wrong: (what is done to a good folder of own data, the flags, what is said).

def replace(path, text):
    path.write_text(text)


def code_file(path):
    class Code:
        def __reduce__(self):
            return (open, (str(path) + ".ran", "w"))
    torch.save({"conv1.weight": Code()}, path)


LISTS = "ImageSets/Segmentation"
CASES = {
    "no root": (None, "--data-root {root}/absent", "--data-root .*absent: no such folder"),
    "no images folder": (lambda r: (r / "JPEGImages").rename(r / "photos"), "", "neither JPEGImages/ nor"),
    "no class names": (lambda r: (r / "class_names.txt").unlink(), "", "class_names.txt: missing or"),
    "blank line in class names": (lambda r: replace(r / "class_names.txt", "sky\n\nroad\n"), "",
                                  "class_names.txt: from 2 to 255 lines are needed, not 3"),
    "one class": (lambda r: replace(r / "class_names.txt", "sky\n"), "", "class_names.txt: from 2 to 255"),
    "16-bit photograph": (lambda r: Image.fromarray(np.zeros((12, 16), np.uint16)).save(
        ((r / "JPEGImages/im7.jpg").unlink(), r / "JPEGImages/im7.png")[1]), "", "im7.png: has more than 8"),
    "empty class names": (lambda r: replace(r / "class_names.txt", "\n"), "", "class_names.txt: missing or"),
    "image missing": (lambda r: replace(r / LISTS / "train.txt", "im0\nim7\nx1\nx2\nx3\nx4\n"), "",
                      "listed images are missing .4.: x1, x2, x3 and 1 more"),
    "validation image missing": (lambda r: (r / "JPEGImages/im5.jpg").unlink(), "", "missing .1.: im5"),
    "validation mask missing": (lambda r: (r / "SegmentationClass/im5.png").unlink(), "",
                                "images .* have no mask .1.: im5"),
    "labelled without mask": (lambda r: replace(r / "list.txt", "im0\nim8\n"), "--split {root}/list.txt",
                              "have no mask .1.: im8"),
    "mask of another size": (lambda r: save(r / "SegmentationClass/im1.png", np.zeros((5, 9))), "",
                             "im1.png: 9 x 5 pixels, but its image .* has 16 x 12"),
    "mask with strange ids": (lambda r: save(r / "SegmentationClass/im1.png", np.full((12, 16), 7)), "",
                              "im1.png: holds the ids 7, but there are 2 classes"),
    "mask in colour": (lambda r: save(r / "SegmentationClass/im1.png", np.zeros((12, 16, 3))), "",
                       "im1.png: in colour, not one channel of class ids; .* --colours$"),
    "CVAT's colours": (lambda r: replace(r / "labelmap.txt", "sky:1,2,3::"), "",
                       r"lacks: \(1,1,1\) .*; add a line for each there"),
    "no unlabelled image": (lambda r: [(r / f"JPEGImages/im{i}.jpg").unlink() for i in range(6, 10)], "",
                            "no unlabelled image is left"),
    "no labelled image": (lambda r: [(r / f"SegmentationClass/im{i}.png").unlink() for i in range(4)], "",
                          "no labelled image"),
    "ids listed twice": (lambda r: replace(r / "list.txt", "im0\nim1\nim0\n"), "--split {root}/list.txt",
                         "list.txt: ids listed twice: im0"),
    "val among train": (lambda r: replace(r / LISTS / "train.txt", "im0\nim4\nim7\n"), "",
                        "validation images are among the training ones .1.: im4"),
    "val among labelled": (lambda r: replace(r / "list.txt", "im0\nim5\n"), "--split {root}/list.txt",
                           "not in custom's training set .1.: im5; take those of"),
    "unknown ids": (lambda r: replace(r / "list.txt", "im0\n../../etc/passwd\n"),
                    "--split {root}/list.txt", "not in custom's training set .1.: passwd"),
    "no such split": (None, "--split 1_32", "--split 1_32: custom has no such split"),
    "empty val list": (lambda r: replace(r / LISTS / "val.txt", ""), "", "val.txt: is empty; write"),
    "empty split": (lambda r: replace(r / "list.txt", "# none\n"), "--split {root}/list.txt",
                    "list.txt: is empty; write one id per line"),
    "not a photograph": (lambda r: replace(r / "JPEGImages/im7.jpg", "hello"), "", "im7.jpg: cannot be read"),
    "two files for one id": (lambda r: save(r / "JPEGImages/im7.png", np.zeros((2, 2))), "",
                             "have one name; rename one"),
    "no weights": (None, "--weights {root}/absent.pth", "absent.pth: no such file"),
    "no weights' file": (lambda r: replace(r / "w.pth", "hello"), "--weights {root}/w.pth",
                         "w.pth: not a file of"),
    "weights with code": (lambda r: code_file(r / "w.pth"), "--weights {root}/w.pth", "weights_only=True"),
    "other weights": (lambda r: torch.save({"conv1.weight": torch.zeros(1)}, r / "w.pth"),
                      "--weights {root}/w.pth", "hold no ResNet by torchvision's names"),
    "crop too small": (None, "--crop-size 31", "--crop-size 31: too small for an output stride of 16"),
    "tau": (None, "--tau 1.5", "--tau 1.5: a probability"),
    "alpha": (None, "--ema 1", "--ema 1.0: at least 0 and below 1"),
    "scale": (None, "--scale 2 0.5", "--scale 2.0 0.5: two factors"),
    "rate": (None, "--lr 0", "--lr 0.0: above 0"),
    "infinite": (None, "--lambda-u inf", "--lambda-u inf: at least 0, and finite"),
    "an infinite range": (None, "--scale 1 inf", "--scale inf: above 0, and finite"),
    "no checkpoints": (None, "--checkpoint-every 0", "--checkpoint-every 0: at least 1"),
    "batch of one": (None, "--batch-size 1", "--batch-size 1: BatchNorm needs two"),
    "uneven accumulation": (None, "--accumulate 3", "give a multiple of 3, or another --acc"),
    "more accumulation than images": (None, "--accumulate 8", "give a multiple of 8"),
    "one image at a time": (None, "--supervised --accumulate 4", "one image at a time, .* give 8"),
    "unknown flag": (None, "--taus 1", "unrecognized arguments: --taus"),
    "unknown data set": (None, "--dataset ade20k", "invalid choice: 'ade20k'"),
    "no number": (None, "--tau high", "argument --tau: invalid float value: 'high'"),
    "epochs and iters": (None, "--epochs 2", "--epochs: not allowed with argument --iters"),
    "folder is a file": (lambda r: replace(r / "f", ""), "--out {root}/f", "--out .*/f: cannot be used"),
    "checkpoint is none": (lambda r: ((r / "o").mkdir(), replace(r / "o/last.pth", "x")), "--out {root}/o",
                           "o/last.pth: cannot be read as a checkpoint"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line_before_training_starts(case, tmp_path, capsys):
    spoil, flags, message = CASES[case]
    root = custom(tmp_path / "data")
    if spoil:
        spoil(root)
    flags = ["--dataset", "custom", "--data-root", root, *TINY, "--iters", 2, "--out", tmp_path / "out",
             *flags.format(root=root).split()]
    with pytest.raises(SystemExit) as end:
        train.main([str(f) for f in flags])
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert err.startswith("train.py: ") and re.search(message, err), err
    assert len(err.splitlines()) <= 2 and "Traceback" not in err
    assert not list(tmp_path.glob("**/*.ran")) and not (tmp_path / "out" / "metrics.jsonl").exists()


def test_more_elements_than_an_int_holds_get_the_line_for_memory(monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("upsample_bilinear2d_nhwc only supports output tensors with less than INT_MAX "
                           "elements, but got [48, 171, 513, 513]")
    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(SystemExit) as end:
        train.main(TINY)
    assert end.value.code == 1 and "raise --accumulate" in capsys.readouterr().err


def test_processes_that_do_not_know_each_other_are_bad_input(capsys, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for command in (train, evaluate):
        with pytest.raises(SystemExit) as end:
            command.main(["absent.pth"] if command is evaluate else [])
        assert end.value.code == 2 and "start with torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_that_cannot_share_a_batch_say_so_once():
    result = launch(*TINY, "--batch-size", 5, ranks=2)
    said = [line for line in result.stderr.splitlines() if "train.py: " in line]
    assert result.returncode != 0 and len(said) == 1 and "give a multiple of 2, or" in said[0]


OTHER_NETWORK = """
import sys; sys.path.insert(0, {here!r})
import model
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes, backbone, output_stride, channels, weights=None, aux=False,
                 multi_grid=False):
        super().__init__()
        self.encoder = nn.Conv2d(3, channels, 3, padding=1)
        self.head = nn.Conv2d(channels, num_classes, 1)
    def forward(self, images):
        return self.head(self.encoder(images).relu())
    def encoder_parameters(self):
        return self.encoder.parameters()

model.DeepLabV3Plus = Small
import {script}
if __name__ == "__main__":
    {script}.main()
"""


@pytest.mark.slow
def test_another_network_takes_the_place_of_the_models(tmp_path):
    for script, flags in (("train", [*TINY, "--iters", 2, "--out", tmp_path / "out"]),
                          ("evaluate", [tmp_path / "out" / "last.pth"])):
        (tmp_path / "own.py").write_text(OTHER_NETWORK.format(here=str(HERE), script=script))
        result = launch(*flags, script=tmp_path / "own.py")
        assert result.returncode == 0 and "mean IoU" in result.stdout, result.stderr
    assert {name.split(".")[0] for name in torch.load(
        tmp_path / "out" / "last.pth", weights_only=True)["teacher"]} == {"encoder", "head"}


ALONE = {
    "model": "model.DeepLabV3Plus(3, 'resnet18', channels=16).eval()(torch.ones(1, 3, 32, 32))",
    "hardness": "p = torch.rand(2, 3, 4, 4).softmax(1); hardness.instance_hardness(p, p, .5)",
    "augment": "augment.hard_easy_pairs(torch.rand(4))",
    "shapes": "shapes.draw_shapes('train_000')",
    "ranks": "ranks.together(print)"}


@pytest.mark.slow
def test_pieces_work_alone_in_an_empty_folder(tmp_path):
    script = "import sys, torch"
    for piece, use in ALONE.items():
        (tmp_path / piece).mkdir()
        shutil.copy(HERE / f"{piece}.py", tmp_path / piece)
        script += f"\nsys.path[0] = {piece!r}; import {piece}; {use}; del sys.modules[{piece!r}]"
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr
