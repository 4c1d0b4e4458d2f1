"""Mean IoU on a validation set, sliding windows (Sec. 3) and pictures (Fig. 3b).

    python evaluate.py CHECKPOINT                       per-class IoU on the run's validation set
    python evaluate.py CHECKPOINT --list FILE           on other images, such as a test set
    python evaluate.py CHECKPOINT --pictures DIR        and pictures: image | ground truth | prediction
"""

import argparse
import math
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from batches import loaded, normalize, picture_to_tensor
from check import check_classes, check_files
from data import IGNORE, InputError, open_data, read_list, reading, short_list
from model import DeepLabV3Plus
from ranks import (command_line, demand_same_lists, join, progress, rank, say, sum_over_ranks, together,
                   world_size)

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
    max_side:   the image is shrunk to this longer side. The logits are enlarged to the image's own size
                before the classes are taken; with windows the classes themselves are enlarged.
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


def autocast(device, enabled):
    """bf16 where `enabled`, float32 otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def decoded(picture, path):
    """The pixels of an open Pillow image, uint8 (3, H, W). Raises InputError, which names its file."""
    with reading(path):
        return picture_to_tensor(picture.convert("RGB"))


def loaded_images(data, names, workers=0, check=None):
    """Yields (image uint8 (3, H, W), its labels uint8 (H, W), id) for each id."""
    def make(name):
        image = decoded(data.image(name), data.images[name])
        return image, picture_to_tensor(data.mask(name)), name
    return loaded(make, names, workers, check)


@torch.inference_mode()
def evaluate(networks, data, device, window=None, max_side=None, amp=False, workers=0, check=None,
             look=None):
    """The confusion matrices (networks, C, C), int64, of this rank's part of data.val.

    Each rank takes every world-size-th image, so that each image counts once: sum_over_ranks adds
    the parts up. The networks are put into evaluation mode, and back.
    check:      called before each image, and every second while one is waited for.
    look:       called with each image's id, the image, its labels, and the class map of each network.
    What check or look raises on any rank, or an image that cannot be read, is raised on all ranks.
    """
    images = loaded_images(data, data.val[rank()::world_size()], workers, check)
    networks, C, count = list(networks), len(data.classes), len(data.val)
    confusions = torch.zeros(len(networks), C, C, dtype=torch.int64, device=device)

    def evaluate_image(i):
        if check:
            check()
        if i >= count:  # other ranks have an image more
            return
        image, labels, name = next(images)
        image, labels = image.to(device), labels.to(device)
        with autocast(device, amp):
            maps = [predict(network.eval(), image, window, max_side) for network in networks]
        for confusion, prediction in zip(confusions, maps):
            confusion += confusion_matrix(prediction, labels, C)
        if look:
            look(name, image, labels, maps)

    training = [network.training for network in networks]
    firsts = range(0, count, world_size())
    with closing(images):
        for first in progress(firsts, "images evaluated", count, step=world_size()):
            together(evaluate_image, first + rank())
    for network, mode in zip(networks, training):
        network.train(mode)
    return confusions


def iou_table(classes, confusions):
    """A text table of per-class IoU in percent, a column for each named confusion matrix."""
    labels = [*classes, "mean IoU"]
    names = [name.rjust(max(10, len(name) + 2)) for name in confusions]
    columns = [[*iou.tolist(), mean] for mean, iou in map(mean_iou, confusions.values())]
    width = max(map(len, labels))
    lines = [label.ljust(width) + "".join(f"{100 * v:{len(name)}.2f}" for v, name in zip(values, names))
             for label, *values in zip(labels, *columns)]
    return "\n".join([" " * width + "".join(names), *lines])


def load_checkpoint(path, remedy="a last.pth or best.pth of train.py"):
    """A checkpoint of train.py as a dict. Raises InputError for anything else: give the `remedy`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"{path}: cannot be read as a checkpoint with weights_only=True "
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
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: does not fit its own settings ({reason})") from None
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last), state


