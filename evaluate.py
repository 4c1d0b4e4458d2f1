"""Mean IoU on a validation set, sliding windows (Sec. 3) and pictures (Fig. 3b).

    python evaluate.py CHECKPOINT                       per-class IoU on the run's validation set
    python evaluate.py CHECKPOINT --list FILE           on other images, such as a test set
    python evaluate.py CHECKPOINT --pictures DIR        with image | ground truth | prediction panels
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from batches import loaded, normalize, picture_to_tensor
from check import check_classes, check_files
from data import IGNORE, InputError, open_data, read_list, reading, short_list
from model import DeepLabV3Plus
from ranks import join, leave, rank, say, sum_over_ranks, together, world_size

WHOLE_IMAGE_PIXELS = 2048 * 1024  # a larger image goes through windows, so that memory is bounded


def confusion_matrix(prediction, target, num_classes, ignore_index=IGNORE):
    """Counts of pixels, (C, C) int64: row is the true class, column the predicted one.

    prediction, target: integer maps of one shape; pixels whose target is ignore_index are left out.
    """
    seen = target != ignore_index
    index = target[seen].long() * num_classes + prediction[seen].long()
    return torch.bincount(index, minlength=num_classes ** 2).view(num_classes, num_classes)


def mean_iou(confusion):
    """(mean, per class (C,)) IoU in [0, 1], float64, of a (C, C) confusion matrix.

    A class that occurs neither in the truth nor in the prediction is nan, and not in the mean.
    """
    confusion = confusion.double()
    intersection = confusion.diagonal()
    iou = intersection / (confusion.sum(0) + confusion.sum(1) - intersection)
    return iou.nanmean().item(), iou


def predict(model, image, window=None, max_side=None):
    """The class map (H, W), uint8, of one image (3, H, W), uint8, on the model's device.

    window:     side of the sliding windows; None: the whole image in one pass, unless it has more
                than WHOLE_IMAGE_PIXELS.
    max_side:   the image is shrunk until its longer side is this, and the logits are enlarged to
                the image's own size before the classes are taken (behind windows: the classes are).
    """
    size = image.shape[-2:]
    image, window = network_input(model, image, window, max_side)
    if window:
        _, labels = sliding_window(model, image, window)
        return labels if labels.shape == size else F.interpolate(labels[None, None], size)[0, 0]
    logits = model(image)
    if logits.shape[-2:] == size:
        return logits.argmax(1)[0].to(torch.uint8)
    labels = torch.zeros(size, dtype=torch.uint8, device=image.device)
    best = torch.full(size, -math.inf, device=image.device)
    for c in range(logits.shape[1]):  # a class at a time: C maps of a large photograph would not fit
        score = F.interpolate(logits[:, c:c + 1], size, mode="bilinear")[0, 0]
        labels.masked_fill_(score > best, c)
        best = torch.maximum(best, score)
    return labels


def confidence_map(model, image, window=None, max_side=None):
    """(confidence (h, w) in [0, 1], labels (h, w) uint8): each pixel's highest probability and its
    class, at the size that the network sees. Arguments as predict's."""
    image, window = network_input(model, image, window, max_side)
    if window:
        return sliding_window(model, image, window)
    confidence, labels = model(image).softmax(1)[0].max(0)
    return confidence, labels.to(torch.uint8)


