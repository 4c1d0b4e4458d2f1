"""What a training step costs beside the bare network passes in it, and what feeding it costs.

    python bench.py                                     the table, on whatever device is there
    python bench.py --only step --repeats 30            one section, measured longer
    python bench.py --only loader --dataset voc --data-root data/voc

Two things that are compared are timed in turn in one process, so that whatever else the machine does
falls on both; their ratio is the median of the pairs' ratios. Every number is a median, with its
quartiles beside it. The last line is `step/network R`.
"""

import argparse
import copy
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import functional as TF

import augment
import data
import train
from evaluate import evaluate
from hardness import instance_hardness
from model import BACKBONES, DeepLabV3Plus

LOADER_ITEMS = 24  # in one measurement: items differ in scale and operations


def time_in_turn(device, repeats, *functions):
    """The seconds that each function takes, (functions, repeats); a first call is not counted."""
    def seconds(function):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - start

    for function in functions:
        function()
    return np.array([[seconds(function) for function in functions] for _ in range(repeats)]).T


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Parts:
    """Times named parts: `with parts("backward"): ...`, and so it can stand in for record_function.

    On a GPU the time is that of the device, between two events in its stream, and nothing waits for
    it. (The profiler's own ranges lack the backward pass there: it is launched by another thread.)
    """

    def __init__(self, device):
        self.device, self.marks = device, []

    @contextmanager
    def __call__(self, name):
        start = self.now()
        yield
        self.marks.append((name, start, self.now()))

    def now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self):
        """name -> the seconds of every time that it ran."""
        synchronize(self.device)
        found = {}
        for name, start, end in self.marks:
            spent = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            found.setdefault(name, []).append(spent)
        return {name: np.array(times) for name, times in found.items()}


