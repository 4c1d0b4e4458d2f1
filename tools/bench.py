"""What a training step costs beside the bare network passes in it, and what feeding it costs.

    python tools/bench.py                                     the table, on whatever device is there
    python tools/bench.py --only step --batch-size 2 --repeats 60

What is compared is timed in turn in one process, so that whatever else the machine does falls on both.
Numbers are medians, with their quartiles; a ratio is that of the pairs. The last line is `step/network R`.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import batches
import data
import train
from evaluate import evaluate
from hardness import count_pairs, top_class
from model import DeepLabV3Plus
from ranks import command_line
from settings import parse_arguments, step_memory

# The functions that make up a step, and what the table calls each. Time in a function that another one
# calls is not counted in the other: what loss_terms does beside the losses is the student's forward.
PARTS = {
    (train, "assess"): "passes without gradient",
    (train, "phi"): "hardness",
    (train, "pseudo_label"): "pseudo-labels",
    (train, "strong_views"): "strong views",
    (train, "loss_terms"): "student forward",
    (train, "supervised_loss"): "losses",
    (train, "unsupervised_loss"): "losses",
    (torch.Tensor, "backward"): "backward",
    (torch.optim.SGD, "step"): "optimizer",
    (train, "update_teacher"): "teacher",
}


class Clock:
    """Times named parts, the device's work included: `with clock("backward"): ...`. Time in a part within
    another part counts for the inner one alone."""

    def __init__(self, device):
        self.synchronize = torch.get_device_module(device).synchronize
        self.seconds = defaultdict(float)  # part -> what it took
        self.part, self.since = None, time.perf_counter()

    @contextmanager
    def __call__(self, part):
        outer = self.switch(part)
        yield
        self.switch(outer)

    def switch(self, part):
        self.synchronize()
        now, outer = time.perf_counter(), self.part
        self.seconds[outer] += now - self.since
        self.part, self.since = part, now
        return outer

    def lap(self):
        """{part: seconds} since the last call."""
        seconds = {part: taken for part, taken in self.seconds.items() if part}
        self.seconds.clear()
        return seconds


def row(name, values, unit, note=""):
    """Print a line of the table: the median of the values, their quartiles, and a note."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    digits = 3 if unit == "times" else 2 if middle < 10 else 1 if middle < 1000 else 0
    spread = f"{low:.{digits}f} - {high:.{digits}f}" if np.size(values) > 1 else ""
    print(f"{name:26}{middle:10.{digits}f} {unit:8} {spread:20}{note}".rstrip(), flush=True)


def compare(settings, ratio, *timed):
    """Time two functions in turn, but for a first call of each. Prints a row for each (name, function,
    note), and the second's time over the first's as `ratio`. Returns the seconds, (2, repeats)."""
    clock, laps = Clock(settings.device), []
    for _ in range(1 + settings.repeats):
        for name, function, _ in timed:
            with clock(name):
                function()
        laps.append([*clock.lap().values()])
    seconds = np.array(laps[1:]).T
    for (name, _, note), values in zip(timed, seconds):
        row(name, values * 1e3, "ms", note)
    row(f"  {ratio}", seconds[1] / seconds[0], "times")
    return seconds


def build(settings):
    """(student, teacher, optimizer) of train.py, compiled if asked for."""
    torch.backends.cudnn.benchmark = True
    student, _, teacher, optimizer = train.build_networks(settings, settings.classes, settings.device)
    if settings.compile:
        student.compile(dynamic=False, backend=settings.compile)
        teacher.compile(dynamic=False, backend=settings.compile)
    return student, teacher, optimizer


def on_device(settings, batch):
    return {name: tensor.to(settings.device, non_blocking=True) for name, tensor in batch.items()}


def bare_passes(settings, batch):
    """A function that makes the passes that Algorithm 1 cannot do without, and nothing else: both networks
    on B_u without gradient; the student forward and backward on B_x and two views of B_u; SGD."""
    student, teacher, optimizer = build(settings)
    batch = on_device(settings, batch)
    weak = batches.normalize(batch["weak"]).chunk(settings.accumulate)
    images = batches.normalize(torch.cat([batch[name] for name in ("x", "weak", "strong")]))
    gradient = torch.randn_like(images[:, :1]).expand(-1, settings.classes, -1, -1) / images.numel()
    parts = [*zip(images.chunk(settings.accumulate), gradient.chunk(settings.accumulate))]

    def passes():
        with torch.no_grad(), train.autocast(settings.device, settings.amp):
            student.eval()
            for some in weak:
                student(some)
                teacher(some)
            student.train()
        optimizer.zero_grad()
        for some, its_gradient in parts:
            with train.autocast(settings.device, settings.amp):
                logits = student(some)
            logits.backward(its_gradient)
        optimizer.step()
    return passes


