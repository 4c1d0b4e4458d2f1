"""HagSeg: hardness-adaptive guidance for semi-supervised semantic segmentation (Algorithm 1).

    torchrun train.py                                         the embedded data set, in minutes
    torchrun --nproc_per_node=4 train.py --dataset voc --split 1_8

The same command again goes on where it stopped. train_step is Algorithm 1; train is the loop.
"""

import argparse
import copy
import fcntl
import io
import json
import math
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.profiler import record_function

from augment import blend_intensity, box_masks, cutmix, hard_easy_pairs, random_boxes
from data import (CUTMIX, IGNORE, PROTOCOLS, SPLITS, InputError, TrainingDraws, generator, normalize,
                  open_data, problems, short_list, split_ids, training_batches)
from evaluate import evaluate, iou_table, load_checkpoint, mean_iou, panels, stack, sum_over_ranks
from hardness import (confidence_hardness, instance_hardness, loss_hardness, pixel_cross_entropy,
                      pseudo_label, unsupervised_loss)
from model import BACKBONES, DeepLabV3Plus

METRICS = ("loss", "loss_x", "loss_u", "hardness_mean", "hardness_std", "confident", "cutmix")


class RunError(Exception):
    """What ends a run that had begun: one line that says why, and how to go on."""


def train_step(student, teacher, optimizer, batch, iteration, args):
    """One iteration of Algorithm 1, then SGD and the teacher (Eq. 2).

    student:  on its device, bare or under DDP; teacher: its average, in evaluation mode.
    batch:    this rank's share of the global batch, as TrainingDraws makes it, on the device.
    Returns (scalars, gamma) on the device, which nothing here waits for (DDP may): the values of
    METRICS, and the hardness of the global batch, (B,), or None under --supervised.
    """
    network = student.module if isinstance(student, DistributedDataParallel) else student
    autocast = torch.autocast(batch["x"].device.type, torch.bfloat16, enabled=args.amp)
    views, gamma, confident, fired = [], None, 0, 0
    if not args.supervised:
        with torch.no_grad():
            # Lines 2-6: both networks on the weak views, in evaluation mode (R8), and Eq. 5-7.
            with record_function("no-gradient passes"), autocast:
                weak, valid = normalize(batch["weak"]), batch["valid"]
                network.eval()
                prob_s, prob_t = network(weak).softmax(1), teacher(weak).softmax(1)
                network.train()
            with record_function("hardness"):
                gamma = gather(hardness_of(prob_t, prob_s, valid, args))
                labels = pseudo_label(prob_t, args.tau, valid)
                confident = (labels != IGNORE).sum() / valid.sum().clamp(min=1)
                del prob_s, prob_t
            with record_function("augmentation"):
                views, fired = strong_views(batch, weak, labels, gamma, iteration, args)

    # Lines 1 and 7: one forward of the student, on labelled images and strong views together.
    losses = []
    optimizer.zero_grad()
    for k in range(args.accumulate):
        share = lambda tensor: tensor.chunk(args.accumulate)[k]
        last = k == args.accumulate - 1
        with nullcontext() if last or student is network else student.no_sync():
            with record_function("student forward"), autocast:
                x, y = normalize(share(batch["x"])), share(batch["y"])
                logits = student(torch.cat([x, *(share(images) for images, _ in views)]))
            with record_function("loss"):
                logits, auxiliary = logits if args.aux else (logits, None)
                z_x, *z_u = logits.split(len(x))
                loss_x = supervised_loss(z_x, y, args)
                if args.aux:
                    loss_x = loss_x + 0.4 * supervised_loss(auxiliary[:len(x)], y, args)
                loss_u = torch.zeros_like(loss_x)
                if views:
                    weight = share(own(gamma)) * (args.loss == "hardness")  # 0 makes it Eq. 4
                    loss_u = unsupervised_loss(z_u, [share(labels) for _, labels in views], weight)
                loss = loss_x + args.lambda_u * loss_u  # Eq. 1
            with record_function("backward"):
                (loss / args.accumulate).backward()
        losses.append(torch.stack([loss, loss_x, loss_u]).detach())

    with record_function("optimizer"):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - iteration / args.iters) ** 0.9
        optimizer.step()
    with record_function("teacher"):
        if world_size() > 1 and not args.cuda:
            average_buffers(network)
        update_teacher(teacher, network, args.ema, iteration)
    spread = [0, 0] if gamma is None else [gamma.mean(), gamma.std(correction=0)]
    scalars = [v.float() if torch.is_tensor(v) else torch.full((), v, device=loss.device, dtype=torch.float)
               for v in (*spread, confident, fired)]
    return torch.cat([torch.stack(losses).mean(0), torch.stack(scalars)]), gamma


