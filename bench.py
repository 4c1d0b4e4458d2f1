"""What a training step costs beside the bare network passes in it, and what feeding it costs.

    python bench.py                                     the table, on whatever device is there
    python bench.py --only step --repeats 30            one section, measured longer
    python bench.py --only loader --data-root data/voc --dataset voc

What is compared is timed in turn in one process, so that whatever else the machine does falls on
both; a ratio is the median of the pairs' ratios. Numbers are medians, with their quartiles beside
them. The last line is `step/network R`.
"""

import argparse
import copy
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torch import nn
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

import augment
import data
import train
from evaluate import evaluate
from hardness import instance_hardness
from model import BACKBONES, DeepLabV3Plus


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
    """(student, teacher, optimizer) of train.py, compiled if asked for."""
    torch.backends.cudnn.benchmark = True
    student, _, teacher, optimizer = train.build_networks(settings, classes, device)
    if compiled:
        student.compile(dynamic=False)
        teacher.compile(dynamic=False)
    return student, teacher, optimizer


def training_step(settings, classes, batch, device, compiled=False):
    """A function that takes one step: the copy to the device, then train.train_step."""
    student, teacher, optimizer = build(settings, classes, device, compiled)

    def step(batch=batch, parts=record_function):
        with parts("copy to device"):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        train.train_step(student, teacher, optimizer, batch, 1, settings)
    return step


def bare_passes(settings, classes, batch, device, compiled=False):
    """A function that makes the passes that Algorithm 1 cannot do without, and does nothing else.

    Student and teacher on B_u, without gradient and in evaluation mode; the student forward and
    backward on B_x and two views of B_u; SGD. The images lie on the device, normalised, and so does
    a gradient of the logits, from which the backward pass starts.
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
    count = args.repeats + warm_up
    loader = batches(settings, photographs, args.batch_size, count, args.workers)
    batch = next(batches(settings, photographs, args.batch_size, 1))
    step = training_step(settings, classes, batch, device, args.compile)
    start = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - start

    parts = Parts(device)
    with mock.patch.object(train, "record_function", parts):
        for iteration in range(count):
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
    row("network (the floor)", seconds[1] * 1e3, "ms", "its passes alone, in turn with it")
    row("  step / network", seconds[0] / seconds[1], "times")
    row("images", 2 * args.batch_size / seconds[0], "/s", "labelled and unlabelled together")
    if args.compile:
        row("first step", [first], "s", "with compiling")
    return np.median(seconds[0] / seconds[1])


def bench_flops(args, settings, photographs, device):
    """The floating-point operations of the floor's passes, counted on tensors without content."""
    def per_image(*, gradient):
        with FlopCounterMode(display=False) as counter:
            logits = network.train(gradient)(images)
            if gradient:
                logits.sum().backward()
        return counter.get_total_flops() / len(images)

    with torch.device("meta"):
        network = DeepLabV3Plus(len(photographs.classes), args.backbone, args.output_stride,
                                args.channels)
        images = torch.empty(2, 3, args.crop_size, args.crop_size)
    count = args.batch_size * (2 * per_image(gradient=False) + 3 * per_image(gradient=True))
    row("network, counted", [count / 1e12], "TFLOP", "of a step, whatever the device")


def bench_doubling(args, settings, photographs, device):
    """Step and floor as the batch doubles, and by what factors they grow."""
    largest, before = next(batches(settings, photographs, 16, 1)), None
    for size in (2, 4, 8, 16):
        if args.compile:
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


def peak_memory(make, settings, photographs, device, compiled):
    """MiB at the peak of three calls of what `make` makes, its weights and gradients included.

    On a CPU it is what the process has grown by, and the process must be a fresh one.
    """
    def resident(which):
        return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    batch = next(batches(settings, photographs, settings.batch_size, 1))
    before = 0 if device.type == "cuda" else resident("VmRSS")
    function = make(settings, len(photographs.classes), batch, device, compiled)
    function()
    if device.type == "cuda":  # cuDNN tries its algorithms in the first call, which does not count
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
    peaks = []
    for make in (training_step, plain_training):
        with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as process:
            peaks.append(process.submit(peak_memory, make, settings, photographs, device,
                                        args.compile).result())
    row("peak memory of a step", peaks[:1], "MiB", "weights and gradients included")
    row("  of plain training", peaks[1:], "MiB", "cross-entropy, B_x + 2 B_u images")
    row("  step / plain training", [peaks[0] / peaks[1]], "times")