def row(name, values, unit, note=""):
    """Print a line of the table: the median of the values, their quartiles, and a note."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    digits = 3 if unit == "times" else 2 if middle < 10 else 1 if middle < 1000 else 0
    spread = f"{low:.{digits}f} - {high:.{digits}f}" if len(values) > 1 else ""
    print(f"{name:26}{middle:10.{digits}f} {unit:8} {spread:20}{note}".rstrip(), flush=True)


def build(settings, classes, device, compiled=False):
    """(student, teacher, optimizer), set up as in train.train."""
    torch.backends.cudnn.benchmark = True
    student = DeepLabV3Plus(classes, settings.backbone, settings.output_stride, settings.channels)
    student = student.to(device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=settings.lr, momentum=0.9,
                                weight_decay=settings.weight_decay, fused=True)
    optimizer.param_groups[0]["initial_lr"] = settings.lr
    if compiled:
        student.compile(dynamic=False)
        teacher.compile(dynamic=False)
    return student.train(), teacher, optimizer


def training_step(settings, classes, batch, device, compiled=False):
    """A function that takes a step of Algorithm 1: the copy to the device, then train.train_step."""
    student, teacher, optimizer = build(settings, classes, device, compiled)

    def step(batch=batch, parts=Parts(device)):
        with parts("copy to device"):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        train.train_step(student, teacher, optimizer, batch, 1, settings)
    return step


def bare_passes(settings, classes, batch, device, compiled=False):
    """A function that makes the passes that Algorithm 1 cannot do without, and does nothing else.

    Student and teacher on B_u, without gradient and in evaluation mode; the student forward and
    backward on B_x and two views of B_u; SGD. The images lie on the device, normalised; the backward
    pass starts from a gradient of the logits that is given.
    """
    student, teacher, optimizer = build(settings, classes, device, compiled)
    weak = data.normalize(batch["weak"].to(device))
    images = torch.cat([data.normalize(batch[name].to(device)) for name in ("x", "weak", "strong")])
    gradient = torch.randn(len(images), classes, *images.shape[2:], device=device) / images.numel()

    def floor():
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.amp)
        with torch.no_grad(), autocast:
            student.eval()
            student(weak), teacher(weak)
            student.train()
        optimizer.zero_grad()
        with autocast:
            logits = student(images)
        logits.backward(gradient)
        optimizer.step()
    return floor


def plain_training(settings, classes, batch, device, compiled=False):
    """A function that trains the same network with cross-entropy on B_x + 2 B_u labelled images."""
    student, _, optimizer = build(settings, classes, device, compiled)
    images = torch.cat([batch[name] for name in ("x", "weak", "strong")]).to(device)
    labels = batch["y"].repeat(3, 1, 1).to(device)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
            logits = student(data.normalize(images))
        F.cross_entropy(logits, labels.long(), ignore_index=data.IGNORE).backward()
        optimizer.step()
    return step


def training_draws(settings, photographs, batch_size, crop_size):
    labelled, unlabelled = data.split_ids(photographs, settings.dataset, settings.split)
    return data.TrainingDraws(photographs, labelled, unlabelled or labelled, batch_size, crop_size,
                              settings.seed, settings.scale)


def batches(settings, photographs, batch_size, iterations, workers=0):
    draws = training_draws(settings, photographs, batch_size, settings.crop_size)
    return data.training_batches(draws, range(batch_size), 0, iterations, workers, settings.cuda)


def bench_step(args, settings, photographs, device):
    """The parts of a step, then the whole and the floor in turn. Returns step / network."""
    classes, warm_up = len(photographs.classes), 2
    loader = batches(settings, photographs, args.batch_size, args.repeats + warm_up, settings.workers)
    batch = next(batches(settings, photographs, args.batch_size, 1))
    step = training_step(settings, classes, batch, device, args.compile)
    start = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - start

    parts = Parts(device)
    with mock.patch.object(train, "record_function", parts):
        for iteration in range(args.repeats + warm_up):
            if iteration == warm_up:
                parts.marks.clear()
            with parts("load wait"):
                loaded = next(loader)
            with parts("whole"):
                step(loaded, parts)
    found = parts.seconds()
    whole, load_wait = found.pop("whole"), found["load wait"]
    found["the rest"] = whole + load_wait - sum(found.values())
    for name, values in found.items():
        row(f"  {name}", values * 1e3, "ms", f"{np.median(values / whole):6.1%} of a step")

    floor = bare_passes(settings, classes, batch, device, args.compile)
    seconds = time_in_turn(device, args.repeats, step, floor)
    row("step", seconds[0] * 1e3, "ms", "from the copy to the device on")
    row("network (the floor)", seconds[1] * 1e3, "ms", "the passes in it, in turn with the step")
    row("  step / network", seconds[0] / seconds[1], "times")
    row("images", 2 * args.batch_size / seconds[0], "/s", "labelled and unlabelled together")
    if args.compile:
        row("first step, compiling", [first], "s", f"{first - np.median(seconds[0]):.0f} s to start")
    return np.median(seconds[0] / seconds[1])


def bench_doubling(args, settings, photographs, device):
    """Step and floor as the batch doubles, and by what factors they grow."""
    largest, before = next(batches(settings, photographs, 16, 1)), None
    for size in (2, 4, 8, 16):
        torch.compiler.reset()
        batch = {name: tensor[:size] for name, tensor in largest.items()}
        pair = [make(settings, len(photographs.classes), batch, device, args.compile)
                for make in (training_step, bare_passes)]
        seconds = time_in_turn(device, args.repeats, *pair)
        now = np.median(seconds, axis=1)
        grown = before is not None and "step x {:.2f}, network x {:.2f}".format(*now / before)
        row(f"step at {size} + {size}", seconds[0] * 1e3, "ms", grown or "")
        row("  step / network", seconds[0] / seconds[1], "times")
        before = now


def peak_memory(make, settings, classes, batch, device, compiled):
    """MiB at the peak of three calls of what `make` makes, its weights and gradients included.

    On a CPU: what the process has grown by, so let it be a fresh one.
    """
    def resident(which):
        return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    before = 0 if device.type == "cuda" else resident("VmRSS")
    function = make(settings, classes, batch, device, compiled)
    function()
    if device.type == "cuda":  # cuDNN's trials of its algorithms, in the first call, do not count
        torch.cuda.reset_peak_memory_stats()
    function(), function()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return resident("VmHWM") - before


def bench_memory(args, settings, photographs, device):
    """The peak of a step, beside that of plain training; each in a process of its own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif not Path("/proc/self/status").exists():
        return print("peak memory: on a CPU it is read from /proc, which is not here")
    batch, peaks = next(batches(settings, photographs, args.batch_size, 1)), []
    for make in (training_step, plain_training):
        with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as process:
            peaks.append(process.submit(peak_memory, make, settings, len(photographs.classes), batch,
                                        device, args.compile).result())
    row("peak memory of a step", peaks[:1], "MiB", "weights and gradients included")
    row("  of plain training", peaks[1:], "MiB", "cross-entropy on B_x + 2 B_u images")
    row("  step / plain training", [peaks[0] / peaks[1]], "times")


