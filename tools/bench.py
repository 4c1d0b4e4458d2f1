"""What a training step costs beside the bare network passes in it, and what feeding it costs.

    python tools/bench.py                                     the table, on whatever device is there
    python tools/bench.py --only step memory --batch-size 2 --repeats 60

What is compared is timed in turn in one process, so that whatever else the machine does falls on both.
Numbers are medians, with their quartiles; a ratio is that of the pairs. The last line is `step/network R`.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import augment
import batches
import data
import train
from evaluate import evaluate
from hardness import count_pairs, instance_hardness, top_class
from model import DeepLabV3Plus


class Clock:
    """Times named parts, the device's work included: `with clock("backward"): ...`, as record_function."""

    def __init__(self, device):
        self.synchronize = torch.get_device_module(device).synchronize
        self.seconds = defaultdict(list)  # part -> what it took, every time

    @contextmanager
    def __call__(self, part):
        self.synchronize()
        start = time.perf_counter()
        yield
        self.synchronize()
        self.seconds[part].append(time.perf_counter() - start)


def row(name, values, unit, note=""):
    """Print a line of the table: the median of the values, their quartiles, and a note."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    digits = 3 if unit == "times" else 2 if middle < 10 else 1 if middle < 1000 else 0
    spread = f"{low:.{digits}f} - {high:.{digits}f}" if np.size(values) > 1 else ""
    print(f"{name:26}{middle:10.{digits}f} {unit:8} {spread:20}{note}".rstrip(), flush=True)


def compare(settings, ratio, timed, items=None):
    """Time functions in turn, but for a first call of each. Prints a row for each (name, function, note)
    of the two, and the second's time over the first's as `ratio`. Returns the seconds, (2, repeats)."""
    clock = Clock(settings.device)
    for _ in range(1 + settings.repeats):
        for name, function, *_ in timed:
            with clock(name):
                function()
    seconds = np.array([clock.seconds[name][1:] for name, *_ in timed])
    for (name, _, *note), values in zip(timed, seconds, strict=True):
        row(name, items / values if items else values * 1e3, "/s" if items else "ms", *note)
    row(f"  {ratio}", seconds[1] / seconds[0], "times")
    return seconds


def build(settings):
    """(student, teacher, optimizer) of train.py, compiled if asked for."""
    torch.backends.cudnn.benchmark = True
    student, _, teacher, optimizer = train.build_networks(settings, settings.classes, settings.device)
    if settings.compile:
        student.compile(dynamic=False)
        teacher.compile(dynamic=False)
    return student, teacher, optimizer


def training_step(settings, batch):
    """A function that takes one step: the copy to the device, then train.train_step."""
    student, teacher, optimizer = build(settings)

    def step(batch=batch):
        with train.record_function("copy to device"):
            batch = {name: tensor.to(settings.device, non_blocking=True) for name, tensor in batch.items()}
        train.train_step(student, teacher, optimizer, batch, 1, settings)
    return step


def bare_passes(settings, batch):
    """A function that makes the passes that Algorithm 1 cannot do without, and nothing else: both networks
    on B_u without gradient; the student forward and backward on B_x and two views of B_u; SGD."""
    student, teacher, optimizer = build(settings)
    images = torch.cat([batch[name] for name in ("x", "weak", "strong")]).to(settings.device)
    images, weak = batches.normalize(images), batches.normalize(batch["weak"].to(settings.device))
    gradient = torch.randn_like(images[:, :1]).expand(-1, settings.classes, -1, -1) / images.numel()

    def floor():
        with torch.no_grad(), torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.amp):
            student.eval()
            student(weak)
            teacher(weak)
            student.train()
        optimizer.zero_grad()
        with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.amp):
            logits = student(images)
        logits.backward(gradient)
        optimizer.step()
    return floor


def plain_training(settings, batch):
    """A function that trains the same network with cross-entropy on B_x + 2 B_u labelled images."""
    student, _, optimizer = build(settings)
    images = torch.cat([batch[name] for name in ("x", "weak", "strong")]).to(settings.device)
    labels = batch["y"].repeat(3, 1, 1).to(settings.device)

    def step():
        optimizer.zero_grad()
        for x, y in zip(images.chunk(settings.accumulate), labels.chunk(settings.accumulate), strict=True):
            with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.amp):
                logits = student(batches.normalize(x))
            F.cross_entropy(logits, y.long(), ignore_index=data.IGNORE).backward()
        optimizer.step()
    return step


def first_batch(draws):
    return next(batches.training_batches(draws, range(draws.batch_size), 0, 1, workers=0))


def bench_step(settings, draws):
    """The parts of a step, then the whole and the floor in turn. Returns step / network."""
    clock, count, batch = Clock(settings.device), settings.repeats + 2, first_batch(draws)
    loader = batches.training_batches(draws, range(draws.batch_size), 0, count, settings.workers,
                                      settings.cuda)
    step = training_step(settings, batch)
    with mock.patch.object(train, "record_function", clock):
        for _ in range(count):
            with clock("load wait"):
                loaded = next(loader)
            with clock("whole"):
                step(loaded)
    first = clock.seconds["whole"][0]
    parts = {name: np.reshape(seconds, (count, -1)).sum(1)[2:] for name, seconds in clock.seconds.items()}
    whole = parts.pop("whole")
    parts["the rest"] = whole + parts["load wait"] - sum(parts.values())
    for name, seconds in parts.items():
        row(f"  {name}", seconds * 1e3, "ms", f"{np.median(seconds / whole):6.1%} of a step")
    floor_s, step_s = compare(settings, "step / network", (
        ("network (the floor)", bare_passes(settings, batch), "its passes alone"),
        ("step", step, "from the copy to the device on")))
    row("images", 2 * settings.batch_size / step_s, "/s", "labelled and unlabelled together")
    if settings.compile:
        row("first step", first, "s", "with compiling")
    return np.median(step_s / floor_s)


def bench_doubling(settings, draws):
    """Step and floor as the batch doubles."""
    largest = first_batch(replace(draws, batch_size=16))
    for size in (2, 4, 8, 16):
        torch.compiler.reset()
        batch = {name: tensor[:size] for name, tensor in largest.items()}
        compare(settings, "step / network", ((f"network at {size} + {size}", bare_passes(settings, batch)),
                                             (f"step at {size} + {size}", training_step(settings, batch))))


def bench_flops(settings, draws):
    """The floating-point operations of the floor's passes, counted on tensors without content."""
    s = settings
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = DeepLabV3Plus(s.classes, s.backbone, s.output_stride, s.channels)
        logits = [network(torch.empty(2, 3, s.crop_size, s.crop_size)) for _ in range(5)]
        sum(z.sum() for z in logits[2:]).backward()
    flops = counter.get_total_flops() / 2 * s.batch_size
    row("network, counted", flops / 1e12, "TFLOP", "of a step, whatever the device")


