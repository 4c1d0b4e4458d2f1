"""Mean IoU on a validation set, sliding windows (Sec. 3), pictures (Fig. 3b), and prediction.

    python evaluate.py CHECKPOINT                       per-class IoU on the run's validation set
    python evaluate.py CHECKPOINT --pictures DIR        with image | ground truth | prediction panels
    python evaluate.py CHECKPOINT --predict PATH...     masks and overlays of any photographs
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import (IGNORE, IMAGE_SUFFIXES, InputError, loaded, normalize, open_data, open_photograph,
                  picture_to_tensor, short_list, unreadable)
from model import DeepLabV3Plus
from prepare import problems

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
    image = normalize(image[None])
    if max_side and max(size) > max_side:
        small = [max(1, round(side * max_side / max(size))) for side in size]
        image = F.interpolate(image, small, mode="bilinear", antialias=True)
    elif not window and size[0] * size[1] > WHOLE_IMAGE_PIXELS:
        window = 769
    if window and max(image.shape[-2:]) > window:
        return sliding_window(model, image, window, size)
    logits = model(image)
    if logits.shape[-2:] == size:
        return logits.argmax(1)[0].to(torch.uint8)
    best, labels = None, torch.zeros(size, dtype=torch.uint8, device=image.device)
    for c in range(logits.shape[1]):  # a class at a time: C maps of a large photograph would not fit
        score = F.interpolate(logits[:, c:c + 1], size, mode="bilinear")[0, 0]
        if best is not None:
            labels.masked_fill_(score > best, c)
        best = score if best is None else torch.maximum(best, score)
    return labels


def sliding_window(model, image, window, size):
    """As predict, over windows at two thirds' stride (Sec. 3.1), their softmax summed.

    Four windows of a row make a batch. Only the rows of pixels that a later window still reaches
    are kept as scores, so memory grows with the width of an image and not with its height.
    """
    height, width = image.shape[-2:]
    tops, lefts = window_starts(height, window), window_starts(width, window)
    labels, scores = [], None
    for top, next_top in zip(tops, tops[1:] + [height]):
        rows = image[..., top:top + window, :]
        band = None
        for some in (lefts[i:i + 4] for i in range(0, len(lefts), 4)):
            prob = model(torch.cat([rows[..., left:left + window] for left in some])).softmax(1)
            if band is None:
                band = prob.new_zeros(1, prob.shape[1], rows.shape[-2], width)
            for left, p in zip(some, prob):
                band[0, ..., left:left + window] += p
        if scores is not None:
            band[..., :scores.shape[-2], :] += scores
        labels.append(band[..., :next_top - top, :].argmax(1).to(torch.uint8))
        scores = band[..., next_top - top:, :]
    labels = torch.cat(labels, dim=1)
    return labels[0] if labels.shape[1:] == size else F.interpolate(labels[None], size)[0, 0]


def window_starts(length, window):
    """Where windows begin along a side: every two thirds of a window, the last at the border."""
    stride = -(-window * 2 // 3)
    return sorted({min(start, max(length - window, 0)) for start in range(0, length, stride)
                   if start == 0 or start - stride + window < length})


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
    try:
        return picture_to_tensor(data.image(name).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise InputError(unreadable(data.images[name], error)) from None


@torch.inference_mode()
def evaluate(models, data, device, window=None, max_side=None, workers=0, amp=False):
    """The confusion matrices (models, C, C), int64, of this rank's share of data.val.

    Each rank takes every world-size-th image, so that each image counts once: sum_over_ranks adds
    the shares up. The models are put into evaluation mode, and back.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images = ValidationImages(data, data.val[rank::world])
    C = len(data.classes)
    confusions = torch.zeros(len(models), C, C, dtype=torch.int64, device=device)
    training = [model.training for model in models]
    for image, target, _ in loaded(images, workers, batch_size=None):
        image, target = image.to(device), target.to(device)
        for model, confusion in zip(models, confusions):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                prediction = predict(model.eval(), image, window, max_side)
            confusion += confusion_matrix(prediction, target, C)
    for model, mode in zip(models, training):
        model.train(mode)
    return confusions


def sum_over_ranks(confusions):
    if dist.is_initialized():
        dist.all_reduce(confusions)
    return confusions.cpu()


def iou_table(classes, confusions):
    """A text table of per-class IoU in percent, a column for each named confusion matrix."""
    results = {name: mean_iou(confusion) for name, confusion in confusions.items()}
    width = max(map(len, (*classes, "mean IoU")))
    lines = [" " * width + "".join(f"{name:>10}" for name in results)]
    for c, label in enumerate(classes):
        lines.append(label.ljust(width) + "".join(f"{100 * iou[c]:10.2f}" for _, iou in results.values()))
    lines.append("mean IoU".ljust(width) + "".join(f"{100 * mean:10.2f}" for mean, _ in results.values()))
    return "\n".join(lines)


