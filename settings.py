"""Every setting of a run, said once: its flag, type, default, range and help, and the protocols of Sec. 3.

argparse is built from the fields of Settings. A protocol holds what --dataset or --small settles unless a
flag says otherwise.
"""

import argparse
import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from data import SPLITS, InputError
from model import BACKBONES
from ranks import say, world_size

# A range: how a message says it, and whether a value lies in it.
ANY = "", lambda v: True
COUNT = "at least 1", lambda v: v >= 1
NOT_NEGATIVE = "at least 0, and finite", lambda v: 0 <= v < math.inf
POSITIVE = "above 0, and finite", lambda v: 0 < v < math.inf
PROBABILITY = "a probability, 0 to 1", lambda v: 0 <= v <= 1
BELOW_1 = "at least 0 and below 1", lambda v: 0 <= v < 1
PAIR = "BatchNorm needs two images or more", lambda v: v >= 2

VOC = {"data_root": "data/voc", "split": "1_8", "eval_every": 1}
PROTOCOLS = {
    "shapes": {"data_root": "", "split": "1_16", "backbone": "resnet18", "channels": 64, "weights": "none",
               "crop_size": 32, "scale": (1, 1.25), "batch_size": 8, "epochs": 14, "ema": 0.98, "lr": 0.03,
               "encoder_lr": 0.03, "eval_every": 2},
    "voc": VOC,
    "voc_classic": VOC,
    "cityscapes": {"data_root": "data/cityscapes", "split": "1_8", "crop_size": 769, "window": 769,
                   "epochs": 240, "tau": 0.7, "encoder_lr": 0.01, "weight_decay": 5e-4, "eval_every": 1},
    "custom": {"least_iters": 4000},
}
SMALL = {"backbone": "resnet18", "channels": 64, "image_size": 256, "crop_size": 129, "batch_size": 4,
         "ema": 0.99, "iters": 3000, "eval_every": None}  # on top of the data set's protocol


def flag(default, help, within=ANY, **options):
    """A field of Settings with a flag; `options` go to argparse. None is derived from other settings."""
    return field(default=default, metadata={"help": help, "within": within, "options": options})


@dataclass
class Settings:
    # data
    dataset: str = flag("shapes", "shapes is drawn on the fly; custom is a folder of your own photographs",
                        choices=PROTOCOLS)
    data_root: str = flag("data/custom", "folder of the data set, as its archive unpacks it")
    split: str = flag(None, f"which images are labelled: {', '.join(SPLITS)}, or a file of ids; without it, "
                            f"custom takes every image that has a mask")
    crop_size: int = flag(513, "side of the training crops", COUNT)
    scale: list = flag((0.5, 2.0), "range of the random scale; lower MAX if objects fill the crop", POSITIVE,
                       type=float, nargs=2, metavar=("MIN", "MAX"))
    image_size: int = flag(None, "shrink images to this longer side: for photographs much larger than the "
                                 "crop; results still have the images' own size", COUNT, metavar="SIDE")
    small: bool = flag(False, "for a laptop or a quick look, with any data set: resnet18, 64 channels, "
                              "photographs of 256 pixels, crops of 129, 4 + 4 images, 3,000 iterations; "
                              "single flags override it")
    # network
    backbone: str = flag("resnet50", "resnet50 or resnet101 as in the paper; resnet18 for a laptop",
                         choices=BACKBONES)
    output_stride: int = flag(16, "8: finer features, three times the cost", choices=(8, 16))
    channels: int = flag(256, "width of the decoder; 64 for a laptop", COUNT)
    weights: str = flag("imagenet", "where the network starts: imagenet, none, a torchvision ResNet's state "
                                    "dict, or a checkpoint of train.py")
    multi_grid: bool = flag(False, "dilate the blocks of stage 4 by 1, 2 and 4 times its dilation, as the "
                                   "authors' code does")
    aux: bool = flag(False, "auxiliary head on stage 3, weight 0.4 (authors, Cityscapes)")
    # method
    supervised: bool = flag(False, "the baseline: labelled images only")
    loss: str = flag("hardness", "Table 4: equal weights (Eq. 4), or 1 - gamma (Eq. 10)",
                     choices=("standard", "hardness"))
    intensity: str = flag("hardness", "Table 4: the intensity view, as it is or blended by gamma (Eq. 8)",
                          choices=("none", "standard", "hardness"))
    cutmix: str = flag("hardness", "Table 4: random pairs half of the time, or hard-easy pairs (Eq. 9)",
                       choices=("none", "standard", "hardness"))
    hardness: str = flag("wiou", "Fig. 3(a): Eq. 7, or what it is compared with",
                         choices=("wiou", "confidence", "loss"))
    tau: float = flag(0.95, "minimum teacher confidence of a supervised pixel; lower it if `confident` "
                            "in the log stays small", PROBABILITY)
    lambda_u: float = flag(3.0, "weight of L_u in Eq. 1; lower it if mIoU falls as L_u grows", NOT_NEGATIVE)
    ema: float = flag(0.996, "alpha of Eq. 2; 0.98 to 0.99 for runs under 1,000 iterations", BELOW_1)
    ohem: bool = flag(False, "online hard example mining in L_x (authors, Cityscapes)")
    ignore_background: bool = flag(False, "class 0 has no weight in wIoU, as in the authors' code")
    as_printed: bool = flag(False, "Eq. 8 and 9 to the letter (docs/readings.md, R1 and R2)")
    as_released: bool = flag(False, "as the authors' code: --ignore-background, --multi-grid, no loss term "
                                    "for a CutMix that does not fire; on cityscapes --ohem and --aux too")
    # optimisation
    batch_size: int = flag(16, "labelled images an iteration and as many unlabelled, over all GPUs", PAIR)
    accumulate: int = flag(1, "split each GPU's part of the batch into N to fit its memory; pairs and CutMix "
                              "stay those of the whole batch", COUNT, metavar="N")
    lr: float = flag(0.01, "initial learning rate of the decoder", POSITIVE)
    encoder_lr: float = flag(0.001, "that of the encoder; equals --lr with --weights none", NOT_NEGATIVE)
    weight_decay: float = flag(1e-4, "of SGD", NOT_NEGATIVE)
    epochs: int = flag(80, "passes over the unlabelled images; for custom over the larger of the two sets, "
                           "and without this flag at least 4,000 iterations", COUNT)
    iters: int = flag(None, "iterations, instead of epochs", COUNT)
    amp: bool = flag(None, "bf16 autocast; by default on GPUs with bf16; faster on CPUs with bf16 too",
                     action=argparse.BooleanOptionalAction)
    # run
    out: str = flag(None, "folder of the run (default: runs/DATASET-SPLIT-METHOD)")
    seed: int = flag(0, "random seed", NOT_NEGATIVE)
    workers: int = flag(None, "loader threads of a rank (default: its cores, at most 8; on a CPU 0)",
                        NOT_NEGATIVE)
    eval_every: int = flag(None, "validate the teacher every so many epochs (default for custom and "
                                 "--small: 20 times a run)", COUNT, metavar="EPOCHS")
    log_every: int = flag(10, "a line in metrics.jsonl every N iterations", COUNT, metavar="N")
    checkpoint_every: int = flag(None, "write last.pth every N iterations (default: 2,000; on a CPU 200)",
                                 COUNT, metavar="N")
    # without a flag
    least_iters: int = 0  # of a run without --epochs
    window: int | None = None  # side of the sliding windows in evaluation; None: the whole image in one pass
    cuda: bool = False
    default_amp: bool = False