def peak_memory(make, settings, draws):
    """MiB at the peak of three calls of what `make` makes, its weights and gradients included; on a CPU
    what the process, which must be a fresh one, has grown by, as Linux says in /proc."""
    def resident(which):
        return int(Path("/proc/self/status").read_text().partition(f"{which}:")[2].split()[0]) / 1024

    batch = first_batch(draws)
    before = 0 if settings.cuda else resident("VmRSS")
    function = make(settings, batch)
    for call in range(3):
        function()
        if settings.cuda and call == 0:  # when cuDNN tries its algorithms
            torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2 ** 20 if settings.cuda else resident("VmHWM") - before


def bench_memory(settings, draws):
    """The peak of a step, beside that of plain training, each in a process of its own."""
    if settings.cuda:
        torch.cuda.empty_cache()  # what the sections before have left is free for the other processes
    spawn, peaks = torch.multiprocessing.get_context("spawn"), []
    for make in (training_step, plain_training):
        with ProcessPoolExecutor(1, spawn) as process:
            peaks.append(process.submit(peak_memory, make, settings, draws).result())
    row("peak memory of a step", peaks[0], "MiB", "weights and gradients included")
    row("  of plain training", peaks[1], "MiB", "cross-entropy, B_x + 2 B_u images")
    row("  step / plain training", peaks[0] / peaks[1], "times")


class UsualDraws(batches.TrainingDraws):
    """Items as loaders usually make them, from the same draws: the whole image decoded and resized,
    then cropped and padded; two operations on the padded crop; normalised floats."""

    def weak(self, name, mask, rng):
        image, size = self.data.image(name).convert("RGB"), self.crop_size
        factor = rng.uniform(*self.scale)
        width, height = scaled = [max(1, round(side * factor)) for side in image.size]
        left, top = (int(rng.integers(0, side - min(side, size) + 1)) for side in scaled)
        flip = rng.random() < 0.5

        def crop(picture, resample, fill):
            picture = picture.resize(scaled, resample)
            picture = picture.crop((left, top, min(left + size, width), min(top + size, height)))
            return augment.pad(ImageOps.mirror(picture) if flip else picture, size, fill)

        return (crop(image, Image.Resampling.BILINEAR, batches.PAD_COLOUR),
                mask and crop(mask, Image.Resampling.NEAREST, data.IGNORE))

    def to_tensor(self, picture, fill):
        return (torch.from_numpy(np.array(picture, dtype=np.int64)) if picture.mode == "L" else
                TF.normalize(TF.to_tensor(picture), batches.MEAN, batches.STD))