def load_checkpoint(path):
    """A checkpoint of train.py as a dict. Raises InputError for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises what it likes for what it cannot read
        raise InputError(f"{path}: no checkpoint that weights_only=True loads "
                         f"({type(error).__name__}); give a last.pth or best.pth of train.py") from None
    if not isinstance(state, dict) or not {"settings", "classes", "student", "teacher"} <= state.keys():
        raise InputError(f"{path}: not a checkpoint of train.py; give a last.pth or best.pth")
    return state


def load_model(path, student=False, device="cpu"):
    """(model, checkpoint): the teacher, or the student, of a checkpoint, in evaluation mode."""
    state = load_checkpoint(path)
    settings = state["settings"]
    try:
        model = DeepLabV3Plus(len(state["classes"]), settings["backbone"], settings["output_stride"],
                              settings["channels"], aux=settings["aux"])
        model.load_state_dict(state["student" if student else "teacher"])
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit its own settings ({str(error).splitlines()[-1].strip()})") \
            from None
    return model.eval().to(device), state


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
def panels(models, data, names, device, window=None, max_side=None):
    """Yields (id, panel): image | ground truth | the prediction of each model, for each id."""
    for name in names:
        image = load_rgb(data, name).to(device)
        maps = [predict(model.eval(), image, window, max_side) for model in models]
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


def overlay(image, labels, classes, palette):
    """A photograph (3, H, W), uint8, under its class map (H, W), with a legend of the classes in it."""
    photograph = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = Image.blend(photograph, colourize(labels, palette).convert("RGB"), 0.5)
    size = max(12, picture.width // 40)
    present = labels.unique().tolist()
    canvas = Image.new("RGB", (picture.width, picture.height + size * 3 // 2 * len(present)), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, c in enumerate(present):
        y = picture.height + size * 3 // 2 * i + size // 4
        draw.rectangle((size // 2, y, size * 2, y + size), fill=tuple(palette[c]), outline="black")
        draw.text((size * 5 // 2, y), f"{classes[c]} {(labels == c).float().mean():.0%}", fill="black",
                  font=ImageFont.load_default(size))
    return canvas


@torch.inference_mode()
def predict_files(model, state, paths, folder, device):
    """Write STEM.png, the class map, and STEM_overlay.png for each photograph in files and folders.

    A photograph that cannot be read, or whose results would overwrite another file that is read or
    written here, is named on stderr and skipped. Returns how many were.
    """
    photographs = [file for path in paths for file in (
        sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir()
        else [path])]
    if not photographs:
        raise InputError(f"--predict {paths[0]}: no photograph in it")
    folder.mkdir(parents=True, exist_ok=True)
    settings, skipped, taken = state["settings"], 0, {file.resolve() for file in photographs}
    for done, file in enumerate(photographs, 1):
        targets = [folder / f"{file.stem}.png", folder / f"{file.stem}_overlay.png"]
        try:
            if not taken.isdisjoint(target.resolve() for target in targets):
                raise InputError(f"{file}: its result would overwrite {targets[0]}; give another --out")
            image = picture_to_tensor(open_photograph(file).convert("RGB"))
            labels = predict(model, image.to(device), settings["window"], settings["image_size"]).cpu()
            colourize(labels, state["palette"]).save(targets[0])
            overlay(image, labels, state["classes"], state["palette"]).save(targets[1])
            taken.update(target.resolve() for target in targets)
        except (InputError, OSError, SyntaxError) as error:
            text = str(error) if isinstance(error, InputError) else unreadable(file, error)
            print(f"evaluate.py: {text}", file=sys.stderr)
            skipped += 1
        if done % 20 == 0 or done == len(photographs):
            print(f"{done}/{len(photographs)} photographs, {skipped} skipped", flush=True)
    return skipped


def main(argv=None):
    """Exit code 2 for input that cannot be used, 1 if photographs were skipped."""
    parser = argparse.ArgumentParser(description="Evaluate or use a checkpoint of train.py.")
    parser.add_argument("checkpoint", type=Path, help="last.pth or best.pth in a run's folder")
    parser.add_argument("--data-root", help="where the data set is, if not where training found it")
    parser.add_argument("--student", action="store_true", help="the student instead of the teacher")
    parser.add_argument("--pictures", type=Path, metavar="DIR",
                        help="write a panel of each validation image: image | truth | prediction")
    parser.add_argument("--beside", type=Path, metavar="CHECKPOINT",
                        help="a second prediction in the panels, left of the first: a baseline's")
    parser.add_argument("--predict", type=Path, nargs="+", metavar="PATH",
                        help="photographs, or folders of them, to segment instead of evaluating")
    parser.add_argument("--out", type=Path, default=Path("predictions"),
                        help="where --predict writes (default: predictions)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        model, state = load_model(args.checkpoint, args.student, device)
        settings = state["settings"]
        if args.predict:
            missing = [path for path in args.predict if not path.exists()]
            if missing:
                raise InputError(f"--predict {missing[0]}: no such file or folder")
            sys.exit(1 if predict_files(model, state, args.predict, args.out, device) else 0)
        models = []
        if args.beside:
            other, its_state = load_model(args.beside, args.student, device)
            if its_state["classes"] != state["classes"] or not args.pictures:
                raise InputError(f"--beside {args.beside}: goes with --pictures DIR, and with a "
                                 f"checkpoint of the same classes")
            models = [other]
        data = open_data(settings["dataset"], args.data_root or settings["data_root"])
        if list(data.classes) != list(state["classes"]):
            raise InputError(f"{args.checkpoint}: trained on the classes {short_list(state['classes'])}, "
                             f"but --data-root holds {short_list(data.classes)}; give its own data")
        found = problems(data, data.val, [])
        if found:
            raise InputError(found[0])
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        first = not dist.is_initialized() or dist.get_rank() == 0
        confusion, = sum_over_ranks(evaluate(
            [model], data, device, settings["window"], settings["image_size"], args.workers,
            settings["amp"] and device.type == "cuda"))
        if first:
            print(iou_table(data.classes, {"student" if args.student else "teacher": confusion}))
        if args.pictures and first:
            args.pictures.mkdir(parents=True, exist_ok=True)
            for name, picture in panels([*models, model], data, data.val, device, settings["window"],
                                        settings["image_size"]):
                picture.save(args.pictures / f"{name}.png")
        if dist.is_initialized():
            dist.destroy_process_group()
    except (InputError, OSError) as error:
        if dist.is_initialized() or os.environ.get("RANK", "0") == "0":  # before, all ranks see it
            print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
