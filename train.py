"""HagSeg: hardness-adaptive guidance for semi-supervised semantic segmentation (Algorithm 1).

    torchrun train.py                                         the embedded data set, in minutes
    torchrun --nproc_per_node=4 train.py --dataset voc --split 1_8

The same command resumes a run that was stopped. train_step is Algorithm 1, train the loop around it;
R1 to R14 are the readings of the paper, in the README's table.
"""

import argparse
import copy
import math
import os
import re
import signal
import sys
import time
import warnings
from contextlib import closing, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from augment import blend_intensity, box_masks, cutmix, hard_easy_pairs, random_boxes
from data import (
    CUTMIX,
    IGNORE,
    PROTOCOLS,
    SPLITS,
    InputError,
    Protocol,
    TrainingDraws,
    generator,
    normalize,
    open_data,
    split_ids,
)
from hardness import (
    confidence_hardness,
    instance_hardness,
    loss_hardness,
    pixel_cross_entropy,
    pseudo_label,
    unsupervised_loss,
)
from model import BACKBONES, DeepLabV3Plus
from prepare import check_data
from ranks import average_buffers, gather, join, leave, own, rank, say, together, world_size
from run import Run, RunError, handlers_kept

# What else is said where memory, or the int that counts elements, runs out.
TOO_LARGE = ("out of memory|allocate memory|_STATUS_ALLOC_FAILED|INT_MAX elements|"
             "too large for the channels_last CUDA kernel")


def train_step(student, teacher, optimizer, batch, iteration, args):
    """One iteration of Algorithm 1, then SGD and the teacher (Eq. 2).

    student:  on its device, bare or under DDP; teacher: its average, in evaluation mode.
    batch:    this rank's part of the global batch, as TrainingDraws makes it, on the device.
    Returns (scalars, gamma) on the device, without a host-device sync of its own (DDP and
    SyncBatchNorm have theirs): the values of run.METRICS, and the hardness of the global batch, (B,),
    or None under --supervised.
    """
    bare = student.module if isinstance(student, DistributedDataParallel) else student
    gamma, views, measured = None, [], torch.zeros(4, device=batch["x"].device)
    if not args.supervised:
        gamma, views, measured = guidance(bare, teacher, batch, iteration, args)  # lines 2-6

    def micro(tensor, k):
        return tensor.chunk(args.accumulate)[k]

    optimizer.zero_grad()
    losses = []
    for k in range(args.accumulate):
        last = k == args.accumulate - 1
        with nullcontext() if last or student is bare else student.no_sync():
            loss, *parts = micro_batch_loss(  # lines 1, 7 and 8
                student, micro(batch["x"], k), micro(batch["y"], k),
                [(micro(images, k), micro(labels, k), weight) for images, labels, weight in views],
                None if gamma is None else micro(own(gamma), k), args)
            with record_function("backward"):
                (loss / args.accumulate).backward()
        losses.append(torch.stack([loss, *parts]).detach())

    with record_function("optimizer"):
        for group in optimizer.param_groups:  # poly decay, Sec. 3
            group["lr"] = group["initial_lr"] * (1 - iteration / args.iters) ** 0.9
        optimizer.step()
    with record_function("teacher"):
        if world_size() > 1 and not args.cuda:
            average_buffers(bare)
        update_teacher(teacher, bare, args.ema, iteration)
    return torch.cat([torch.stack(losses).mean(0), measured]), gamma


def guidance(student, teacher, batch, iteration, args):
    """Algorithm 1, lines 2-6: how hard each unlabelled image is, and the strong views that follow.

    Returns (gamma of the global batch (B,); this rank's strong views, as strong_views makes them;
    mean and spread of gamma, the confident ratio and whether CutMix fired, (4,)).
    """
    with torch.no_grad():
        weak, valid = normalize(batch["weak"]), batch["valid"]
        student.eval()  # R8
        assessed = [assess(student, teacher, *images, args) for images in
                    zip(weak.chunk(args.accumulate), valid.chunk(args.accumulate))]
        student.train()
        gamma, labels = (torch.cat(parts) for parts in zip(*assessed))
        gamma = gather(gamma)
        confident = ((labels != IGNORE).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)).mean()
        with record_function("augmentation"):
            views, fired = strong_views(batch, weak, labels, gamma, iteration, args)
        return gamma, views, torch.stack([gamma.mean(), gamma.std(correction=0), confident, fired])