def network_input(model, image, window, max_side):
    """An image (3, H, W), uint8, as the model sees it, (1, 3, h, w), and the window, or None for a
    single pass."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    image = normalize(image[None])
    longer = max(image.shape[-2:])
    if max_side and longer > max_side:
        small = [max(1, round(side * max_side / longer)) for side in image.shape[-2:]]
        image = F.interpolate(image, small, mode="bilinear", antialias=True)
    height, width = image.shape[-2:]
    if not window and height * width > WHOLE_IMAGE_PIXELS:
        window = 769
    return image.to(dtype), window if window and max(height, width) > window else None


def sliding_window(model, image, window):
    """As confidence_map, of a (1, 3, H, W) image, over windows at two thirds' stride (Sec. 3.1), their
    softmax averaged.

    Four windows of a row make a batch. Only the rows of pixels that a later window still reaches
    are kept as scores, so memory grows with the width of an image and not with its height.
    """
    height, width = image.shape[-2:]
    tops, lefts = window_starts(height, window), window_starts(width, window)
    confidence, labels, scores = [], [], None
    for top, next_top in zip(tops, tops[1:] + [height]):
        rows = image[..., top:top + window, :]
        band = None
        for some in (lefts[i:i + 4] for i in range(0, len(lefts), 4)):
            prob = model(torch.cat([rows[..., left:left + window] for left in some])).softmax(1)
            if band is None:
                band = prob.new_zeros(prob.shape[1], rows.shape[-2], width)
            for left, p in zip(some, prob):
                band[..., left:left + window] += p
        if scores is not None:
            band[:, :scores.shape[1]] += scores
        whole, scores = band[:, :next_top - top], band[:, next_top - top:]
        best, classes = whole.max(0)
        confidence.append(best / whole.sum(0))  # the sum is the number of windows over a pixel
        labels.append(classes.to(torch.uint8))
    return torch.cat(confidence), torch.cat(labels)


def window_starts(length, window):
    """Where windows begin along a side: every two thirds of a window, the last at the border."""
    return [*range(0, length - window, math.ceil(window * 2 / 3)), max(length - window, 0)]


class ValidationImages(torch.utils.data.Dataset):
    """Item i: (image uint8 (3, H, W), its labels uint8 (H, W), id)."""

    def __init__(self, data, names):
        self.data, self.names = data, names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        name = self.names[i]
        return load_rgb(self.data, name), picture_to_tensor(self.data.mask(name)), name


def load_rgb(data, name):
    with reading(data.images[name]):
        return picture_to_tensor(data.image(name).convert("RGB"))


def validation_images(data, workers, endless=False):
    """Yields (image, labels, id) of this rank's part of data.val, once or again and again. Several
    ranks' loader processes take seconds to start, so a run has one such iterator."""
    names = data.val[rank()::world_size()]
    order = range(len(names))
    return loaded(ValidationImages(data, names), workers, batch_size=None,
                  sampler=itertools.cycle(order) if endless else order)


@torch.inference_mode()
def evaluate(networks, data, device, window=None, max_side=None, amp=False, images=None, check=None):
    """The confusion matrices (networks, C, C), int64, of this rank's part of data.val.

    Each rank takes every world-size-th image, so that each image counts once: sum_over_ranks adds
    the parts up. The networks are put into evaluation mode, and back.
    images:     what validation_images yields.
    check:      called before each image. What it raises on any rank, or an image that cannot be read,
                is raised on all ranks.
    """
    images = images or validation_images(data, workers=0)
    networks, C = list(networks), len(data.classes)
    confusions = torch.zeros(len(networks), C, C, dtype=torch.int64, device=device)

    def count(i):
        if check:
            check()
        if i >= len(data.val):  # other ranks have an image more
            return
        image, target, _ = next(images)
        image, target = image.to(device), target.to(device)
        for network, confusion in zip(networks, confusions):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                prediction = predict(network.eval(), image, window, max_side)
            confusion += confusion_matrix(prediction, target, C)

    training = [network.training for network in networks]
    for first in range(0, len(data.val), world_size()):
        together(count, first + rank())
    for network, mode in zip(networks, training):
        network.train(mode)
    return confusions


def iou_table(classes, confusions):
    """A text table of per-class IoU in percent, a column for each named confusion matrix."""
    results = {name: mean_iou(confusion) for name, confusion in confusions.items()}
    width = max(map(len, (*classes, "mean IoU")))
    lines = [" " * width + "".join(f"{name:>10}" for name in results)]
    for c, label in enumerate(classes):
        lines.append(label.ljust(width) + "".join(f"{100 * iou[c]:10.2f}" for _, iou in results.values()))
    lines.append("mean IoU".ljust(width) + "".join(f"{100 * mean:10.2f}" for mean, _ in results.values()))
    return "\n".join(lines)