def colourize(labels, palette):
    """A class map (H, W), uint8, as a Pillow palette image; 255 is white."""
    picture = Image.fromarray(np.asarray(labels, dtype=np.uint8)).convert("P")
    colours = [*palette, *[(0, 0, 0)] * (255 - len(palette)), (255, 255, 255)]
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def to_pictures(image, maps, palette, side=512):
    """A photograph (3, H, W), uint8, and class maps (H, W), as Pillow images of one size to look at: the
    longer side is at most `side`, and tiny images are enlarged."""
    height, width = image.shape[1:]
    scale = min(side / max(height, width), max(1, 192 // max(height, width)))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    smooth = Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST
    photograph = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    return [photograph.resize(size, smooth),
            *(colourize(labels.cpu(), palette).resize(size, Image.Resampling.NEAREST) for labels in maps)]


def panel(rows, headings, classes, palette):
    """A picture as in Fig. 3(b), Pillow RGB, with headings above its columns, and a legend. Each row is a
    photograph (3, H, W), uint8, and class maps (H, W)."""
    pictures, present = [], set()
    for image, *maps in rows:
        pictures.append(to_pictures(image, maps, palette))
        present.update(*(labels.unique().tolist() for labels in maps))
    columns = [joined([caption(heading), *column], down=True)
               for heading, column in zip(headings, zip(*pictures))]
    legend = [caption(class_caption(classes, c), tuple(palette[c])) for c in sorted(present - {IGNORE})]
    if IGNORE in present:
        legend.append(caption("ignored", "white"))
    return with_legend(joined(columns), legend)


def with_legend(picture, legend):
    """A Pillow image above the captions of its legend, in as many lines as they need."""
    lines = [legend[:1]]
    for entry in legend[1:]:
        if sum(e.width for e in (*lines[-1], entry)) > picture.width:
            lines.append([])
        lines[-1].append(entry)
    return joined([picture, *(joined(line, gap=0) for line in lines)], down=True)


def class_caption(classes, c):
    """The name of class c, or its id where the name is not ASCII, as Pillow's own font has nothing else."""
    return classes[c] if classes[c].isascii() else f"class {c}"


def caption(text, colour=None):
    """A line of text as a Pillow image; in a legend, behind a square of the class's colour."""
    font, left = ImageFont.load_default(14), 20 if colour else 0
    picture = Image.new("RGB", (left + math.ceil(font.getlength(text)) + 16, 20), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left, 1), text, "black", font)
    if colour:
        draw.rectangle((0, 3, 14, 17), colour, "black")
    return picture


def joined(pictures, down=False, gap=4):
    """Pillow images side by side, or one below the other, on white."""
    sizes = np.array([picture.size for picture in pictures])
    steps = (sizes + gap) * ([0, 1] if down else [1, 0])
    places = steps.cumsum(0) - steps
    whole = Image.new("RGB", tuple((places + sizes).max(0).tolist()), "white")
    for picture, place in zip(pictures, places.tolist()):
        whole.paste(picture, tuple(place))
    return whole


def chosen_ids(args, data, state):
    """(ids to evaluate, words for them): the ids in --list; else the run's validation set, if this is the
    run's data; else the validation set of the other data, or all images there that have a mask."""
    with_mask = data.images.keys() & data.masks.keys()
    if args.list:
        names = read_list(args.list, data.images)
        unknown = [name for name in names if name not in with_mask]
        if unknown:
            raise InputError(f"--list {args.list}: no image or no mask under --data-root "
                             f"({len(unknown)}): {short_list(unknown)}; take them off the list, or give "
                             f"their --data-root")
        return names, f"of {args.list}"
    lists = state.get("lists")
    if lists and (not args.data_root or with_mask.issuperset(lists["labelled"] + lists["val"])):
        where = f", in {data.root}" if args.data_root else ""  # which may be other data with the same ids
        return [name for name in lists["val"] if name in with_mask], f"of the run's validation set{where}"
    if data.notes and args.data_root:  # it has no validation set of its own
        return sorted(with_mask), f"with a mask in {data.root}"
    return data.val, f"of the validation set in {data.root}"


def open_networks(args, device):
    """({name: network}, checkpoint): the teacher or the student, behind that of --beside, if given."""
    network, state = load_model(args.checkpoint, args.student, device)
    if not args.beside:
        return {"student" if args.student else "teacher": network}, state
    other, other_state = load_model(args.beside, args.student, device)
    names = short_names(args.beside.resolve(), args.checkpoint.resolve())
    fits = (other_state["classes"] == state["classes"]
            and other_state["settings"]["image_size"] == state["settings"]["image_size"])
    if not (fits and names and args.pictures):
        raise InputError(f"--beside {args.beside}: needs --pictures DIR, and another checkpoint of "
                         f"the same classes and --image-size")
    return dict(zip(names, (other, network))), state


def short_names(one, other):
    """The last folders in which two paths differ, or the files' names if they lie in one folder; None for the
    same file."""
    pairs = [*zip(one.parts[-2::-1], other.parts[-2::-1]), (one.name, other.name)]
    return next((pair for pair in pairs if pair[0] != pair[1]), None)


def open_images(args, state):
    """The data set whose images `val` are to be evaluated. Raises InputError unless all of them can be."""
    dataset = state["settings"]["dataset"]
    if args.data_root and dataset == "shapes":
        raise InputError(f"--data-root {args.data_root}: {args.checkpoint} was trained on shapes, which are "
                         f"drawn; leave the flag out")
    data = open_data(dataset, args.data_root or state["settings"]["data_root"])
    if list(data.classes) != list(state["classes"]):
        raise InputError(f"{args.checkpoint}: trained on the classes {short_list(state['classes'])}, "
                         f"but --data-root holds {short_list(data.classes)}; give its own data")
    data.val, which = chosen_ids(args, data, state)
    if not data.val:
        raise InputError(f"{args.checkpoint}: its validation images are gone; give a --list of others")
    say(f"{len(data.val)} images {which}")
    seen = sorted({*data.val} & {*state.get("lists", {}).get("labelled", ())})
    if seen:
        say(f"labelled in training, of these: {len(seen)} ({short_list(seen)})")
    found = check_files(data, data.val)
    if not found.problems:
        check_classes(data, "validation", data.val, 1, found)
    if found.problems:
        raise InputError(found.problems[0])
    if args.pictures and data.root and args.pictures.resolve().is_relative_to(data.root.resolve()):
        raise InputError(f"--pictures {args.pictures}: lies in {data.root}, where panels could overwrite "
                         f"masks; give a folder elsewhere")
    return data


@contextmanager
def results_into(folder, flag):
    """Turns an OSError into an InputError that names the flag of the folder."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be written ({error.strerror}); give another "
                         f"{flag}") from None


@command_line
def main(argv=None):
    """Exit code 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint of train.py.")
    parser.add_argument("checkpoint", type=Path, help="last.pth or best.pth in a run's folder")
    parser.add_argument("--data-root", help="where the data set is, if not where training found it")
    parser.add_argument("--list", type=Path, metavar="FILE",
        help="ids to evaluate on instead of the validation set, in any form that --split takes: a test set")
    parser.add_argument("--student", action="store_true", help="the student instead of the teacher")
    parser.add_argument("--pictures", type=Path, metavar="DIR",
        help="write a panel of each image, ID.png: image | ground truth | prediction")
    parser.add_argument("--beside", type=Path, metavar="CHECKPOINT",
        help="another checkpoint, such as a baseline's: its predictions and IoU stand left of the first's")
    parser.add_argument("--workers", type=int, default=0, help="loader threads")
    args = parser.parse_args(argv)
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: at least 0")
    device = join()

    def write_panel(name, image, labels, maps):
        with results_into(args.pictures, "--pictures"):
            picture = panel([(image, labels, *maps)], headings, data.classes, data.palette)
            path = args.pictures / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)  # an id may hold a folder
            picture.save(path)

    networks, state = together(open_networks, args, device)
    data = together(open_images, args, state)
    demand_same_lists({"images": data.val})
    headings = ["image", "ground truth", *(networks if args.beside else ["prediction"])]
    settings = state["settings"]
    local = evaluate(networks.values(), data, device, settings["window"], settings["image_size"],
                     settings["amp"] and device.type == "cuda", args.workers,
                     look=write_panel if args.pictures else None)
    say(iou_table(data.classes, dict(zip(networks, sum_over_ranks(local)))))
    if args.pictures:
        say(f"panels: {args.pictures}/ID.png")


if __name__ == "__main__":
    main()