def assess(student, teacher, weak, valid, args):
    """Algorithm 1, lines 3-5, for one micro-batch: gamma (b,) and the pseudo-labels (b, H, W)."""
    with record_function("no-gradient passes"), autocast(weak, args):
        prob_s, prob_t = student(weak).softmax(1), teacher(weak).softmax(1)  # lines 3 and 4
    with record_function("hardness"):
        return phi(prob_t, prob_s, valid, args), pseudo_label(prob_t, args.tau, valid)


def phi(prob_t, prob_s, valid, args):
    """phi of Algorithm 1, line 5: Eq. 7, or one of the alternatives of Fig. 3(a)."""
    if args.hardness == "confidence":
        return confidence_hardness(prob_t, prob_s, args.tau, valid)
    if args.hardness == "loss":
        return loss_hardness(prob_t, prob_s, valid=valid)
    ignore_class = 0 if args.ignore_background else None
    return instance_hardness(prob_t, prob_s, args.tau, valid, ignore_class)


def strong_views(batch, weak, labels, gamma, iteration, args):
    """This rank's strong views and their pseudo-labels: Eq. 8 and Eq. 9, or rows of Table 4.

    weak is the normalised weak view, `labels` its pseudo-labels, gamma the global batch's hardness.
    Returns ([(images, pseudo-labels, weight in Eq. 10), ...], whether CutMix fired: a float scalar).
    The pairs, u and the boxes are the global batch's (R11), so the ranks exchange images as uint8.
    """
    views, fired = [], gamma.new_zeros(())
    if args.intensity != "none":
        strong = normalize(batch["strong"])
        if args.intensity == "hardness":
            strong = blend_intensity(weak, strong, own(1 - gamma if args.as_printed else gamma))  # Eq. 8
        views.append((strong, labels))
    if args.cutmix != "none":
        rng = generator(args.seed, CUTMIX, iteration)
        u, size = rng.random(), labels.shape[-1]
        masks = box_masks(random_boxes(len(gamma), size, size, rng).to(gamma.device, non_blocking=True),
                          size, size)
        if args.cutmix == "hardness":
            partner, gamma_bar = hard_easy_pairs(gamma), gamma.mean()
            fired = u < gamma_bar if args.as_printed else u > gamma_bar  # R2
        else:
            partner = torch.from_numpy(rng.permutation(len(gamma))).to(gamma.device, non_blocking=True)
            fired = torch.full((), u < 0.5, device=gamma.device)
        mixed, mixed_labels = cutmix(gather(batch["weak"]), gather(labels), partner, masks & fired)  # Eq. 9
        views.append((normalize(own(mixed)), own(mixed_labels)))
    views, fired = views or [(weak, labels)], fired.float()
    weights = [1 / len(views)] * len(views)
    if args.as_released and len(views) == 2:  # the term of a CutMix that did not fire is left out (R7)
        weights = [1 - fired / 2, fired / 2]
    return [(*view, weight) for view, weight in zip(views, weights)], fired


def micro_batch_loss(student, x, y, views, gamma, args):
    """Algorithm 1, lines 1, 7 and 8, for one micro-batch: the scalars L, L_x and L_u.

    x, y: labelled images and labels as uint8; views: [(images, pseudo-labels, weight), ...], none
    under --supervised; gamma: (b,). The student sees all images in one forward.
    """
    with record_function("student forward"), autocast(x, args):
        logits = student(torch.cat([normalize(x), *(images for images, *_ in views)]))
    with record_function("loss"):
        logits, auxiliary = logits if args.aux else (logits, None)
        logits_x, *logits_u = logits.split(len(x))
        loss_x = supervised_loss(logits_x, y, args)
        if args.aux:
            loss_x = loss_x + 0.4 * supervised_loss(auxiliary[:len(x)], y, args)
        loss_u = torch.zeros_like(loss_x)
        if views:
            gamma = gamma * (args.loss == "hardness")  # 0 makes Eq. 10 Eq. 4
            _, pseudo_labels, weights = zip(*views)
            loss_u = unsupervised_loss(logits_u, pseudo_labels, gamma, weights)
        return loss_x + args.lambda_u * loss_u, loss_x, loss_u  # Eq. 1