def load_checkpoint(path, remedy="a last.pth or best.pth of train.py"):
    """A checkpoint of train.py as a dict. Raises InputError for anything else: give the `remedy`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises what it likes for what it cannot read
        raise InputError(f"{path}: no checkpoint that weights_only=True loads "
                         f"({type(error).__name__}); give {remedy}") from None
    if not isinstance(state, dict) or not {"settings", "classes", "student", "teacher"} <= state.keys():
        raise InputError(f"{path}: not a checkpoint of train.py; give {remedy}")
    return state


def load_model(path, student=False, device="cpu"):
    """(model, checkpoint): the teacher, or the student, of a checkpoint, in evaluation mode."""
    state = load_checkpoint(path)
    settings = state["settings"]
    try:
        model = DeepLabV3Plus(len(state["classes"]), settings["backbone"], settings["output_stride"],
                              settings["channels"], aux=settings["aux"],
                              multi_grid=settings.get("multi_grid", False))
        model.load_state_dict(state["student" if student else "teacher"])
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit its own settings ({str(error).splitlines()[-1].strip()})") \
            from None
    return model.eval().to(device, memory_format=torch.channels_last), state


def colourize(labels, palette):
    """A class map (H, W), uint8, as a Pillow palette image; 255 is white."""
    picture = Image.fromarray(np.asarray(labels, dtype=np.uint8)).convert("P")
    colours = [*palette, *[(0, 0, 0)] * (255 - len(palette)), (255, 255, 255)]
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def panel(image, *maps, palette):
    """A photograph (3, H, W), uint8, and class maps (H, W) side by side (Fig. 3b), as Pillow RGB.

    Images of less than 128 pixels a side are enlarged, so that there is something to see.
    """
    parts = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy())]
    parts += [colourize(labels.cpu(), palette).convert("RGB") for labels in maps]
    row = Image.new("RGB", (sum(p.width for p in parts) + 4 * (len(parts) - 1), parts[0].height), "white")
    for i, part in enumerate(parts):
        row.paste(part, (i * (part.width + 4), 0))
    return ImageOps.scale(row, max(1, 128 // max(image.shape[1:])), Image.Resampling.NEAREST)


@torch.inference_mode()
def panels(networks, data, names, device, window=None, max_side=None, amp=False):
    """Yields (id, panel): image | ground truth | the prediction of each network, for each id."""
    for name in names:
        image = load_rgb(data, name).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            maps = [predict(network.eval(), image, window, max_side) for network in networks]
        truth = picture_to_tensor(data.mask(name))
        yield name, panel(image, truth, *maps, palette=data.palette)


def stack(pictures, path):
    """Write Pillow images below one another into one file."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + 4 for p in pictures) - 4),
                      "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + 4
    sheet.save(path)


def chosen_ids(args, data, state):
    """(ids to evaluate, which they are): those of --list; of the run's own data its validation set, whatever
    has got a mask since; of other data what is kept for validation there, or all that has a mask."""
    lists, there = state.get("lists", {}), data.images.keys() & data.masks.keys()
    if args.list:
        names = read_list(args.list, data.images)
        unknown = [name for name in names if name not in there]
        if unknown:
            raise InputError(f"--list {args.list}: {len(unknown)} ids have no image with a mask under "
                             f"--data-root: {short_list(unknown)}; take them off the list, or give their "
                             f"--data-root")
        return names, f"of {args.list}"
    if lists and (not args.data_root or there.issuperset(lists["labelled"] + lists["val"])):
        return [name for name in lists["val"] if name in there], "of the run's validation set"
    if data.notes and args.data_root:  # nobody has told which are for validation
        return sorted(data.val + data.labelled), f"with a mask in {data.root}"
    return data.val, f"of the validation set in {data.root}"