def resident(which):
    """MiB of this process, as Linux says in /proc: VmRSS is what it has now, VmHWM the most it had."""
    return int(Path("/proc/self/status").read_text().partition(f"{which}:")[2].split()[0]) / 1024


def bench_step(settings, draws):
    """The parts of a step and its peak memory, then the whole and the bare passes in turn. Returns
    step / network."""
    clock, laps, count = Clock(settings.device), [], settings.repeats + 2
    loader = batches.training_batches(draws, range(draws.batch_size), 0, count, settings.workers,
                                      settings.cuda)
    batch = next(batches.training_batches(draws, range(draws.batch_size), 0, 1, workers=0))
    before = 0 if settings.cuda else resident("VmRSS")
    networks = build(settings)
    with ExitStack() as patches:
        for (place, name), part in PARTS.items():
            patches.enter_context(mock.patch.object(place, name, clock(part)(getattr(place, name))))
        for n in range(count):
            clock.lap()
            with clock("load wait"):
                loaded = next(loader)
            with clock("copy to device"):
                loaded = on_device(settings, loaded)
            with clock("the rest"):
                train.train_step(*networks, loaded, 1, settings)
            laps.append(clock.lap())
            if settings.cuda and n == 0:  # when cuDNN tries its algorithms
                torch.cuda.reset_peak_memory_stats()
    peak = torch.cuda.max_memory_allocated() / 2 ** 20 if settings.cuda else resident("VmHWM") - before

    parts = {name: np.array([lap[name] for lap in laps]) for name in laps[0]}
    wait = parts.pop("load wait")
    whole = sum(parts.values())
    for name, seconds in {"load wait": wait, **parts}.items():
        row(f"  {name}", seconds[2:] * 1e3, "ms", f"{np.median((seconds / whole)[2:]):6.1%} of a step")
    row("first step", whole[0], "s", "with compiling" if settings.compile else "")
    passes_s, step_s = compare(
        settings, "step / network",
        ("network", bare_passes(settings, batch), "its passes alone"),
        ("step", lambda: train.train_step(*networks, on_device(settings, batch), 1, settings),
         "from the copy to the device on"))
    settings.step_seconds = np.median(step_s)
    row("images", 2 * settings.batch_size / step_s, "/s", "labelled and unlabelled together")
    row("peak memory of a step", peak, "MiB", f"{step_memory(settings) * 1024:.0f} by settings.step_memory")
    return np.median(step_s / passes_s)


def bench_flops(settings, draws):
    """The floating-point operations of the bare passes, counted on tensors without content."""
    s = settings
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = DeepLabV3Plus(s.classes, s.backbone, s.output_stride, s.channels)
        logits = [network(torch.empty(2, 3, s.crop_size, s.crop_size)) for _ in range(5)]
        sum(z.sum() for z in logits[2:]).backward()
    flops = counter.get_total_flops() / 2 * s.batch_size
    row("network, counted", flops / 1e12, "TFLOP", "of a step, whatever the device")


def bench_loader(settings, draws):
    """Pairs of a labelled and an unlabelled image that loader threads make a second, one and as many as a
    run here has, and how many times one thread's pairs a step eats."""
    for workers in sorted({1, settings.workers or 1}):
        loader = batches.training_batches(draws, range(draws.batch_size), 0,
                                          settings.repeats + 2 * workers + 2, workers)
        times = [time.perf_counter() for _ in loader]
        # Not what was made ahead while it started, nor what is left at the end.
        pairs = draws.batch_size / np.diff(times)[1:len(times) - 2 * workers]
        row(f"loader, {workers} workers", pairs, "pairs/s", f"crop {draws.crop_size}")
        if workers == 1 and hasattr(settings, "step_seconds"):
            needed = settings.batch_size / settings.step_seconds / np.median(pairs)
            row("  workers a step needs", needed, "threads", "if each made as many as one alone")


