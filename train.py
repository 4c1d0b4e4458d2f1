"""HagSeg: hardness-adaptive guidance for semi-supervised semantic segmentation.

    python train.py                                               the embedded data set, in minutes
    torchrun --nproc_per_node=4 train.py --dataset voc --split 1_8

The same command resumes a run that was stopped. An iteration is Algorithm 1: x are labelled images with
labels y, u unlabelled ones; A_w is the weak view, A_I the intensity view and A_C the CutMix view.

    p_s, p_t = student(A_w(u)), teacher(A_w(u))                      lines 3 and 4, without gradient
    gamma    = 1 - rho_s/2 wIoU(p_s, p_t) - rho_t/2 wIoU(p_t, p_s)   line 5: Eq. 5-7, large for hard
    z        = argmax p_t where max p_t >= tau, ignored elsewhere    the pseudo-labels
    u_I      = (1 - gamma) A_I(u) + gamma A_w(u)                     Eq. 8
    u_C, z_C = A_C(u, z) of hard-easy pairs, if coin > mean gamma    Eq. 9
    L_x      = H(student(x), y)                                      line 1: Eq. 3, H is cross-entropy
    L_u      = (1 - gamma)/2 [H(student(u_I), z) + H(student(u_C), z_C)]        line 7: Eq. 10
    L        = L_x + lambda_u L_u                                    line 8: Eq. 1, and SGD
    teacher  = alpha teacher + (1 - alpha) student                   Eq. 2

train_step is this iteration, train the loop around it. R1 to R14 are the readings of the paper
(docs/readings.md).
"""

import copy
import math
import os
import re
import sys
import time
import warnings
from contextlib import closing, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from augment import blend_intensity, box_masks, cutmix, hard_easy_pairs, random_boxes
from batches import CUTMIX, TrainingDraws, generator, normalize
from check import check_data
from data import IGNORE, InputError, open_data, split_ids
from evaluate import autocast
from hardness import (confidence_hardness, instance_hardness, loss_hardness, pixel_cross_entropy,
                      pseudo_label, unsupervised_loss)
from model import DeepLabV3Plus, update_teacher
from ranks import (average_buffers, command_line, demand_same_lists, gather, join, own, rank, say, together,
                   world_size)
from run_folder import Run
from settings import check_memory, parse_arguments

# torch's messages where memory runs out, or where an int cannot count the elements.
TOO_LARGE = ("out of memory|allocate memory|_STATUS_ALLOC_FAILED|INT_MAX elements|"
             "too large for the channels_last CUDA kernel")


def train_step(student, teacher, optimizer, batch, iteration, args):
    """Algorithm 1 on one mini-batch, then SGD on the student and Eq. 2 on the teacher.

    student:  on its device, bare or under DDP.
    teacher:  its running average, in evaluation mode.
    batch:    this rank's part of the global batch, as TrainingDraws makes it, on the device.
    Returns (scalars, gamma) on the device: the values of run_folder.METRICS, and the hardness of the
    global batch, (B,), or None under --supervised. No host-device sync but those of DDP and SyncBatchNorm.
    """
    bare = student.module if isinstance(student, DistributedDataParallel) else student
    # What the student sees, what supervises it, and how much each strong view weighs in Eq. 10.
    images, labels, weights = [batch["x"]], [batch["y"]], []
    gamma, hardness = None, torch.zeros(len(batch["x"]), device=batch["x"].device)
    measured = hardness.new_zeros(4)

    # Lines 2-6: the hardness of each unlabelled image, and the strong views that follow from it.
    if not args.supervised:
        weak, valid = normalize(batch["weak"]), batch["valid"]
        gamma, pseudo_labels = assess(bare, teacher, weak, valid, args)
        views, fired = strong_views(batch, weak, pseudo_labels, gamma, iteration, args)
        del weak  # else it would take memory until the step ends
        for view, supervising, weight in views:
            images.append(view)
            labels.append(supervising)
            weights.append(weight)
        if args.loss == "hardness":  # with zeros, Eq. 10 is Eq. 4
            hardness = own(gamma)
        confident = ((pseudo_labels != IGNORE).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)).mean()
        measured = torch.stack([gamma.mean(), gamma.std(correction=0), confident, fired])

    # Lines 1, 7 and 8: the loss and its gradient, a micro-batch at a time.
    optimizer.zero_grad()
    losses = []
    for i in micro_batches(len(hardness), args.accumulate):
        last = i.stop == len(hardness)
        with nullcontext() if last or student is bare else student.no_sync():  # ranks add gradients once
            loss, *parts = loss_terms(student, [v[i] for v in images], [v[i] for v in labels], weights,
                                      hardness[i], args)
            (loss / args.accumulate).backward()
        losses.append(torch.stack([loss, *parts]).detach())

    # SGD, with a rate that decays with power 0.9 (Sec. 3); then the teacher.
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (1 - iteration / args.iters) ** 0.9
    optimizer.step()
    if world_size() > 1 and not args.cuda:  # where there is no SyncBatchNorm
        average_buffers(bare)
    update_teacher(teacher, bare, args.ema, iteration)
    return torch.cat([torch.stack(losses).mean(0), measured]), gamma