GROUPS = {"dataset": "data", "backbone": "network", "supervised": "method", "batch_size": "optimisation",
          "out": "run"}  # the first setting of each group in --help
# GiB by backbone: the weights, and what a step keeps of an image of 513 x 513 at output stride 16 and 8.
MEMORY = {"resnet18": (0.25, {16: 0.28, 8: 0.41}), "resnet34": (0.40, {16: 0.34, 8: 0.53}),
          "resnet50": (0.60, {16: 0.65, 8: 1.17}), "resnet101": (0.88, {16: 0.87, 8: 2.0})}
# What a checkpoint given as --weights settles unless a flag says otherwise.
FROM_CHECKPOINT = ("backbone", "channels", "output_stride", "multi_grid", "image_size", "crop_size")


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would exit."""

    def error(self, message):
        raise InputError(f"{message}; see python train.py --help")


def protocol(dataset, small=False):
    """The Settings of --dataset and --small, without any other flag."""
    settings = Settings(**{"dataset": dataset} | PROTOCOLS[dataset])
    return replace(settings, small=True, **SMALL) if small else settings


def parse_arguments(argv=None):
    """The Settings that the flags give, over those of the protocol. Raises InputError, naming the flag."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=PROTOCOLS, default="shapes")
    first.add_argument("--small", action="store_true")
    defaults = protocol(**vars(first.parse_known_args(argv)[0]))
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    description="Train HagSeg, the rows of its Table 4, or the supervised baseline. The "
                                "defaults are those of --dataset: python train.py --dataset voc --help "
                                "shows VOC's.")
    for f in fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        if "help" in f.metadata:
            add_flag(group, f, getattr(defaults, f.name))
    given = vars(parser.parse_args(argv))
    args = Settings(**vars(defaults) | given)
    fill_in(args, given)
    check(args, given)
    return args


def add_flag(group, setting, default):
    """Add the flag of a field of Settings to a group of argparse's."""
    options, text = dict(setting.metadata["options"]), setting.metadata["help"].replace("%", "%%")
    if setting.type is bool:
        options.setdefault("action", "store_true")
    else:
        options.setdefault("type", setting.type)
        if default not in (None, ""):
            text += f" (default: {default})"
    group.add_argument(name_of(setting), help=text, **options)


def name_of(setting):
    return "--" + setting.name.replace("_", "-")