def hardness_of(prob_t, prob_s, valid, args):
    """phi of Algorithm 1, line 5: Eq. 7, or one of the alternatives of Fig. 3(a)."""
    if args.hardness == "confidence":
        return confidence_hardness(prob_t, prob_s, args.tau, valid)
    if args.hardness == "loss":
        return loss_hardness(prob_t, prob_s, valid=valid)
    ignore_class = 0 if args.ignore_background else None
    return instance_hardness(prob_t, prob_s, args.tau, valid, ignore_class)


def strong_views(batch, weak, labels, gamma, iteration, args):
    """The strong views of this rank's share and their pseudo-labels: Eq. 8 and Eq. 9 (Table 4).

    weak is the normalised weak view, `labels` its pseudo-labels, gamma the global batch's hardness.
    Returns ([(images, pseudo-labels), ...], whether CutMix fired). The pairs, the coin and the boxes
    are the global batch's (R11), so the ranks show each other their images as uint8.
    """
    views, fired = [], 0
    if args.intensity != "none":
        strong = normalize(batch["strong"])
        if args.intensity == "hardness":
            weight = own(1 - gamma if args.as_printed else gamma)
            strong = blend_intensity(weak, strong, weight)  # Eq. 8
        views.append((strong, labels))
    if args.cutmix != "none":
        rng = generator(args.seed, CUTMIX, iteration)
        coin, size = rng.random(), labels.shape[-1]
        boxes = random_boxes(len(gamma), size, size, rng).to(gamma.device, non_blocking=True)
        if args.cutmix == "hardness":
            partner = hard_easy_pairs(gamma)
            fired = gamma.mean() > coin if args.as_printed else gamma.mean() < coin  # R2
        else:
            partner = torch.from_numpy(rng.permutation(len(gamma))).to(gamma.device, non_blocking=True)
            fired = torch.full((), coin < 0.5, device=gamma.device)
        masks = box_masks(boxes, size, size) & fired  # not fired: A^C(u) = A_w(u) (R7)
        mixed, mixed_labels = cutmix(gather(batch["weak"]), gather(labels), partner, masks)  # Eq. 9
        views.append((normalize(own(mixed)), own(mixed_labels)))
    return views or [(weak, labels)], fired