def supervised_loss(logits, labels, args):
    """L_x, Eq. 3: divided by all H x W pixels of a crop, so that it is the same on 1 or 8 ranks."""
    return ohem_loss(logits, labels, args) if args.ohem else pixel_cross_entropy(logits, labels).mean()


def ohem_loss(logits, labels, args):
    """Online hard example mining, as the authors ran Cityscapes: the mean over the pixels whose class
    has a probability below 0.7, or over a rank's 100,000 hardest if those are fewer."""
    loss = nn.functional.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none").flatten()
    bound = loss.topk(min(100_000 // args.accumulate, len(loss))).values[-1]
    hard = (labels != IGNORE).flatten() & (loss >= bound.clamp(max=-math.log(0.7)))
    return (loss * hard).sum() / hard.sum().clamp(min=1)


@torch.no_grad()
def update_teacher(teacher, student, alpha, iteration):
    """Eq. 2, with alpha = min(alpha, 1 - 1/(t + 1)) as in Mean Teacher; buffers likewise (R9)."""
    alpha = min(alpha, 1 - 1 / (iteration + 1))
    theta_t, theta_s = ([v for v in (*network.parameters(), *network.buffers()) if v.is_floating_point()]
                        for network in (teacher, student))
    torch._foreach_lerp_(theta_t, theta_s, 1 - alpha)  # alpha theta_t + (1 - alpha) theta_s


def autocast(images, args):
    return torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp)


def train(args, device):
    """Set up a run, or resume the one in args.out; then the loop of Algorithm 1, and its result."""
    # Data: what is labelled, and whether all of it is fit to train on.
    data = together(open_data, args.dataset, args.data_root)
    labelled, unlabelled = together(split_ids, data, args.dataset, args.split)
    notes = together(demand_fit_data, args, data, labelled, unlabelled)
    draws = TrainingDraws(data, labelled, [] if args.supervised else unlabelled, args.batch_size,
                          args.crop_size, args.seed, args.scale, args.image_size,
                          strong=args.intensity != "none")
    epoch = math.ceil(len(unlabelled or labelled) / args.batch_size)  # iterations of a pass
    if args.iters:
        args.epochs = None
    else:
        args.iters = args.epochs * epoch

    # The networks, and the run's folder with the iteration to start from.
    student, bare, teacher, optimizer = build_networks(args, len(data.classes), device)
    run = Run(args, data, draws, bare, teacher, optimizer, device)
    say(f"{args.dataset}: {len(labelled)} labelled, {len(draws.unlabelled)} unlabelled and "
        f"{len(data.val)} validation images, {len(data.classes)} classes"
        + "".join(f"\n{note}" for note in (*notes, getattr(bare, "note", "")) if note)
        + f"\n{args.iters} iterations on {world_size()} x {device.type}, into {args.out}"
        + (f"\nresumes at iteration {run.start} of {args.iters}" if run.start else ""))

    # The loop.
    with closing(run.batches()) as batches:
        for iteration, batch in batches:
            scalars, gamma = train_step(student, teacher, optimizer, batch, iteration, args)
            run.record(iteration, scalars, gamma)
            done = iteration + 1
            if done % args.log_every == 0 or done == args.iters:
                run.log(done)
            if done % (args.eval_every * epoch) == 0 or done == args.iters:
                run.validate(done)
            if done % args.checkpoint_every == 0 or done == args.iters:
                run.save("last.pth", done)
    run.report()


def build_networks(args, num_classes, device):
    """(student, bare, teacher, optimizer): bare is the student without its DDP.

    The pretrained weights are read on rank 0 alone; all ranks start with its weights and buffers.
    """
    def build():
        fresh = rank() == 0 and not (Path(args.out) / "last.pth").exists()  # others get them from there
        try:
            return DeepLabV3Plus(num_classes, args.backbone, args.output_stride, args.channels,
                                 args.weights if fresh else None, args.aux, args.multi_grid)
        except (ValueError, OSError) as error:
            raise InputError(str(error)) from None

    torch.manual_seed(args.seed)
    bare = together(build).to(device, memory_format=torch.channels_last)
    if world_size() > 1:
        for tensor in bare.state_dict().values():
            dist.broadcast(tensor, 0)
    teacher = copy.deepcopy(bare).eval().requires_grad_(False)
    if world_size() > 1 and args.cuda:
        bare = nn.SyncBatchNorm.convert_sync_batchnorm(bare)
    encoder = list(bare.encoder_parameters())
    decoder = [p for p in bare.parameters() if all(p is not q for q in encoder)]
    optimizer = torch.optim.SGD(
        [{"params": encoder, "lr": args.encoder_lr, "initial_lr": args.encoder_lr},
         {"params": decoder, "lr": args.lr, "initial_lr": args.lr}],
        lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    student = bare.train()
    if world_size() > 1:
        warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)  # torch 2.6 has no other
        student = DistributedDataParallel(student, broadcast_buffers=False,
                                          gradient_as_bucket_view=True)
    return student, bare, teacher, optimizer


def demand_fit_data(args, data, labelled, unlabelled):
    if rank() != 0:
        return []
    found = check_data(data, labelled, unlabelled, args.supervised)
    if found.problems:
        more = len(found.problems) - 1
        raise InputError(found.problems[0] + f" (and {more} more: {data.command('prepare.py')})" * bool(more))
    return found.notes


def parse_arguments(argv=None):
    """The settings of a run: the flags, and the data set's protocol (data.PROTOCOLS) under them."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message}; see python train.py --help")

    def default(name):  # of all data sets, and of those that differ
        usual = getattr(Protocol(), name)
        return f"default: {usual}" + "".join(
            f", {dataset} {getattr(protocol, name)}" for dataset, protocol in PROTOCOLS.items()
            if getattr(protocol, name) != usual)

    parser = Parser(description="Train HagSeg, the rows of its Table 4, or the supervised baseline.")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=PROTOCOLS, default="shapes",
        help="shapes (default) is drawn on the fly; custom is a folder of your own")
    add("--data-root",
        help="folder of the data set, as its archive unpacks it (default: data/NAME; voc_classic data/voc)")
    add("--split",
        help=f"which images are labelled: {', '.join(SPLITS)}, or a file of ids; custom without it: "
             f"every image that has a mask (default: 1_8, shapes 1_16)")
    add("--crop-size", type=int,
        help=f"side of the training crops ({default('crop_size')})")
    add("--scale", type=float, nargs=2, metavar=("MIN", "MAX"),
        help=f"range of the random scale; lower MAX if objects fill the crop ({default('scale')})")
    add("--image-size", type=int, metavar="SIDE",
        help="shrink images to this longer side: for photographs much larger than the crop, and for "
             "small machines; results are still given at the images' own size")

    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=BACKBONES,
        help=f"resnet50 or resnet101 as in the paper; resnet18 for a laptop ({default('backbone')})")
    add("--output-stride", type=int, choices=(8, 16),
        help=f"8 sees finer, and costs three times as much ({default('output_stride')})")
    add("--channels", type=int,
        help=f"width of the decoder; 64 for a laptop ({default('channels')})")
    add("--weights",
        help=f"where the network starts: imagenet, none, a torchvision ResNet's state dict, or a "
             f"checkpoint of train.py ({default('weights')})")
    add("--multi-grid", action="store_true",
        help="dilate the three blocks of stage 4 by 1, 2 and 4 times, as the authors' code does")
    add("--aux", action="store_true",
        help="auxiliary head on stage 3, weight 0.4 (authors, Cityscapes)")

    method = parser.add_argument_group("method")
    add = method.add_argument
    add("--supervised", action="store_true",
        help="the baseline: labelled images only")
    add("--loss", choices=("standard", "hardness"), default="hardness",
        help="Table 4: equal weights (Eq. 4), or 1 - gamma (Eq. 10, default)")
    add("--intensity", choices=("none", "standard", "hardness"), default="hardness",
        help="Table 4: the intensity view, as it is or blended by gamma (Eq. 8, default)")
    add("--cutmix", choices=("none", "standard", "hardness"), default="hardness",
        help="Table 4: random pairs half of the time, or hard-easy pairs by gamma (Eq. 9, default)")
    add("--hardness", choices=("wiou", "confidence", "loss"), default="wiou",
        help="Fig. 3(a): Eq. 7 (default), or what it is compared with")
    add("--tau", type=float,
        help=f"confidence that a pixel needs to supervise; lower it if the confident ratio in the log "
             f"stays small ({default('tau')})")
    add("--lambda-u", type=float,
        help=f"weight of L_u in Eq. 1; lower it if mIoU falls as L_u grows ({default('lambda_u')})")
    add("--ema", type=float,
        help=f"alpha of Eq. 2; 0.98 to 0.99 for runs under 1,000 iterations ({default('ema')})")
    add("--ohem", action="store_true",
        help="online hard example mining in L_x (authors, Cityscapes)")
    add("--ignore-background", action="store_true",
        help="class 0 weighs nothing in wIoU, as in the authors' code")
    reading = method.add_mutually_exclusive_group()
    reading.add_argument("--as-printed", action="store_true",
        help="Eq. 8 and 9 literally (README, R1 and R2)")
    reading.add_argument("--as-released", action="store_true",
        help="as the authors' code: --ignore-background, --multi-grid, no term for a CutMix that does "
             "not fire; on cityscapes --ohem and --aux too")

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--batch-size", type=int,
        help=f"labelled images an iteration, and as many unlabelled ones, over all GPUs together "
             f"({default('batch_size')})")
    add("--accumulate", type=int, default=1, metavar="N",
        help="split each GPU's part of the batch into N to fit its memory; pairs and CutMix stay those "
             "of the whole batch")
    add("--lr", type=float,
        help=f"of the decoder, at the start ({default('lr')})")
    add("--encoder-lr", type=float,
        help=f"of the encoder ({default('encoder_lr')}; --lr if the encoder starts at random)")
    add("--weight-decay", type=float,
        help=default("weight_decay"))
    length = optimisation.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int,
        help=f"passes over the unlabelled images ({default('epochs')})")
    length.add_argument("--iters", type=int,
        help="iterations, instead of epochs")
    add("--amp", action=argparse.BooleanOptionalAction, default=None,
        help="bf16 autocast (default: on GPUs that have bf16); on a CPU it pays with bf16 instructions")

    add = parser.add_argument_group("run").add_argument
    add("--out",
        help="folder of the run (default: runs/DATASET-SPLIT-METHOD)")
    add("--seed", type=int, default=0,
        help="everything that is random follows from it")
    add("--workers", type=int,
        help="loader processes of a rank (default: its cores, at most 12; on a CPU 0)")
    add("--eval-every", type=int, metavar="EPOCHS",
        help=f"validate the teacher every so many epochs ({default('eval_every')})")
    add("--log-every", type=int, default=10, metavar="N",
        help="a line in metrics.jsonl every N iterations (default: 10)")
    add("--checkpoint-every", type=int, metavar="N",
        help="last.pth every N iterations (default: 2,000 on a GPU, 200 on a CPU)")
    args = parser.parse_args(argv)

    protocol = PROTOCOLS[args.dataset]
    if args.encoder_lr is None and (args.weights or protocol.weights) == "none":
        args.encoder_lr = protocol.lr if args.lr is None else args.lr
    args.data_root = args.data_root or protocol.data_root
    for name, value in vars(args).items():
        if value is None and hasattr(protocol, name):
            setattr(args, name, getattr(protocol, name))
    args.scale, args.window = list(args.scale), protocol.window
    if args.as_released:
        args.ignore_background = args.multi_grid = True
        args.ohem, args.aux = (flag or args.dataset == "cityscapes" for flag in (args.ohem, args.aux))
    reading = next((name for name in ("supervised", "as_printed", "as_released") if getattr(args, name)),
                  "hagseg").replace("_", "-")
    args.out = args.out or f"runs/{args.dataset}-{Path(args.split or 'all').stem}-{reading}"
    args.cuda = torch.cuda.is_available()
    args.default_amp = args.amp is None
    if args.default_amp:  # emulated, it crawls
        args.amp = args.cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(max(cores // ranks_here, 1), 12) if args.cuda else 0
    if args.checkpoint_every is None:
        args.checkpoint_every = 2000 if args.cuda else 200
    check_arguments(args)
    return args


def check_arguments(args):
    """Raise InputError for a value out of range, naming its flag and what would do."""
    def need(condition, text):
        if not condition:
            raise InputError(text)

    need(0 <= args.tau <= 1, f"--tau {args.tau}: a probability, 0 to 1")
    need(0 <= args.ema < 1, f"--ema {args.ema}: at least 0 and below 1")
    need(args.lambda_u >= 0, f"--lambda-u {args.lambda_u}: at least 0")
    need(args.weight_decay >= 0, f"--weight-decay {args.weight_decay}: at least 0")
    need(args.lr > 0, f"--lr {args.lr}: above 0")
    need(args.encoder_lr >= 0, f"--encoder-lr {args.encoder_lr}: at least 0")
    need(args.seed >= 0, f"--seed {args.seed}: at least 0")
    need(args.workers >= 0, f"--workers {args.workers}: at least 0")
    need(0 < args.scale[0] <= args.scale[1], f"--scale {args.scale[0]} {args.scale[1]}: two factors "
                                             f"above 0, the smaller first")
    for flag in ("channels", "accumulate", "epochs", "iters", "image_size", "eval_every", "log_every",
                 "checkpoint_every"):
        value = getattr(args, flag)
        need(value is None or value >= 1, f"--{flag.replace('_', '-')} {value}: at least 1")
    need(args.crop_size >= 2 * args.output_stride, f"--crop-size {args.crop_size}: too small for an "
         f"output stride of {args.output_stride}; at least {2 * args.output_stride}")
    need(args.batch_size >= 2, f"--batch-size {args.batch_size}: BatchNorm needs two images or more")
    ranks, share = world_size(), args.batch_size // world_size()
    need(args.batch_size % ranks == 0, f"--batch-size {args.batch_size}: {ranks} ranks cannot share "
         f"it evenly; {max(1, share) * ranks} or {(share + 1) * ranks} would work")
    need(share % args.accumulate == 0, f"--accumulate {args.accumulate}: a rank's share of {share} "
         f"images cannot be split so; "
         f"{', '.join(str(n) for n in range(1, share + 1) if share % n == 0)} would work")
    need(not args.supervised or share > args.accumulate or (args.cuda and ranks > 1),
         f"--batch-size {args.batch_size}: {ranks} ranks and --accumulate {args.accumulate} leave "
         f"BatchNorm one image at a time, and it needs two")


@handlers_kept()
def main(argv=None):
    """Run under torchrun or alone. Exit code 2 for input that cannot be trained on, 1 for a run that
    ended early, each with one line on stderr."""
    try:
        device = join()
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        train(together(parse_arguments, argv), device)
    except (InputError, RunError) as error:  # on all ranks
        if rank() == 0:
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        together(tuple)  # wait for it: where one rank has ended, torchrun ends the others
        leave()
        sys.exit(1 if isinstance(error, RunError) else 2)
    except RuntimeError as error:  # on this rank, perhaps alone: torchrun ends the others
        alone = world_size() == 1
        if isinstance(error, torch.OutOfMemoryError) or re.search(TOO_LARGE, str(error)):
            if not alone:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(rank())  # where several ran out, the first alone says so
            print("train.py: out of memory; raise --accumulate, and the run resumes from its last "
                  "checkpoint; or lower --crop-size or --batch-size, with another --out", file=sys.stderr,
                  flush=True)
        elif alone or "gloo" not in str(error):  # which complains where another rank has ended
            raise
        sys.exit(1) if alone else os._exit(1)
    leave()


if __name__ == "__main__":
    main()