def usual_item(draws, name, rng, labelled):
    """An item as loaders usually make it, from the same draws as TrainingDraws makes its own: all of
    it decoded and resized, cropped, padded, the operations on the padded crop, floats as result."""
    image, size = draws.data.image(name).convert("RGB"), draws.crop_size
    mask = Image.open(draws.data.masks[name]) if labelled else None
    factor = rng.uniform(*draws.scale)
    scaled = [max(1, round(side * factor)) for side in image.size]
    left, top = (int(rng.integers(0, side - min(side, size) + 1)) for side in scaled)
    flip = rng.random() < 0.5

    def crop(picture, resample, fill):
        picture = picture.resize(scaled, resample)
        picture = picture.crop((left, top, min(left + size, scaled[0]), min(top + size, scaled[1])))
        return augment.pad(ImageOps.mirror(picture) if flip else picture, size, fill)

    def to_float(picture):
        return TF.normalize(TF.to_tensor(picture), data.MEAN, data.STD)

    weak = crop(image, Image.Resampling.BILINEAR, data.PAD_COLOUR)
    if labelled:
        mask = crop(mask, Image.Resampling.NEAREST, data.IGNORE)
        return to_float(weak), torch.from_numpy(np.array(mask, dtype=np.int64))
    return to_float(weak), to_float(augment.strong_augment(weak, rng))


def bench_loader(args, settings, photographs, device):
    """Items/s that one worker process makes, beside the usual way."""
    draws = training_draws(settings, photographs, LOADER_ITEMS, args.loader_crop)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker process

    def usual(ids, order, stream, labelled):
        for place in range(LOADER_ITEMS):
            name = data.drawn_id(ids, LOADER_ITEMS, draws.seed, order, 0, place)
            usual_item(draws, name, data.generator(draws.seed, stream, 0, place), labelled)

    for kind, item, usual_arguments in (
            ("labelled", draws.labelled_item, (draws.labelled, data.ORDER_X, data.AUGMENT_X, True)),
            ("unlabelled", draws.unlabelled_item,
             (draws.unlabelled, data.ORDER_U, data.AUGMENT_U, False))):
        ours_s, usual_s = time_in_turn(
            torch.device("cpu"), args.repeats,
            lambda: [item(0, place) for place in range(LOADER_ITEMS)], lambda: usual(*usual_arguments))
        row(f"loader, {kind}", LOADER_ITEMS / ours_s, "/s", f"one worker, crop {args.loader_crop}")
        row("  the usual way", LOADER_ITEMS / usual_s, "/s", "whole resize, crop, pad, floats")
        row("  loader / usual way", usual_s / ours_s, "times")
    torch.set_num_threads(threads)


def hardness_by_loops(prob_t, prob_s, tau):
    """Eq. 5-7 in NumPy, an image and a class at a time."""
    gamma = []
    for p_t, p_s in zip(prob_t, prob_s):
        z_t, z_s, easiness = p_t.argmax(0), p_s.argmax(0), 0
        for p, z1, z2 in ((p_s, z_s, z_t), (p_t, z_t, z_s)):
            rho, wiou = (p.max(0) >= tau).mean(), 0
            for c in range(len(p)):
                union = ((z1 == c) | (z2 == c)).sum()
                wiou += (z1 == c).mean() * ((z1 == c) & (z2 == c)).sum() / max(union, 1)
            easiness += rho / 2 * wiou
        gamma.append(1 - easiness)
    return np.array(gamma)


def bench_hardness(args, settings, photographs, device):
    draw = torch.Generator().manual_seed(0)
    probs = [torch.randn(4, 21, 129, 129, generator=draw).mul(2).softmax(1) for _ in "ts"]
    on_device, arrays = [p.to(device) for p in probs], [p.numpy() for p in probs]
    ours_s, loops_s = time_in_turn(device, args.repeats, lambda: instance_hardness(*on_device, 0.5),
                                   lambda: hardness_by_loops(*arrays, 0.5))
    row("hardness, 4 of 21x129x129", ours_s * 1e3, "ms", "Eq. 5-7")
    row("  NumPy", loops_s * 1e3, "ms", "an image and a class at a time")
    row("  NumPy / hardness", loops_s / ours_s, "times")