def bench_loader(settings, draws):
    """Items/s that reach training from one worker process, beside the usual way of making them."""
    ours = replace(draws, batch_size=16, crop_size=settings.loader_crop)
    keys, note = [divmod(n, 16) for n in range(48)], f"one worker process, crop {settings.loader_crop}"

    def loader(make, collate):
        return partial(list, DataLoader(
            keys, 16, collate_fn=lambda keys: collate([make(*key) for key in keys]), num_workers=1,
            persistent_workers=True, multiprocessing_context="fork"))

    for kind in ("labelled", "unlabelled"):
        make, make_usual = (getattr(some, f"{kind}_item") for some in (ours, UsualDraws(**vars(ours))))
        compare(settings, "loader / usual way", items=len(keys), timed=(
            (f"loader, {kind}", loader(make, batches.stack_items), note),
            ("  the usual way", loader(make_usual, default_collate), "whole resize, crop, pad, floats")))


def hardness_by_loops(prob_t, prob_s, tau, valid):
    """Eq. 5-7 in NumPy, an image and a class at a time."""
    gamma = np.ones(len(prob_t))
    for i, (p_t, p_s, v) in enumerate(zip(prob_t, prob_s, valid, strict=True)):
        z_t, z_s = p_t.argmax(0), p_s.argmax(0)
        for p, z1, z2 in ((p_s, z_s, z_t), (p_t, z_t, z_s)):
            rho, wiou = (p.max(0) >= tau)[v].mean(), 0
            for c in range(len(p)):
                one, two = (z1 == c) & v, (z2 == c) & v
                wiou += one.sum() / v.sum() * (one & two).sum() / max((one | two).sum(), 1)
            gamma[i] -= rho / 2 * wiou
    return gamma


def bench_hardness(settings, draws):
    """Eq. 5-7 beside NumPy; their two kernels beside max(1), and on maps of one class alone, where
    count_pairs sends all its atomics to one address."""
    prob_t, prob_s = (torch.randn(4, 21, 129, 129).mul(2).softmax(1) for _ in "ts")
    arrays = prob_t.numpy(), prob_s.numpy(), 0.5, np.ones((4, 129, 129), bool)
    inputs = [torch.as_tensor(array, device=settings.device) for array in arrays]
    compare(settings, "NumPy / hardness", (
        ("hardness, 4 of 21x129x129", lambda: instance_hardness(*inputs), "Eq. 5-7"),
        ("  NumPy", lambda: hardness_by_loops(*arrays), "an image and a class at a time")))
    prob = torch.rand(settings.batch_size, 21, *2 * [settings.crop_size], device=settings.device)
    many = prob.argmax(1)
    one = torch.zeros_like(many)
    compare(settings, "max(1) / top_class", (
        ("top_class", lambda: top_class(prob), "x".join(map(str, prob.shape))),
        ("  max(1)", lambda: prob.max(1))))
    compare(settings, "one / many", (
        ("count_pairs, many classes", lambda: count_pairs(many, many, 21)),
        ("  one class", lambda: count_pairs(one, one, 21))))


def bench_evaluation(settings, draws):
    """Images/s of evaluate.evaluate, loading included, and the share of time around the network."""
    some, clock = replace(draws.data, val=draws.data.val[:3]), Clock(settings.device)
    _, teacher, _ = build(settings)
    teacher.forward = clock("network")(teacher.forward)
    for _ in range(1 + settings.repeats):
        clock("evaluation")(evaluate)([teacher], some, settings.device, settings.window, amp=settings.amp)
    seconds = np.array(clock.seconds["evaluation"])
    network = np.reshape(clock.seconds["network"], (len(seconds), -1)).sum(1)
    size = "x".join(map(str, some.image(some.val[0]).size))
    row("evaluation", len(some.val) / seconds[1:], "/s", f"images of {size}, and loading")
    row("  around the network", 100 * (1 - network / seconds)[1:], "%", "of the time")