# Table 5 as Pillow and torchvision have it, whatever augment.py makes of it.
USUAL_OPERATIONS = augment.INTENSITY_OPERATIONS | {
    "blur": lambda image, rng: image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))),
    "sharpness": lambda image, rng: TF.adjust_sharpness(image, rng.uniform(0.05, 0.95)),
    "hue": lambda image, rng: TF.adjust_hue(image, rng.uniform(-0.5, 0.5)),
}


def usual_item(draws, labelled, iteration, place):
    """An item as loaders usually make it, from the draws of TrainingDraws: the whole image decoded
    and resized, then cropped and padded; two operations on the padded crop; normalised floats."""
    order, stream, ids = ((data.ORDER_X, data.AUGMENT_X, draws.labelled) if labelled else
                          (data.ORDER_U, data.AUGMENT_U, draws.unlabelled))
    name = data.drawn_id(ids, draws.batch_size, draws.seed, order, iteration, place)
    rng, size = data.generator(draws.seed, stream, iteration, place), draws.crop_size
    image = draws.data.image(name).convert("RGB")
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
        mask = crop(Image.open(draws.data.masks[name]), Image.Resampling.NEAREST, data.IGNORE)
        return to_float(weak), torch.from_numpy(np.array(mask, dtype=np.int64))
    strong = weak
    for name in rng.choice(list(USUAL_OPERATIONS), size=2, replace=False):
        strong = USUAL_OPERATIONS[name](strong, rng)
    return to_float(weak), to_float(strong)


class Items(torch.utils.data.Dataset):
    def __init__(self, make):
        self.make = make

    def __getitem__(self, key):
        return self.make(*key)


def bench_loader(args, settings, photographs, device):
    """Items/s that reach training from one worker process, beside the usual way of making them."""
    draws = training_draws(settings, photographs, 16, args.loader_crop)
    keys = [[(iteration, place) for place in range(16)] for iteration in range(3)]
    for kind, ours in (("labelled", draws.labelled_item), ("unlabelled", draws.unlabelled_item)):
        loaders = [torch.utils.data.DataLoader(Items(make), batch_sampler=keys, num_workers=1,
                                               persistent_workers=True, collate_fn=collate)
                   for make, collate in ((ours, data.stack_items),
                                         (partial(usual_item, draws, kind == "labelled"), None))]
        ours_s, usual_s = time_in_turn(device, args.repeats,
                                       *(partial(list, loader) for loader in loaders))
        row(f"loader, {kind}", 48 / ours_s, "/s", f"one worker process, crop {args.loader_crop}")
        row("  the usual way", 48 / usual_s, "/s", "whole resize, crop, pad, floats")
        row("  loader / usual way", usual_s / ours_s, "times")


def hardness_by_loops(prob_t, prob_s, tau, valid):
    """Eq. 5-7 in NumPy, an image and a class at a time."""
    gamma = []
    for p_t, p_s, v in zip(prob_t, prob_s, valid):
        z_t, z_s, easiness = p_t.argmax(0), p_s.argmax(0), 0
        for p, z1, z2 in ((p_s, z_s, z_t), (p_t, z_t, z_s)):
            rho, wiou = (p.max(0) >= tau)[v].mean(), 0
            for c in range(len(p)):
                one, two = (z1 == c) & v, (z2 == c) & v
                wiou += one.sum() / v.sum() * (one & two).sum() / max((one | two).sum(), 1)
            easiness += rho / 2 * wiou
        gamma.append(1 - easiness)
    return np.array(gamma)


def bench_hardness(args, settings, photographs, device):
    draw = torch.Generator().manual_seed(0)
    prob_t, prob_s = (torch.randn(4, 21, 129, 129, generator=draw).mul(2).softmax(1) for _ in "ts")
    valid = torch.ones(4, 129, 129, dtype=torch.bool)
    inputs = prob_t.to(device), prob_s.to(device), 0.5, valid.to(device)
    arrays = prob_t.numpy(), prob_s.numpy(), 0.5, valid.numpy()
    ours_s, loops_s = time_in_turn(
        device, args.repeats, lambda: [instance_hardness(*inputs) for _ in range(10)],
        lambda: [hardness_by_loops(*arrays) for _ in range(10)])
    row("hardness, 4 of 21x129x129", ours_s * 100, "ms", "Eq. 5-7; the mean of ten calls")
    row("  NumPy", loops_s * 100, "ms", "an image and a class at a time")
    row("  NumPy / hardness", loops_s / ours_s, "times")


def bench_evaluation(args, settings, photographs, device):
    """Images/s of evaluate.evaluate, loading included, and the share of time around the network."""
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
    row("evaluation", len(some.val) / seconds, "/s", f"images of {size}, and loading")
    row("  around the network", 100 * (1 - network / seconds), "%", "of the time")