def fill_in(args, given):
    """Set what follows from other settings, or from the machine, in place."""
    if args.weights == "none" and "encoder_lr" not in given:
        args.encoder_lr = args.lr
    args.scale = list(args.scale)
    method = next((name for name in ("supervised", "as_printed", "as_released") if getattr(args, name)),
                  "hagseg")
    if args.as_released:
        args.ignore_background = args.multi_grid = True
        if args.dataset == "cityscapes":
            args.ohem = args.aux = True
    args.out = args.out or f"runs/{args.dataset}-{Path(args.split or 'all').stem}-{method.replace('_', '-')}"
    if args.weights not in ("imagenet", "none"):
        take_from_checkpoint(args, given)
    if "epochs" in given:
        args.iters, args.least_iters = None, 0
    args.cuda, args.default_amp = torch.cuda.is_available(), args.amp is None
    if args.default_amp:  # emulated bf16 is slower than float32
        args.amp = args.cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(max(cores // ranks_here, 1), 8) if args.cuda else 0
    if args.checkpoint_every is None:
        args.checkpoint_every = 2000 if args.cuda else 200


def take_from_checkpoint(args, given):
    """Set what FROM_CHECKPOINT names as it was in the run that --weights comes from, in place, and say it.

    A run that is resumed takes it from its own checkpoint, since that of --weights may be gone.
    """
    own = Path(args.out) / "last.pth"
    try:
        path = own if own.exists() else args.weights
        trained = torch.load(path, "cpu", weights_only=True, mmap=True)["settings"]
    except Exception:  # no checkpoint of train.py: the network says what else it can take
        return
    trained = {name: trained[name] for name in FROM_CHECKPOINT if name in trained}
    sizes = ("image_size", "crop_size") if args.small else ()  # --small fits a machine, so its sizes stay
    taken = {name: value for name, value in trained.items() if name not in (*given, *sizes)}
    differ = {name: value for name, value in trained.items() if given.get(name, value) != value}
    vars(args).update(taken)
    if taken:
        say(f"--weights {args.weights}: {described(taken)}, as that run had")
    if differ:
        say(f"warning: --weights {args.weights}: was trained with {described(differ)}; the flags differ")


def described(settings):
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def check(args, given):
    """Raise InputError for a value out of range, or for values that do not go together."""
    def demand(condition, text):
        if not condition:
            raise InputError(text)

    for f in fields(Settings):
        value, (text, lies_within) = getattr(args, f.name), f.metadata.get("within", ANY)
        for v in value if isinstance(value, list) else [value]:
            demand(v is None or lies_within(v), f"{name_of(f)} {v}: {text}")
    for one, other in (("as_printed", "as_released"), ("iters", "epochs")):
        demand(one not in given or other not in given,
               f"--{other}: not allowed with argument --{one}".replace("_", "-"))
    demand(args.scale[0] <= args.scale[1],
           f"--scale {args.scale[0]} {args.scale[1]}: two factors, the smaller first")
    demand(args.crop_size >= 2 * args.output_stride,
           f"--crop-size {args.crop_size}: too small for an output stride of {args.output_stride}; at least "
           f"{2 * args.output_stride}")
    parts = world_size() * args.accumulate
    demand(args.batch_size % parts == 0,
           f"--batch-size {args.batch_size}: cannot be split into {parts} equal parts, the ranks times "
           f"--accumulate; give a multiple of {parts}, or another --accumulate")
    demand(not args.supervised or args.batch_size > parts or (args.cuda and world_size() > 1),
           f"--batch-size {args.batch_size}: split into {parts}, the ranks times --accumulate, it leaves "
           f"BatchNorm one image at a time, and two are needed; give {2 * parts}")


def step_memory(args, ranks=1):
    """GiB that the tensors of a training step take at their peak on each of `ranks`, with 21 classes.

    Within 10 % of what was counted on tensors without content (docs/speed.md). The weights count four
    times: student, gradient, momentum and teacher.
    """
    weights, image = MEMORY[args.backbone]
    views = 0 if args.supervised else max(1, (args.intensity != "none") + (args.cutmix != "none"))
    images = args.batch_size / ranks / args.accumulate * (1 + views)  # of one forward
    kept = image[args.output_stride] * (args.crop_size / 513) ** 2
    if args.amp:
        kept *= 0.54  # logits and losses stay in float32
    return (weights + images * kept) * (3 + args.channels / 256) / 4  # the decoder's part is a quarter


def check_memory(args):
    """On a CPU, refuse a step that its memory cannot hold, by an InputError with flags under which it fits.
    Returns a line where a step fits but is large, else ""."""
    need = 1.15 * step_memory(args, world_size())  # what the tensors take does not count all
    if args.cuda or need < 1:
        return ""
    have = machine_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    size = f"a step of {args.backbone} with crops of {args.crop_size} takes about {need:.1f} GiB"
    if need > have:
        raise InputError(f"{size}, and each process has {have:.1f}; give --small, and leave out --backbone, "
                         f"--channels, --crop-size and --batch-size")
    return f"{size}, and is slow on a CPU; --small is made for one"


def machine_memory():
    """GiB of memory that this machine has, or its container is allowed."""
    if not hasattr(os, "sysconf"):  # Windows
        return float("inf")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    return total / 2 ** 30