def make_up_photographs(folder, count=36):
    """A folder for --dataset custom, of 500 x 375: noise of every scale, as photographs have, and
    masks for two thirds of it."""
    draw = torch.Generator().manual_seed(0)
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for n in range(count):
        octaves = [F.interpolate(torch.randn(1, 3, 3 << k, 4 << k, generator=draw), (375, 500),
                                 mode="bicubic")[0] * 64 / (k + 1) for k in range(8)]
        pixels = (128 + sum(octaves)).clamp(0, 255).byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{n:03}.jpg", quality=90)
        if n % 3:
            labels = (10 + octaves[1][0] / 8).clamp(0, 20).byte()
            Image.fromarray(labels.numpy()).save(folder / "masks" / f"{n:03}.png")
    (folder / "class_names.txt").write_text("\n".join(data.VOC_CLASSES))


SECTIONS = {section.__name__.removeprefix("bench_"): section for section in (
    bench_step, bench_flops, bench_memory, bench_loader, bench_hardness, bench_evaluation, bench_doubling)}


def parse_arguments(argv, folder):
    """bench.py's own flags, and the settings that train.py makes of the others, in one namespace."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        epilog="Most other flags are train.py's, such as --backbone, --channels, --accumulate, --crop-size "
               "(default here: 129, or 513 on a GPU), --batch-size (4, or 16), --workers (0, or 4), "
               "--dataset and --data-root (default: made-up JPEGs of 500 x 375).")
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", default=list(SECTIONS)[:-1],
        help=f"of {', '.join(SECTIONS)} (default: all but doubling: see that 16 + 16 fits the memory)")
    add("--device", choices=("cpu", "cuda")[:1 + gpu], default="cuda" if gpu else "cpu")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--repeats", type=int, default=30 if gpu else 10,
        help="measurements behind each median (default: 10, or 30 on a GPU)")
    add("--loader-crop", type=int, default=513, help="side of the crops in the section loader")
    add("--compile", action="store_true", help="torch.compile the network, in the step and in the floor")
    args, others = parser.parse_known_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1")
    cuda = args.device == "cuda"
    crop_size, batch_size, workers = (513, 16, 4) if cuda else (129, 4, 0)
    # Random weights are sure of nothing, so every pixel is let through (tau), and they hardly move (lr).
    made_up = not any(flag.startswith("--dataset") for flag in others)
    settings = train.parse_arguments([
        *["--dataset=custom", f"--data-root={folder}"] * made_up, "--weights=none", "--tau=0", "--lr=1e-5",
        "--iters=1000000", f"--crop-size={crop_size}", f"--batch-size={batch_size}", f"--workers={workers}",
        *others, "--amp" if args.precision == "bf16" or cuda and not args.precision else "--no-amp"])
    if settings.dataset == "shapes" or settings.supervised or settings.aux or settings.image_size:
        parser.error("--dataset shapes, --supervised, --aux, --image-size: not measured; leave them out")
    vars(settings).update(vars(args), cuda=cuda, device=torch.device(args.device))
    return settings


def main(argv=None):
    ratio = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_up_photographs(Path(folder))
            s = parse_arguments(argv, folder)
            photographs = data.open_data(s.dataset, s.data_root)
            labelled, unlabelled = data.split_ids(photographs, s.dataset, s.split)
            draws = batches.TrainingDraws(photographs, labelled, unlabelled or labelled, s.batch_size,
                                       s.crop_size, s.seed, s.scale)
            s.classes = len(photographs.classes)
            device = torch.cuda.get_device_name() if s.cuda else f"CPU, {torch.get_num_threads()} threads"
            print(f"{device}; torch {torch.__version__}, torchvision {torchvision.__version__}\n"
                  f"{s.backbone}, stride {s.output_stride}, {s.channels} channels, crop {s.crop_size}, "
                  f"{s.batch_size} + {s.batch_size} in {s.accumulate}, {'bf16' if s.amp else 'fp32'}"
                  f"{', compiled' if s.compile else ''}; medians of {s.repeats}\n\n"
                  f"{'':26}{'median':>10} {'':8} quartiles", flush=True)
            for section in s.only:
                ratio = SECTIONS[section](s, draws) or ratio
        except (data.InputError, FileNotFoundError) as error:
            print(f"bench.py: {error}", file=sys.stderr)
            sys.exit(2)
    if ratio:
        print(f"step/network {ratio:.3f}")


if __name__ == "__main__":
    main()