def open_all(args, device):
    """(networks, checkpoint, data) as the flags name them; the network to evaluate is the last."""
    network, state = load_model(args.checkpoint, args.student, device)
    networks = [network]
    if args.beside:
        other, its_state = load_model(args.beside, args.student, device)
        its, ours = ((s["classes"], s["settings"]["image_size"]) for s in (its_state, state))
        if its != ours or not args.pictures:
            raise InputError(f"--beside {args.beside}: goes with --pictures DIR, and with a checkpoint of "
                             f"the same classes and --image-size")
        networks = [other, network]
    if args.data_root and state["settings"]["dataset"] == "shapes":
        raise InputError(f"--data-root {args.data_root}: {args.checkpoint} was trained on shapes, which are "
                         f"drawn; leave the flag out")
    data = open_data(state["settings"]["dataset"], args.data_root or state["settings"]["data_root"])
    if list(data.classes) != list(state["classes"]):
        raise InputError(f"{args.checkpoint}: trained on the classes {short_list(state['classes'])}, "
                         f"but --data-root holds {short_list(data.classes)}; give its own data")
    data.val, which = chosen_ids(args, data, state)
    if not data.val:
        raise InputError(f"{args.checkpoint}: its validation images are gone; give a --list of others")
    say(f"{len(data.val)} images {which}")
    seen = sorted({*data.val} & {*state.get("lists", {}).get("labelled", ())})
    if seen:
        say(f"{len(seen)} of them were labelled in training: {short_list(seen)}")
    found = check_files(data, data.val)
    if not found.problems:
        check_classes(data, "validation", data.val, 1, found)
    if found.problems:
        raise InputError(found.problems[0])
    if args.pictures and data.root and data.root.resolve() in (args.pictures / "x").resolve().parents:
        raise InputError(f"--pictures {args.pictures}: lies in {data.root}, where panels could overwrite "
                         f"masks; give a folder elsewhere")
    return networks, state, data


def main(argv=None):
    """Exit code 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint of train.py.")
    parser.add_argument("checkpoint", type=Path,
        help="last.pth or best.pth in a run's folder")
    parser.add_argument("--data-root",
        help="where the data set is, if not where training found it")
    parser.add_argument("--list", type=Path, metavar="FILE",
        help="ids to evaluate on instead of the validation set, in any form that --split takes: a test set")
    parser.add_argument("--student", action="store_true",
        help="the student instead of the teacher")
    parser.add_argument("--pictures", type=Path, metavar="DIR",
        help="write a panel of each image: image | truth | prediction")
    parser.add_argument("--beside", type=Path, metavar="CHECKPOINT",
        help="a second prediction in the panels, left of the first: a baseline's")
    parser.add_argument("--workers", type=int, default=0,
        help="loader processes")
    args = parser.parse_args(argv)
    try:
        device = join()
    except ValueError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        networks, state, data = together(open_all, args, device)
        settings = state["settings"]
        how = settings["window"], settings["image_size"], settings["amp"] and device.type == "cuda"
        confusion, = sum_over_ranks(evaluate(networks[-1:], data, device, *how,
                                             validation_images(data, args.workers)))
        say(iou_table(data.classes, {"student" if args.student else "teacher": confusion}))
        if args.pictures and rank() == 0:
            args.pictures.mkdir(parents=True, exist_ok=True)
            for name, picture in panels(networks, data, data.val, device, *how):
                picture.save(args.pictures / f"{name}.png")
    except (InputError, OSError) as error:
        if rank() == 0:
            text = error if isinstance(error, InputError) else (
                f"--pictures {args.pictures}: cannot be written ({error.strerror}); give another folder")
            print(f"evaluate.py: {text}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave()


if __name__ == "__main__":
    main()
