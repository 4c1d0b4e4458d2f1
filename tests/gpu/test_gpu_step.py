"""A step on a GPU: equal to the CPU's, never waiting for the host, within the computed memory."""

import gc
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import augment
import hardness
import train
from batches import TrainingDraws, normalize, training_batches
from data import IGNORE, open_data, split_ids
from settings import parse_arguments, step_memory
from test_memory import counted_peak
from test_train import TinyNetwork

CLASSES, FAKE = 6, FakeTensorMode()
ROWS = ["--loss standard --intensity none --cutmix none",
        "--loss standard --intensity standard --cutmix none",
        "--loss standard --intensity none --cutmix standard",
        "--loss standard --intensity standard --cutmix standard", "--supervised", ""]  # of Table 4


def settings(flags, device):
    args = parse_arguments(f"--backbone resnet18 --channels 32 --crop-size 49 --batch-size 4 --weights none "
                           f"--no-amp --tau 0.5 --iters 100 {flags}".split())
    args.cuda = device.type == "cuda"
    return args


def make_batch(size, crop):
    draw, side = torch.Generator().manual_seed(0), crop // 5 + 1

    def images():
        tiles = torch.randint(0, 256, (size, 3, 5, 5), generator=draw, dtype=torch.uint8)
        return tiles.repeat_interleave(side, 2).repeat_interleave(side, 3)[..., :crop, :crop]

    batch = {"x": images(), "weak": images(), "strong": images(),
             "y": torch.randint(0, CLASSES, (size, crop, crop), generator=draw, dtype=torch.uint8),
             "valid": torch.ones(size, crop, crop, dtype=torch.bool)}
    batch["y"][0, :9] = IGNORE
    return batch