def supervised_loss(logits, labels, args):
    """L_x, Eq. 3: divided by all H x W pixels of a crop, so that it is the same on 1 or 8 ranks.

    With --ohem, as the authors ran Cityscapes: the mean over the pixels whose class has a
    probability below 0.7, or over the 100,000 hardest of a rank's share if those are fewer.
    """
    if not args.ohem:
        return pixel_cross_entropy(logits, labels).mean()
    loss = nn.functional.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    loss, seen = loss.flatten(), (labels != IGNORE).flatten()
    kept = min(100_000 // args.accumulate, len(loss))
    bound = loss.masked_fill(~seen, 0).topk(kept, sorted=True).values[-1]
    hard = seen & (loss >= bound.clamp(max=-math.log(0.7)))
    return (loss * hard).sum() / hard.sum().clamp(min=1)


def update_teacher(teacher, student, alpha, iteration):
    """Eq. 2, with alpha = min(alpha, 1 - 1/(t + 1)) as in Mean Teacher; buffers likewise (R9)."""
    average = get_ema_multi_avg_fn(min(alpha, 1 - 1 / (iteration + 1)))
    average(*([v.data for v in (*network.parameters(), *network.buffers()) if v.is_floating_point()]
              for network in (teacher, student)), None)


def average_buffers(network):
    """Give every rank the mean of the ranks' BatchNorm statistics: SyncBatchNorm needs GPUs."""
    buffers = [b for b in network.buffers() if b.is_floating_point()]
    flat = torch.cat([b.flatten() for b in buffers])
    dist.all_reduce(flat)
    for buffer, mean in zip(buffers, (flat / world_size()).split([b.numel() for b in buffers])):
        buffer.copy_(mean.view_as(buffer))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(share):
    """The ranks' shares (b, ...) of a global batch, in the order of the ranks: (B, ...)."""
    if world_size() == 1:
        return share
    whole = share.new_empty(world_size() * len(share), *share.shape[1:])
    dist.all_gather(list(whole.chunk(world_size())), share.contiguous())
    return whole


def own(whole):
    """This rank's share (b, ...) of a global batch (B, ...)."""
    return whole.chunk(world_size())[rank()]


def say(text):
    if rank() == 0:
        print(text, flush=True)


def together(function, *arguments):
    """function(*arguments) on every rank; an error on one rank is raised on all of them."""
    result = error = None
    try:
        result = function(*arguments)
    except (InputError, RunError) as caught:
        error = caught
    errors = [error] * world_size()
    if world_size() > 1:
        dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise error
    return result


def parse_arguments(argv=None):
    """The settings of a run: the flags, and the data set's protocol (data.PROTOCOLS) under them."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message}; see train.py --help")

    parser = Parser(description="Train HagSeg, the rows of its Table 4, or the supervised baseline.",
                    epilog="Settings without a default take the data set's, from PROTOCOLS in data.py.")
    add = parser.add_argument
    add("--dataset", choices=PROTOCOLS, default="shapes",
        help="shapes (default) is drawn on the fly; custom is a folder of your own")
    add("--data-root", help="folder of the data set, as its archive unpacks it (default: data/NAME)")
    add("--split", help=f"which images are labelled: {', '.join(SPLITS)}, or a file of ids; custom "
                        f"without it: every image that has a mask")
    add("--backbone", choices=BACKBONES, help="resnet50 or resnet101 as in the paper; resnet18 for a "
                                              "laptop")
    add("--output-stride", type=int, choices=(8, 16), help="8 sees finer, and costs three times as "
                                                           "much")
    add("--channels", type=int, help="width of the decoder: 256 as in the paper, 64 for a laptop")
    add("--weights", help="where the encoder starts: imagenet, none, or a torchvision state dict")
    add("--crop-size", type=int, help="side of the training crops")
    add("--scale", type=float, nargs=2, metavar=("MIN", "MAX"),
        help="range of the random scale; lower MAX if objects fill the crop")
    add("--image-size", type=int, metavar="SIDE",
        help="work on images shrunk to this longer side: for photographs much larger than the crop, "
             "and for small machines; results are still given at the images' own size")
    add("--batch-size", type=int, help="labelled images an iteration, and as many unlabelled ones, "
                                       "over all GPUs together")
    add("--accumulate", type=int, default=1, metavar="N",
        help="split each GPU's share into N to fit its memory; pairs and CutMix stay those of the "
             "whole batch")
    add("--supervised", action="store_true", help="the baseline: labelled images only")
    add("--loss", choices=("standard", "hardness"), default="hardness",
        help="Table 4: equal weights (Eq. 4), or 1 - gamma (Eq. 10)")
    add("--intensity", choices=("none", "standard", "hardness"), default="hardness",
        help="Table 4: the intensity view, as it is or blended by gamma (Eq. 8)")
    add("--cutmix", choices=("none", "standard", "hardness"), default="hardness",
        help="Table 4: random pairs half of the time, or hard-easy pairs by gamma (Eq. 9)")
    add("--hardness", choices=("wiou", "confidence", "loss"), default="wiou",
        help="Fig. 3(a): Eq. 7, or what it is compared with")
    add("--as-printed", action="store_true", help="Eq. 8 and Eq. 9 to the letter (README, R1 and R2)")
    add("--ignore-background", action="store_true",
        help="class 0 weighs nothing in wIoU, as in the authors' code")
    add("--aux", action="store_true", help="auxiliary head on stage 3, weight 0.4 (authors, Cityscapes)")
    add("--ohem", action="store_true", help="online hard example mining (authors, Cityscapes)")
    add("--tau", type=float, help="confidence that a pixel needs to supervise; lower it if the "
                                  "confident share in the log stays small")
    add("--lambda-u", type=float, help="weight of L_u in Eq. 1")
    add("--ema", type=float, help="alpha of Eq. 2; 0.98 to 0.99 for runs under 1,000 iterations")
    add("--lr", type=float, help="of the decoder, at the start")
    add("--encoder-lr", type=float, help="of the encoder (default: the data set's; --lr if the "
                                         "encoder starts at random)")
    add("--weight-decay", type=float)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="passes over the unlabelled images")
    length.add_argument("--iters", type=int, help="iterations, instead of epochs")
    add("--eval-every", type=int, metavar="EPOCHS", help="validate the teacher every so many epochs")
    add("--amp", action=argparse.BooleanOptionalAction, default=None,
        help="bf16 autocast (default: on GPUs that have bf16)")
    add("--workers", type=int, default=None, help="loader processes a GPU (default: 4, or 0 on a CPU)")
    add("--seed", type=int, default=0, help="everything that is random follows from it")
    add("--log-every", type=int, default=10, metavar="N", help="a line in metrics.jsonl every N "
                                                               "iterations")
    add("--checkpoint-every", type=int, default=200, metavar="N", help="last.pth every N iterations")
    add("--out", help="folder of the run (default: runs/DATASET-SPLIT-METHOD)")
    args = parser.parse_args(argv)

    protocol = PROTOCOLS[args.dataset]
    if args.encoder_lr is None and (args.weights or protocol.weights) == "none":
        args.encoder_lr = protocol.lr if args.lr is None else args.lr
    args.data_root = args.data_root or protocol.data_root
    for name, value in vars(args).items():
        if value is None and hasattr(protocol, name):
            setattr(args, name, getattr(protocol, name))
    args.scale, args.window = list(args.scale), protocol.window
    args.out = args.out or (f"runs/{args.dataset}-{Path(args.split or 'all').stem}-"
                            f"{'supervised' if args.supervised else 'hagseg'}")
    args.cuda = torch.cuda.is_available()
    if args.amp is None:
        args.amp = args.cuda and torch.cuda.is_bf16_supported()
    if args.workers is None:
        args.workers = 4 if args.cuda else 0
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


def train(args, device):
    """Set up a run, or find it again in args.out; then the loop of Algorithm 1, and its result."""
    # Data: what is labelled, and whether all of it is fit to train on.
    data = together(open_data, args.dataset, args.data_root)
    labelled, unlabelled = together(split_ids, data, args.dataset, args.split)
    together(check_data, args, data, labelled, unlabelled)
    draws = TrainingDraws(data, labelled, [] if args.supervised else unlabelled, args.batch_size,
                          args.crop_size, args.seed, args.scale, args.image_size,
                          strong=args.intensity != "none")
    epoch = -(-len(unlabelled or labelled) // args.batch_size)  # iterations of a pass, rounded up
    args.iters = args.iters or args.epochs * epoch
    args.epochs = None

    student, network, teacher, optimizer = build_networks(args, len(data.classes), device)

    # The run's folder, and where it stopped.
    run = together(Run, args, data, draws)
    say(f"{args.dataset}: {len(labelled)} labelled, {len(draws.unlabelled)} unlabelled and "
        f"{len(data.val)} validation images, {len(data.classes)} classes"
        + (f"\n{data.note}" if data.note else "")
        + f"\n{args.iters} iterations on {world_size()} x {device.type}, into {args.out}")
    start = run.resume(network, teacher, optimizer)
    share = args.batch_size // world_size()
    places = range(rank() * share, (rank() + 1) * share)
    batches = training_batches(draws, places, start, args.iters, args.workers, args.cuda)
    stopping = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stopping.append(True))

    def next_batch():
        if stopping:
            raise RunError("stopped by a signal")
        return next(batches)

    try:
        for iteration in range(start, args.iters):
            try:
                batch = together(next_batch)
            except (InputError, RunError) as error:
                together(run.save, "last.pth", iteration, network, teacher, optimizer)
                raise RunError(f"{error}; saved iteration {iteration}: the same command goes on") from None
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            scalars, gamma = train_step(student, teacher, optimizer, batch, iteration, args)
            run.record(iteration, scalars, gamma)

            done = iteration + 1
            if done % args.log_every == 0 or done == args.iters:
                together(run.log, done, optimizer)
            if done % (args.eval_every * epoch) == 0 or done == args.iters:
                run.validate(done, network, teacher, device)
            if done % args.checkpoint_every == 0 or done == args.iters:
                together(run.save, "last.pth", done, network, teacher, optimizer)
    finally:
        batches.close()
    result = run.folder / "result.txt"
    say(result.read_text().rstrip() if result.exists() else f"finished; {result} has been removed")


def check_data(args, data, labelled, unlabelled):
    if rank() != 0:
        return
    found = problems(data, labelled, [] if args.supervised else unlabelled)
    if found:
        more = f" (and {len(found) - 1} more: see python data.py)" if len(found) > 1 else ""
        raise InputError(found[0] + more)
    if not unlabelled and not args.supervised:
        raise InputError("no unlabelled image is left; give a smaller --split (1_8 labels every "
                         "eighth), add images without masks, or train with --supervised")


def build_networks(args, num_classes, device):
    """(student, network, teacher, optimizer): the network is the student without its DDP.

    The pretrained weights are read on rank 0 alone; all ranks start with its weights and buffers.
    """
    def build():
        try:
            return DeepLabV3Plus(num_classes, args.backbone, args.output_stride, args.channels,
                                 args.weights if rank() == 0 else None, args.aux)
        except (ValueError, OSError) as error:
            raise InputError(str(error)) from None

    torch.manual_seed(args.seed)
    network = together(build).to(device, memory_format=torch.channels_last)
    if world_size() > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    if world_size() > 1 and args.cuda:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    encoder = list(network.encoder_parameters())
    decoder = [p for p in network.parameters() if all(p is not q for q in encoder)]
    optimizer = torch.optim.SGD(
        [{"params": encoder, "lr": args.encoder_lr, "initial_lr": args.encoder_lr},
         {"params": decoder, "lr": args.lr, "initial_lr": args.lr}],
        lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    student = network.train()
    if world_size() > 1:
        warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)  # torch 2.6 has no other
        student = DistributedDataParallel(student, broadcast_buffers=False,
                                          gradient_as_bucket_view=True)
    return student, network, teacher, optimizer


class Run:
    """The folder of a run, written by rank 0: settings, logs, checkpoints, result.

    A checkpoint holds the sizes that the logs had when it was written; resuming cuts them back to
    those, so that no line stands there twice and none by half.
    """
    LOGS = ("metrics.jsonl", "hardness.csv")
    FREE = ("data_root", "out", "workers", "checkpoint_every", "cuda")  # may differ on resuming

    def __init__(self, args, data, draws):
        self.args, self.data, self.draws, self.folder = args, data, draws, Path(args.out)
        self.best = {"miou": -1.0, "iteration": 0}
        self.pending, self.rows = [], torch.empty(0, len(METRICS))  # on the device; on the host
        self.board, self.printed, self.clock = None, 0.0, (time.time(), 0)
        if rank() != 0:
            return
        settings = {k: v for k, v in vars(args).items() if k not in self.FREE}
        lists = {"labelled.txt": draws.labelled, "unlabelled.txt": draws.unlabelled}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "w")
            # Not flock: loader processes would inherit it, and outlive a killed run by seconds.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = self.folder / "settings.json"
            if before.exists():
                old = json.loads(before.read_text())
                changed = [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]
                changed += [name for name, ids in lists.items()
                            if (self.folder / name).read_text().split("\n")[:-1] != ids]
                if changed:
                    raise InputError(f"--out {self.folder}: holds a run with other settings "
                                     f"({short_list(changed, 5)}); give another --out")
            else:
                for name, ids in lists.items():
                    (self.folder / name).write_text("".join(f"{i}\n" for i in ids))
                before.with_suffix(".tmp").write_text(json.dumps(settings, indent=1))
                os.replace(before.with_suffix(".tmp"), before)  # last: with it, the lists are whole
        except BlockingIOError:
            raise InputError(f"--out {self.folder}: another live run writes there; give another --out") \
                from None
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"--out {self.folder}: cannot be used ({error}); give another --out") from None

    def resume(self, student, teacher, optimizer):
        """Restore last.pth, if there is one, on all ranks. Returns the iteration to go on with."""
        path = self.folder / "last.pth"
        state = [together(lambda: load_checkpoint(path) if rank() == 0 and path.exists() else None)]
        if world_size() > 1:
            dist.broadcast_object_list(state)
        state, = state
        sizes, start = {}, 0
        try:
            if state is not None:
                student.load_state_dict(state["student"])
                teacher.load_state_dict(state["teacher"])
                optimizer.load_state_dict(state["optimizer"])
                if list(state["classes"]) != list(self.data.classes):
                    raise ValueError(f"its classes are {short_list(state['classes'])}")
                self.best, self.rows = state["best"], state["rows"]
                sizes, start = state["log_sizes"], state["iteration"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the last checkpoint of this run "
                             f"({str(error).strip().splitlines()[-1].strip()}); give another --out") from None
        self.clock = time.time(), start
        if rank() == 0:
            for log in (self.folder / name for name in self.LOGS):
                if log.exists() and log.stat().st_size > sizes.get(log.name, 0):
                    os.truncate(log, sizes.get(log.name, 0))
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.folder / "tensorboard", purge_step=start + 1)
            except ImportError:
                pass
        if start:
            say(f"goes on from iteration {start} of {self.args.iters}")
        return start

    def record(self, iteration, scalars, gamma):
        """Keep what an iteration measured, on the device: reading it would wait for the device."""
        self.pending.append((iteration, scalars, gamma))

    def collect(self):
        """Bring what is pending to the host: into self.rows, and each image's gamma into
        hardness.csv. Raises RunError, on all ranks, for a loss that is not finite."""
        if not self.pending:
            return
        iterations, scalars, gammas = zip(*self.pending)
        self.pending = []
        rows = torch.stack(scalars)
        if world_size() > 1:
            dist.all_reduce(rows)
        rows = rows.cpu() / world_size()
        for iteration, row in zip(iterations, rows):
            bad = [name for name, value in zip(("L_x", "L_u"), row[1:3]) if not value.isfinite()]
            if bad:
                x, u = self.draws.ids(iteration)
                raise RunError(f"{' and '.join(bad)} is not finite in iteration {iteration}, with the "
                               f"labelled images {' '.join(x)}" + (f" and the unlabelled images "
                               f"{' '.join(u)}" if u else "") + "; the last checkpoint is untouched; "
                               "lower --lr, or look at these images")
        self.rows = torch.cat([self.rows, rows])
        if gammas[0] is not None:
            self.append("hardness.csv", "".join(
                f"{iteration},{name},{value:.4f}\n"
                for iteration, gamma in zip(iterations, torch.stack(gammas).tolist())
                for name, value in zip(self.draws.ids(iteration)[1], gamma)))

    def append(self, name, text):
        if rank() == 0:
            try:
                with open(self.folder / name, "a") as file:
                    file.write(text)
            except OSError as error:
                raise RunError(f"{self.folder / name}: cannot be written ({error}); make room, and "
                               f"the same command goes on from the last checkpoint") from None

    def log(self, done, optimizer):
        """The means since the last line: into metrics.jsonl, TensorBoard, and every few seconds on
        the screen."""
        self.collect()
        values = dict(zip(METRICS, self.rows.mean(0).tolist()))
        self.rows = self.rows[:0]
        now, (then, since) = time.time(), self.clock
        rate, self.clock = (done - since) / max(now - then, 1e-9), (now, done)
        record = {"iteration": done, **{name: float(f"{v:.6g}") for name, v in values.items()},
                  "lr": optimizer.param_groups[1]["lr"],
                  "images_per_second": round(rate * self.args.batch_size * (2 - self.args.supervised), 2)}
        self.append("metrics.jsonl", json.dumps(record) + "\n")
        for name, value in record.items():
            if self.board:
                self.board.add_scalar(name, value, done)
                self.board.flush()
        if now - self.printed > 4 or done == self.args.iters:
            self.printed, left = now, timedelta(seconds=round((self.args.iters - done) / rate))
            hardness = "" if self.args.supervised else (
                f"  L_u {values['loss_u']:.3f}  gamma {values['hardness_mean']:.2f}\u00b1"
                f"{values['hardness_std']:.2f}  conf {values['confident']:4.0%}  "
                f"cutmix {values['cutmix']:4.0%}")
            say(f"{self.place(done)}  L_x {values['loss_x']:.3f}{hardness}  lr {record['lr']:.4f}  "
                f"{record['images_per_second']:.1f}/s  {left}")

    def place(self, done):
        return f"{done:{len(str(self.args.iters))}}/{self.args.iters}"

    def save(self, name, done, student, teacher, optimizer=None):
        """Write a checkpoint to a temporary file and move it, so that `name` is always a whole one."""
        self.collect()
        if rank() != 0:
            return
        if not all(p.isfinite().all() for p in student.parameters()):
            raise RunError(f"the weights are not finite after iteration {done}; {name} is untouched; "
                           f"lower --lr")
        sizes = {log: (self.folder / log).stat().st_size if (self.folder / log).exists() else 0
                 for log in self.LOGS}
        state = {"settings": vars(self.args), "classes": self.data.classes,
                 "palette": self.data.palette, "iteration": done, "student": student.state_dict(),
                 "teacher": teacher.state_dict(), "optimizer": optimizer and optimizer.state_dict(),
                 "best": self.best, "rows": self.rows, "log_sizes": sizes}
        path = self.folder / name
        try:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            with open(f"{path}.tmp", "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error}); the checkpoint before is untouched: "
                           f"make room, and the same command goes on") from None

    def validate(self, done, student, teacher, device):
        """Mean IoU on val: of the teacher; after the last iteration of both, which is the result."""
        finished = done == self.args.iters
        models = (teacher, student) if finished else (teacher,)
        torch.backends.cudnn.benchmark = False  # images of many sizes: a search for each would cost
        try:
            share = together(evaluate, models, self.data, device, self.args.window,
                             self.args.image_size, self.args.workers, self.args.amp)
        except InputError as error:
            raise RunError(f"{error}; the same command goes on from the last checkpoint") from None
        torch.backends.cudnn.benchmark = True
        confusions = sum_over_ranks(share)
        miou = [mean_iou(confusion)[0] for confusion in confusions]
        record = {"iteration": done, **dict(zip(("miou_teacher", "miou_student"), miou))}
        if miou[0] > self.best["miou"]:
            self.best = {"miou": miou[0], "iteration": done}
            together(self.save, "best.pth", done, student, teacher)
        together(self.append, "metrics.jsonl", json.dumps(record) + "\n")
        say(f"{self.place(done)}  mIoU of the teacher on val {miou[0]:.2%}")
        if self.board:
            self.board.add_scalar("miou_teacher", miou[0], done)
        self.clock = time.time(), done
        if finished and rank() == 0:
            table = iou_table(self.data.classes, {"teacher": confusions[0], "student": confusions[1]})
            text = (f"{table}\nThe result is the last iteration's. The teacher's best on val was "
                    f"{self.best['miou']:.2%}, after {self.best['iteration']}.\n")
            pictures = panels([teacher], self.data, self.data.val[:8], device, self.args.window,
                              self.args.image_size)
            try:
                (self.folder / "result.txt").write_text(text)
                stack([picture for _, picture in pictures], self.folder / "predictions.png")
            except OSError as error:
                raise RunError(f"{self.folder}: cannot be written ({error}); make room, and the same "
                               f"command goes on") from None


def main(argv=None):
    """Run under torchrun or alone. Exit code 2 for input that cannot be trained on, 1 for a run that
    ended early, each with one line on stderr."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            sys.exit(f"train.py: --nproc_per_node: there are {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda")
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        train(together(parse_arguments, argv), device)
    except (InputError, RunError) as error:  # on all ranks
        if rank() == 0:
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(1 if isinstance(error, RunError) else 2)
    except RuntimeError as error:  # on this rank alone, so torchrun has to end the others
        if isinstance(error, torch.OutOfMemoryError):
            text = "out of GPU memory; raise --accumulate, or lower --crop-size or --batch-size"
        elif "DataLoader worker" in str(error):
            reason = str(error).strip().splitlines()[-1]
            text = f"a loader process died ({reason}); lower --workers, or free memory"
        else:
            raise
        print(f"train.py: {text}; the same command goes on from the last checkpoint", file=sys.stderr,
              flush=True)
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