def micro_batches(images, accumulate):
    """The slices into which --accumulate splits a rank's images."""
    size = images // accumulate
    return [slice(start, start + size) for start in range(0, images, size)]


@torch.no_grad()
def assess(student, teacher, weak, valid, args):
    """Lines 2-6 of Algorithm 1: how hard each unlabelled image is, and its pseudo-labels.

    student:      bare: DDP is only for passes with gradient.
    weak, valid:  this rank's normalised weak views (b, 3, H, W), and their map of what is no padding.
    Returns (gamma of the global batch (B,), this rank's pseudo-labels (b, H, W) uint8).
    """
    student.eval()  # R8, BatchNorm in evaluation mode
    gamma, labels = [], []
    for i in micro_batches(len(weak), args.accumulate):
        with autocast(weak.device, args.amp):
            prob_s = student(weak[i]).softmax(1)  # line 3
            prob_t = teacher(weak[i]).softmax(1)  # line 4
        gamma.append(phi(prob_t, prob_s, valid[i], args))  # line 5
        labels.append(pseudo_label(prob_t, args.tau, valid[i]))
    student.train()
    return gather(torch.cat(gamma)), torch.cat(labels)


def phi(prob_t, prob_s, valid, args):
    """phi of line 5: Eq. 7, or one of the alternatives of Fig. 3(a). (b, C, H, W) twice -> (b,)."""
    if args.hardness == "confidence":
        return confidence_hardness(prob_t, prob_s, args.tau, valid)
    if args.hardness == "loss":
        return loss_hardness(prob_t, prob_s, valid=valid)
    return instance_hardness(prob_t, prob_s, args.tau, valid, 0 if args.ignore_background else None)


@torch.no_grad()
def strong_views(batch, weak, labels, gamma, iteration, args):
    """This rank's strong views: those of Eq. 8 and Eq. 9, or of a row of Table 4.

    weak: the normalised weak views; labels: their pseudo-labels; gamma: the global batch's hardness.
    Returns ([(images, pseudo-labels, weight in Eq. 10), ...], whether CutMix fired: a float scalar).
    """
    views, fired = [], gamma.new_zeros(())
    if args.intensity != "none":
        strong = normalize(batch["strong"])
        if args.intensity == "hardness":  # Eq. 8; R1, the strong view weighs 1 - gamma
            strong = blend_intensity(weak, strong, own(1 - gamma if args.as_printed else gamma))
        views.append((strong, labels))
    if args.cutmix != "none":
        mixed, mixed_labels, fired = cutmix_view(batch["weak"], labels, gamma, iteration, args)
        views.append((mixed, mixed_labels))
    views = views or [(weak, labels)]  # neither: the weak view itself
    weights = [1 / len(views)] * len(views)  # the 2 of Eq. 10
    if args.as_released and len(views) == 2:  # R7, a CutMix that did not fire has no term
        weights = [1 - fired / 2, fired / 2]
    return [(*view, weight) for view, weight in zip(views, weights)], fired


def cutmix_view(weak, labels, gamma, iteration, args):
    """Eq. 9: (A_C(u) normalised, its pseudo-labels, whether CutMix fired: a float scalar).

    weak, labels: this rank's weak views and pseudo-labels, uint8. The pairs, the coin and the boxes are
    those of the global batch (R11, over all GPUs), for which the ranks exchange both.
    """
    rng, size = generator(args.seed, CUTMIX, iteration), labels.shape[-1]
    coin, boxes = rng.random(), random_boxes(len(gamma), size, size, rng)
    if args.cutmix == "hardness":
        partner, gamma_bar = hard_easy_pairs(gamma), gamma.mean()
        fired = coin < gamma_bar if args.as_printed else coin > gamma_bar  # R2, fires for easy batches
    else:  # standard: random pairs, half of the time
        partner = torch.from_numpy(rng.permutation(len(gamma))).to(gamma.device, non_blocking=True)
        fired = torch.full((), coin < 0.5, device=gamma.device)
    masks = box_masks(boxes.to(gamma.device, non_blocking=True), size, size) & fired
    mixed, mixed_labels = cutmix(gather(weak), gather(labels), partner, masks)
    return normalize(own(mixed)), own(mixed_labels), fired.float()