def bench_evaluation(args, settings, photographs, device):
    """Images/s of evaluate.evaluate, loading included, and the share of its time around the network."""
    class Watched(nn.Module):
        def forward(self, images):
            with parts("network"):
                return self.network(images)

    parts, watched, some = Parts(device), Watched(), copy.copy(photographs)
    watched.network, some.val = build(settings, len(some.classes), device)[1], some.val[:4]
    seconds, = time_in_turn(device, args.repeats, lambda: evaluate(
        [watched], some, device, settings.window, amp=settings.amp))
    network = parts.seconds()["network"].reshape(args.repeats + 1, -1)[1:].sum(1)
    size = "x".join(map(str, some.image(some.val[0]).size))
    row("evaluation", len(some.val) / seconds, "/s", f"images of {size}, loaded in the same process")
    row("  around the network", 100 * (1 - network / seconds), "%", "of the time")


def make_up_photographs(folder, count=36):
    """A folder for --dataset custom: noise of every scale, as photographs have, 500 x 375, and masks
    for two thirds of it."""
    draw, val = torch.Generator().manual_seed(0), []
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for n in range(count):
        octaves = [F.interpolate(torch.randn(1, 3, 3 << k, 4 << k, generator=draw), (375, 500),
                                 mode="bicubic")[0] * 64 / (k + 1) for k in range(8)]
        pixels = (128 + sum(octaves)).clamp(0, 255).byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / "JPEGImages" / f"{n:03}.jpg", quality=90)
        if n % 3:
            labels = (10 + octaves[1][0] / 8).clamp(0, 20).byte()
            Image.fromarray(labels.numpy()).save(folder / "SegmentationClass" / f"{n:03}.png")
            val += [f"{n:03}\n"] * (n % 6 == 1)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("".join(val))
    (folder / "class_names.txt").write_text("\n".join(data.VOC_CLASSES))


SECTIONS = {"step": bench_step, "memory": bench_memory, "loader": bench_loader,
            "hardness": bench_hardness, "evaluation": bench_evaluation, "doubling": bench_doubling}


def parse_arguments(argv):
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: all but doubling); step and doubling want a quiet "
             f"machine")
    add("--doubling", action="store_true",
        help="also the step at 2 + 2, 4 + 4, 8 + 8 and 16 + 16: at a large crop, see that it fits")
    add("--backbone", choices=BACKBONES, default="resnet50",
        help="resnet50 (default) as in the paper; the smaller it is, the more the rest weighs")
    add("--output-stride", type=int, choices=(8, 16), default=16)
    add("--channels", type=int, default=256, help="width of the decoder; 256 (default) as in the paper")
    add("--crop-size", type=int, help="side of the crops of a step (default: 129 on a CPU, 513 on a GPU)")
    add("--batch-size", type=int, help="labelled images of a step, and as many unlabelled ones "
                                       "(default: 4 on a CPU, 16 on a GPU)")
    add("--loader-crop", type=int, default=513, help="side of the crops of the section loader")
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    add("--precision", choices=("fp32", "bf16"),
        help="default: bf16 on a GPU, fp32 on a CPU, where few have fast bf16")
    add("--repeats", type=int, help="measurements behind each median (default: 10 on a CPU, 30 on a "
                                    "GPU); take more where the quartiles lie far apart")
    add("--workers", type=int, help="loader processes while the parts of a step are timed; raise it "
                                    "where load wait is long (default: as train.py)")
    add("--dataset", choices=data.PROTOCOLS, help="photographs to load: made-up JPEGs of 500 x 375 "
                                                  "unless given")
    add("--data-root", help="the folder of --dataset")
    add("--compile", action="store_true",
        help="torch.compile the network, in the step and in the floor; says how long that takes")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    for name, on_cpu, on_gpu in (("crop_size", 129, 513), ("batch_size", 4, 16), ("repeats", 10, 30),
                                 ("precision", "fp32", "bf16")):
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if cuda else on_cpu)
    return args