def make_up_photographs(folder, count=36):
    """A folder for --dataset custom, of 500 x 375: noise of every scale, as photographs have, and
    masks for two thirds of it."""
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


SECTIONS = {"step": bench_step, "flops": bench_flops, "memory": bench_memory, "loader": bench_loader,
            "hardness": bench_hardness, "evaluation": bench_evaluation, "doubling": bench_doubling}


def parse_arguments(argv):
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: all but doubling, the step at 2 + 2, 4 + 4, 8 + 8 and "
             f"16 + 16: see that the last fits the memory)")
    add("--backbone", choices=BACKBONES, default="resnet50",
        help="resnet50 (default) as in the paper; the smaller it is, the more the rest weighs")
    add("--output-stride", type=int, choices=(8, 16), default=16)
    add("--channels", type=int, default=256,
        help="width of the decoder; 256 (default) as in the paper")
    add("--crop-size", type=int,
        help="side of the crops of a step (default: 129 on a CPU, 513 on a GPU)")
    add("--batch-size", type=int,
        help="labelled images of a step, and as many unlabelled ones (default: 4, or 16 on a GPU)")
    add("--loader-crop", type=int, default=513, help="side of the crops in the section loader")
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    add("--precision", choices=("fp32", "bf16"),
        help="default: bf16 on a GPU, fp32 on a CPU, where few have fast bf16")
    add("--repeats", type=int,
        help="measurements behind each median (default: 10, or 30 on a GPU); take more where the "
             "quartiles lie far apart")
    add("--workers", type=int,
        help="loader processes while the parts of a step are timed (default: 0, or 4 on a GPU); "
             "raise it where load wait is long")
    add("--dataset", choices=[name for name in data.PROTOCOLS if name != "shapes"],
        default="custom", help="what the folder in --data-root is, as for train.py")
    add("--data-root", help="photographs to load; without it, JPEGs of 500 x 375 are made up")
    add("--compile", action="store_true",
        help="torch.compile the network, in the step and in the floor; the table says what the "
             "first step then takes")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    if cuda and not gpu:
        parser.error("--device cuda: torch sees no GPU here")
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1")
    for name, on_cpu, on_gpu in (("crop_size", 129, 513), ("batch_size", 4, 16), ("workers", 0, 4),
                                 ("repeats", 10, 30), ("precision", "fp32", "bf16")):
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if cuda else on_cpu)
    return args


def training_settings(args, root):
    """The settings of train.py for a step as args say. Random weights are sure of nothing, so that
    every pixel is let through (tau 0); they hardly move (lr), however often a step is repeated."""
    flags = {"--dataset": args.dataset, "--data-root": root, "--weights": "none",
             "--backbone": args.backbone, "--output-stride": args.output_stride, "--tau": 0,
             "--channels": args.channels, "--crop-size": args.crop_size, "--lr": 1e-5,
             "--batch-size": args.batch_size, "--iters": 10 ** 6}
    given = [str(word) for flag, value in flags.items() for word in (flag, value)]
    settings = train.parse_arguments(given + ["--amp" if args.precision == "bf16" else "--no-amp"])
    settings.cuda = args.device == "cuda"
    return settings


def print_heading(args, device):
    name = (torch.cuda.get_device_name() if device.type == "cuda" else
            f"CPU, {torch.get_num_threads()} threads")
    print(f"{name}; torch {torch.__version__}, torchvision {torchvision.__version__}\n"
          f"{args.backbone}, stride {args.output_stride}, {args.channels} channels, crop "
          f"{args.crop_size}, {args.batch_size} + {args.batch_size}, {args.precision}"
          f"{', compiled' if args.compile else ''}; medians of {args.repeats}\n\n"
          f"{'':26}{'median':>10} {'':8} quartiles", flush=True)


def main(argv=None):
    args = parse_arguments(argv)
    device = torch.device(args.device)
    sections = args.only or [name for name in SECTIONS if name != "doubling"]
    ratio = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            if not args.data_root:
                make_up_photographs(Path(folder))
            settings = training_settings(args, args.data_root or folder)
            photographs = data.open_data(settings.dataset, settings.data_root)
            print_heading(args, device)
            for section in sections:
                result = SECTIONS[section](args, settings, photographs, device)
                ratio = result if section == "step" else ratio
        except data.InputError as error:
            print(f"bench.py: {error}", file=sys.stderr)
            sys.exit(2)
    if ratio is not None:
        print(f"step/network {ratio:.3f}")


if __name__ == "__main__":
    main()