def loss_terms(student, images, labels, weights, gamma, args):
    """Lines 1, 7 and 8 of Algorithm 1 on a micro-batch of b + b images: the scalars L, L_x and L_u.

    images:  [x, *views], what the student sees in one forward: x (b, 3, H, W) uint8, views normalised.
    labels:  what supervises each of them, (b, H, W) uint8; weights: those of the views in Eq. 10.
    gamma:   (b,).
    """
    (x, *views), (y, *pseudo_labels) = images, labels
    with autocast(x.device, args.amp):
        logits = student(torch.cat([normalize(x), *views]))
    logits, auxiliary = logits if args.aux else (logits, None)
    logits_x, *logits_u = logits.split(len(x))
    loss_x = supervised_loss(logits_x, y, args)  # line 1
    if args.aux:
        loss_x = loss_x + 0.4 * supervised_loss(auxiliary[:len(x)], y, args)
    loss_u = unsupervised_loss(logits_u, pseudo_labels, gamma, weights)  # line 7
    return loss_x + args.lambda_u * loss_u, loss_x, loss_u  # line 8: Eq. 1


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


def train(args, device):
    """Set up a run, or resume the one in args.out; then the loop of Algorithm 1, and its result."""
    # Data: what is labelled, and whether all of it is fit to train on.
    data = together(open_data, args.dataset, args.data_root)
    labelled, unlabelled = together(split_ids, data, args.dataset, args.split)
    demand_same_lists({"labelled images": labelled, "unlabelled images": unlabelled,
                       "validation images": data.val, "classes": data.classes})
    notes = together(demand_fit_data, args, data, labelled, unlabelled)
    draws = TrainingDraws(data, labelled, [] if args.supervised else unlabelled, args.batch_size,
                          args.crop_size, args.seed, args.scale, args.image_size,
                          strong=args.intensity != "none")
    larger = max(len(labelled), len(unlabelled)) if args.dataset == "custom" else len(unlabelled or labelled)
    epoch = math.ceil(larger / args.batch_size)  # iterations of a pass
    if args.iters:
        args.epochs = None
    else:
        args.iters = max(args.epochs * epoch, args.least_iters)
    eval_every = args.eval_every * epoch if args.eval_every else math.ceil(args.iters / 20)

    # The networks, and the run's folder with the iteration to start from.
    student, bare, teacher, optimizer = build_networks(args, len(data.classes), device)
    run = Run(args, data, draws, bare, teacher, optimizer, device)
    say(f"{args.dataset}: {len(labelled)} labelled, {len(draws.unlabelled)} unlabelled and "
        f"{len(data.val)} validation images, {len(data.classes)} classes")
    for note in filter(None, [*notes, getattr(bare, "note", "")]):
        say(note)
    say(f"{args.iters} iterations on {world_size()} x {device.type}, into {args.out}")
    if run.start:
        say(f"resumes at iteration {run.start} of {args.iters}")

    # The loop.
    with closing(run.batches()) as batches:
        for iteration, batch in batches:
            scalars, gamma = train_step(student, teacher, optimizer, batch, iteration, args)
            run.record(iteration, scalars, gamma)
            done = iteration + 1
            if done == 1 or done % args.log_every == 0 or done == args.iters:
                run.log(done)
            if done % eval_every == 0 or done == args.iters:
                run.validate(done)
            if done % args.checkpoint_every == 0 or done == args.iters:
                run.save("last.pth", done)
    run.report()


def build_networks(args, num_classes, device):
    """(student, bare, teacher, optimizer): bare is the student without its DDP.

    The pretrained weights are read on rank 0 alone; all ranks start with its weights and buffers.
    """
    def build():
        fresh = rank() == 0 and not os.path.exists(f"{args.out}/last.pth")  # else the weights come from there
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
        warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)  # 2.6 has no other flag
        student = DistributedDataParallel(student, broadcast_buffers=False,
                                          gradient_as_bucket_view=True)
    return student, bare, teacher, optimizer


def demand_fit_data(args, data, labelled, unlabelled):
    if rank() != 0:
        return []
    found = check_data(data, labelled, unlabelled, args.supervised)
    if found.problems:
        first, *more = found.problems
        if more:
            split = ["--split", args.split] if args.split else []
            first += f" (and {len(more)} more: {data.command('prepare.py', *split)})"
        raise InputError(first)
    return found.notes


@command_line
def main(argv=None):
    """Run under torchrun or alone. Exit code 2 for input that cannot be trained on, 1 for a run that
    ended early, each with one line on stderr."""
    device = join()
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        args = together(parse_arguments, argv)
        if note := together(check_memory, args):
            say(note)
        train(args, device)
    except RuntimeError as error:  # on this rank, perhaps alone: torchrun ends the others
        alone = world_size() == 1
        if isinstance(error, torch.OutOfMemoryError) or re.search(TOO_LARGE, str(error)):
            time.sleep(rank())  # where several ran out, the first alone says so
            print("train.py: out of memory; raise --accumulate, and the run resumes from its last "
                  "checkpoint; or lower --crop-size or --batch-size, with another --out", file=sys.stderr,
                  flush=True)
        elif alone or "gloo" not in str(error):  # which complains where another rank has ended
            raise
        sys.exit(1) if alone else os._exit(1)


if __name__ == "__main__":
    main()