def bench_kernels(settings, draws):
    """Hardness's two kernels: top_class beside max(1); count_pairs on maps of one class beside many, for
    one class sends all its atomics to one address."""
    prob = torch.rand(settings.batch_size, 21, *2 * [settings.crop_size], device=settings.device)
    many = prob.argmax(1)
    one = torch.zeros_like(many)
    compare(settings, "max(1) / top_class",
            ("top_class", lambda: top_class(prob), "x".join(map(str, prob.shape))),
            ("max(1)", lambda: prob.max(1), ""))
    compare(settings, "one / many",
            ("count_pairs, many classes", lambda: count_pairs(many, many, 21), ""),
            ("count_pairs, one class", lambda: count_pairs(one, one, 21), ""))


def bench_evaluation(settings, draws):
    """Images/s of evaluate.evaluate, loading included, and the share of time around the network."""
    some, clock, laps = replace(draws.data, val=draws.data.val[:3]), Clock(settings.device), []
    _, teacher, _ = build(settings)
    teacher.forward = clock("network")(teacher.forward)
    for _ in range(1 + settings.repeats):
        with clock("around"):
            evaluate([teacher], some, settings.device, settings.window, amp=settings.amp)
        lap = clock.lap()
        laps.append((lap["network"], lap["around"]))
    network, around = np.array(laps[1:]).T
    size = "x".join(map(str, some.image(some.val[0]).size))
    row("evaluation", len(some.val) / (network + around), "/s", f"images of {size}, and loading")
    row("  around the network", 100 * around / (network + around), "%", "of the time")


def make_up_photographs(folder, count=18):
    """A folder for --dataset custom: noise of every scale, as photographs have, as JPEGs of 500 x 375,
    and masks for two thirds of them."""
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


SECTIONS = {"step": bench_step, "flops": bench_flops, "loader": bench_loader, "kernels": bench_kernels,
            "evaluation": bench_evaluation}  # the step first: on a CPU its memory is the process's growth


def read_flags(argv, folder):
    """bench.py's own flags, and the settings that train.py makes of the others, in one namespace."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        epilog="Other flags are train.py's, such as --backbone, --accumulate, --amp, --workers, --crop-size "
               "(default here: 129, or 513 on a GPU) and --batch-size (4, or 16).")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", default=[*SECTIONS],
                        help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=30 if gpu else 10,
                        help="measurements behind each median (default: 10, or 30 on a GPU)")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND",
                        help="torch.compile the networks, in the step and in its passes")
    args, others = parser.parse_known_args(argv)
    for flag in others:
        if flag.partition("=")[0] in ("--dataset", "--data-root", "--supervised", "--aux", "--image-size"):
            parser.error(f"{flag}: not measured; leave it out")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1")
    sizes = "--crop-size=513 --batch-size=16" if gpu else "--crop-size=129 --batch-size=4"
    # Random weights are sure of nothing, so every pixel is let through (tau), and they hardly move (lr).
    settings = parse_arguments([*sizes.split(), "--weights=none", "--tau=0", "--lr=1e-5", "--iters=1000000",
                                "--dataset=custom", f"--data-root={folder}", *others])
    vars(settings).update(vars(args), device=torch.device("cuda" if gpu else "cpu"))
    return settings


@command_line
def main(argv=None):
    with tempfile.TemporaryDirectory() as folder:
        s = read_flags(argv, folder)
        make_up_photographs(Path(folder))
        photographs = data.open_data(s.dataset, s.data_root)
        draws = batches.TrainingDraws(photographs, *data.split_ids(photographs, s.dataset, s.split),
                                      s.batch_size, s.crop_size, s.seed, s.scale)
        s.classes = len(photographs.classes)
        device = torch.cuda.get_device_name() if s.cuda else f"CPU, {torch.get_num_threads()} threads"
        print(f"{device}; torch {torch.__version__}, torchvision {torchvision.__version__}\n"
              f"{s.backbone}, stride {s.output_stride}, {s.channels} channels, crop {s.crop_size}, "
              f"{s.batch_size} + {s.batch_size} in {s.accumulate}, {'bf16' if s.amp else 'fp32'}"
              f"{', compiled' if s.compile else ''}; medians of {s.repeats}\n\n"
              f"{'':26}{'median':>10} {'':8} quartiles", flush=True)
        ratio = None
        for section, bench in SECTIONS.items():
            if section in s.only:
                ratio = bench(s, draws) or ratio
    if ratio:
        print(f"step/network {ratio:.3f}")


if __name__ == "__main__":
    main()