def build(args, device, classes=CLASSES):
    """(student, teacher, optimizer) of train.py, with the same weights on any device. Both are surer than new
    networks, so that some pixels reach tau, and differ."""
    student, _, teacher, optimizer = train.build_networks(args, classes, device)
    last_s, last_t = student.decoder[-1].weight, teacher.decoder[-1].weight
    noise = torch.randn(last_t.shape, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        last_t.add_(noise, alpha=0.05).mul_(100)
        last_s.mul_(100)
    return student, teacher, optimizer


def on(device, batch):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def certain(student, teacher, weak, tau, margin):
    """Where rounding cannot tip a pixel's class, or whether it reaches tau, in either network: (B, H, W)."""
    sure = True
    with torch.no_grad():
        for network in (student.eval(), teacher):
            first, second = network(normalize(weak)).softmax(1).topk(2, dim=1).values.unbind(1)
            sure = sure & (first - second > margin) & ((first - tau).abs() > margin)
    student.train()
    return sure


def a_step(args, device, batch):
    """(scalars, gamma, gradient) of a step, on the CPU."""
    student, teacher, optimizer = build(args, device)
    scalars, gamma = train.train_step(student, teacher, optimizer, on(device, batch), 3, args)
    return scalars.cpu(), gamma.cpu(), torch.cat([p.grad.flatten().cpu() for p in student.parameters()])


@pytest.mark.parametrize("flags", ["--accumulate 2", *(pytest.param(flags, marks=pytest.mark.slow)
                                                       for flags in ("", "--hardness loss --aux --ohem"))])
def test_a_step_is_the_cpus_in_float32(flags, device):
    cpu = torch.device("cpu")
    args, batch = settings(flags, device), make_batch(4, 49)
    student, teacher, _ = build(args, cpu)
    batch["valid"] = certain(student, teacher, batch["weak"], args.tau, 1e-3)
    assert 0.2 < batch["valid"].float().mean() < 1
    expected, expected_gamma, expected_gradient = a_step(settings(flags, cpu), cpu, batch)
    scalars, gamma, gradient = a_step(args, device, batch)
    torch.testing.assert_close(scalars, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gamma, expected_gamma, rtol=1e-4, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()
    assert expected[2] > 0 and 0.1 < expected_gamma.mean() < 0.95, expected_gamma  # L_u


def test_a_step_is_near_the_cpus_in_bf16(device):
    cpu = torch.device("cpu")
    batch = make_batch(4, 49)
    student, teacher, _ = build(settings("", cpu), cpu)
    batch["valid"] = certain(student, teacher, batch["weak"], 0.5, 0.05)
    expected, *_ = a_step(settings("", cpu), cpu, batch)
    scalars, *_ = a_step(settings("--amp", device), device, batch)
    assert scalars[0] != expected[0] and scalars[0].item() == pytest.approx(expected[0].item(), rel=0.02)


class NoTransfers(TorchDispatchMode):
    """Refuses what would wait for a GPU on the way to or from it, and fake tensors allow."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            there, waits = result.device.type == "cuda", not kwargs.get("non_blocking")
            if source.device.type != result.device.type and (waits or not there):
                raise RuntimeError(f"called a synchronizing operation: {function}")
        return result


@contextmanager
def never_waiting(device):
    """Within it, an operation that would wait for the GPU raises an error; without one, on fake tensors."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with FAKE, NoTransfers():
            yield


def make_step(flags, device, monkeypatch):
    """A function that takes a step on the GPU, warm. Without a GPU the tensors are fake, and said to lie on
    one; torch has neither a backward pass nor a fused SGD for those."""
    args = settings(flags, torch.device("cuda"))
    batch = make_batch(4, 9)
    if device.type == "cuda":
        student, teacher = TinyNetwork().to(device), TinyNetwork().to(device).eval().requires_grad_(False)
        batch = on(device, batch)
    else:
        def backward(loss):
            for parameter in student.parameters():
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        fake = lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda")
        with FAKE:
            student, teacher = TinyNetwork(), TinyNetwork().eval()
            for network in (student, teacher):
                network.load_state_dict({k: fake(v) for k, v in network.state_dict().items()}, assign=True)
            teacher.requires_grad_(False)
            batch = {name: fake(tensor) for name, tensor in batch.items()}
    optimizer = torch.optim.SGD([{"params": student.parameters(), "initial_lr": 0.1}], 0.1, momentum=0.9,
                                fused=device.type == "cuda")
    step = lambda: train.train_step(student, teacher, optimizer, batch, 1, args)
    if device.type == "cuda":
        step()
    return step


@pytest.mark.skipif(torch.__version__ < "2.14" and not torch.cuda.is_available(),
                    reason="torch 2.6 asks a GPU even for fake convolutions")
class TestNoStepWaits:
    @pytest.mark.parametrize("flags", [*ROWS, "--accumulate 2", "--as-released", "--as-printed",
                                       "--hardness confidence --ohem", "--hardness loss"])
    def test_for_the_host(self, flags, device, monkeypatch):
        step = make_step(flags, device, monkeypatch)
        with never_waiting(device):
            step()

    @pytest.mark.parametrize("spoil", [
        lambda gamma: gamma * gamma.mean().item(), lambda gamma: gamma if gamma.any() else gamma,
        lambda gamma: gamma.cpu().to(gamma.device, non_blocking=True),
        lambda gamma: gamma * torch.tensor([0.5] * 4).to(gamma.device),
        lambda gamma: gamma * torch.tensor([0.5] * 4), lambda gamma: gamma[gamma > 0.5].sum() + gamma])
    def test_unless_it_is_spoilt(self, spoil, device, monkeypatch):
        phi = train.phi
        monkeypatch.setattr(train, "phi", lambda *args: phi(*args))
        step = make_step("", device, monkeypatch)
        monkeypatch.setattr(train, "phi", lambda *args: spoil(phi(*args)))
        with pytest.raises(Exception, match="synchronizing|_local_scalar_dense|nonzero|device"), \
                never_waiting(device):
            step()


def measured_peak(flags, device):
    """GiB at the peak of a step, by the GPU's allocator, or counted on fake tensors."""
    if device.type == "cpu":
        return counted_peak(flags)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    args = parse_arguments(["--dataset=voc", "--weights=none", "--iters=100", *flags.split()])
    networks = build(args, device, 21)
    batch = on(device, make_batch(args.batch_size, args.crop_size))
    for _ in range(3):  # the first tries cuDNN's algorithms, and makes the momentum
        torch.cuda.reset_peak_memory_stats()
        train.train_step(*networks, batch, 1, args)
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def test_memory_is_what_was_computed_and_falls_with_accumulate(device):
    flags = ("--amp --backbone=resnet50 --crop-size=257" if device.type == "cuda"
             else "--amp --backbone=resnet18 --channels=64 --crop-size=129")
    peaks = {}
    for accumulate in (1, 4):
        some = f"{flags} --accumulate={accumulate}"
        peaks[accumulate] = measured_peak(some, device)
        computed = step_memory(parse_arguments(["--dataset=voc", *some.split()]))
        print(f"--accumulate {accumulate}: {peaks[accumulate]:.2f} GiB, computed {computed:.2f}")
        assert peaks[accumulate] == pytest.approx(computed, rel=0.15)
    assert peaks[4] < 0.6 * peaks[1]


def test_networks_and_batches_are_channels_last(device):
    args = settings("--batch-size 2", device)
    data = open_data("shapes", "")
    draws = TrainingDraws(data, *split_ids(data, "shapes", "1_16"), 2, 65, 0)
    batch = on(device, next(training_batches(draws, range(2), 0, 1, 0)))
    joined = []
    for network in build(args, device)[:2]:
        for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
            assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        network.decoder[0].register_forward_hook(lambda module, inputs, output: joined.append(output))
        network(normalize(batch["weak"]))
        assert joined.pop().is_contiguous(memory_format=torch.channels_last)
    for name in ("x", "weak", "strong"):
        assert batch[name].is_contiguous(memory_format=torch.channels_last)


def test_hardness_and_augment_are_the_cpus(device):
    draw = torch.Generator().manual_seed(0)
    prob_t, prob_s = (torch.randn(4, CLASSES, 33, 40, generator=draw).mul(3).softmax(1) for _ in "ts")
    logits = torch.randn(4, CLASSES, 33, 40, generator=draw)
    valid = torch.rand(4, 33, 40, generator=draw) < 0.8
    labels = torch.randint(0, CLASSES, (4, 33, 40), generator=draw)
    images, gamma = torch.rand(4, 3, 33, 40, generator=draw), torch.tensor([0.3, 0.1, 0.4, 0.2])
    boxes = torch.tensor([[1, 2, 20, 30], [0, 0, 33, 40], [5, 5, 5, 9], [30, 30, 33, 40]])
    masks, pairs = augment.box_masks(boxes, 33, 40), augment.hard_easy_pairs(gamma)
    for function, *arguments in (
            (hardness.confident_ratio, prob_t, 0.7, valid), (hardness.top_class, prob_t),
            (hardness.weighted_iou, labels, labels.flip(0), CLASSES, valid),
            (hardness.count_pairs, labels, labels.flip(0), CLASSES, valid),
            (hardness.instance_hardness, prob_t, prob_s, 0.7, valid, 0),
            (hardness.confidence_hardness, prob_t, prob_s, 0.7, valid),
            (hardness.loss_hardness, prob_t, prob_s),
            (hardness.pseudo_label, prob_t, 0.7, valid), (hardness.pixel_cross_entropy, logits, labels),
            (hardness.unsupervised_loss, [logits, prob_t], [labels, labels], gamma),
            (augment.blend_intensity, images, images.flip(0), gamma), (augment.hard_easy_pairs, gamma),
            (augment.box_masks, boxes, 33, 40), (augment.cutmix, images, labels, pairs, masks)):
        moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), arguments)
        found, expected = function(*moved), function(*arguments)
        for ours, theirs in zip(*([v] if torch.is_tensor(v) else v for v in (found, expected))):
            assert ours.device.type == device.type
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)
