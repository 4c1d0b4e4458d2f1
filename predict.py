"""Masks, overlays and hardness of any photographs, by a checkpoint of train.py.

    python predict.py CHECKPOINT PATH... --out DIR      files, or folders of them
    python predict.py CHECKPOINT PATH... --hardness     and which of them to label next
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from batches import picture_to_tensor
from data import HEIC_SUFFIXES, IMAGE_SUFFIXES, InputError, files_in, open_photograph, reading
from evaluate import colourize, confidence_map, load_model, predict
from hardness import ratio_of_maxima, weighted_iou


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


def photograph_hardness(student, teacher, image, state):
    """(gamma, rho_s, rho_t), Eq. 5-7, of a whole photograph (3, H, W), uint8, at the size that the
    run of the checkpoint `state` works at, with its tau."""
    settings, num_classes = state["settings"], len(state["classes"])
    (p_s, z_s), (p_t, z_t) = (confidence_map(network, image, settings["window"], settings["image_size"])
                              for network in (student, teacher))
    rho_s, rho_t = (ratio_of_maxima(p[None], settings["tau"]) for p in (p_s, p_t))
    ignore_class = 0 if settings["ignore_background"] else None
    gamma = 1 - (rho_s / 2 * weighted_iou(z_s[None], z_t[None], num_classes, None, ignore_class)
                 + rho_t / 2 * weighted_iou(z_t[None], z_s[None], num_classes, None, ignore_class))
    return tuple(torch.cat([gamma.clamp(0, 1), rho_s, rho_t]).tolist())


def find_photographs(paths):
    """The files among paths, and the photographs in the folders among them (data.files_in)."""
    found = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        inside = [path] if not path.is_dir() else [
            file for file in files_in(path, IMAGE_SUFFIXES | HEIC_SUFFIXES) if not file.is_dir()]
        if not inside:
            raise InputError(f"{path}: no photograph in it; what is read is "
                             f"{' '.join(sorted(IMAGE_SUFFIXES))}")
        found += inside
    return list({file.resolve(): file for file in found}.values())


@torch.inference_mode()
def predict_files(model, state, paths, folder, device, pair=None):
    """Write STEM.png, the class map, and STEM_overlay.png for each photograph in files and folders;
    with the `pair` (student, teacher), hardness.csv too, the hardest first.

    A photograph that cannot be read, or whose results would overwrite anything but its earlier results,
    is named on stderr and skipped. Returns how many were. OSError: `folder` cannot be written.
    """
    photographs, settings = find_photographs(paths), state["settings"]
    if pair and (folder / "last.pth").exists():
        raise InputError(f"--out {folder}: the folder of a run, whose hardness.csv would be lost; give "
                         f"another --out")
    folder.mkdir(parents=True, exist_ok=True)
    sources, written = {file.resolve() for file in photographs}, {}
    hardness, skipped = [], 0
    for done, file in enumerate(photographs, 1):
        mask, picture = folder / f"{file.stem}.png", folder / f"{file.stem}_overlay.png"
        targets = {mask.resolve(), picture.resolve()}
        try:
            if targets & sources:
                raise InputError(f"{file}: its result would overwrite a photograph; give another --out")
            if mask.exists() and not picture.exists():  # so it is no earlier result
                raise InputError(f"{file}: its result would overwrite {mask}; give another --out")
            for target in targets & written.keys():
                raise InputError(f"{file}: its result would overwrite that of {written[target]}; predict it "
                                 f"by itself, with another --out")
            with reading(file):
                image = picture_to_tensor(open_photograph(file).convert("RGB"))
        except InputError as error:
            print(f"predict.py: {error}", file=sys.stderr)
            skipped += 1
        else:
            with torch.autocast(device.type, torch.bfloat16,
                                enabled=settings["amp"] and device.type == "cuda"):
                labels = predict(model, image.to(device), settings["window"], settings["image_size"]).cpu()
                if pair:
                    hardness.append((*photograph_hardness(*pair, image.to(device), state), str(file)))
            overlay(image, labels, state["classes"], state["palette"]).save(picture)  # first: see above
            colourize(labels, state["palette"]).save(mask)
            written |= dict.fromkeys(targets, file)
        if done % 20 == 0 or done == len(photographs):
            print(f"{done}/{len(photographs)} photographs, {skipped} skipped", flush=True)
    if pair:
        ranked = sorted(hardness, key=lambda row: (-row[0], row[-1]))
        write_hardness(ranked, folder / "hardness.csv", state.get("lists", {}))
    return skipped


def write_hardness(ranked, path, lists):
    """Write (gamma, rho_s, rho_t, file) records as CSV, and name the first ten that are to be labelled next:
    those whose stems are not on the run's `lists` of images with masks."""
    # Names that are not UTF-8 are written as the bytes that they are.
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(("file", "gamma", "rho_student", "rho_teacher"))
        table.writerows((name, *(f"{value:.4f}" for value in values)) for *values, name in ranked)
    masked = {*lists.get("labelled", ()), *lists.get("val", ())}
    new = [row for row in ranked if Path(row[-1]).stem not in masked]
    print(f"\nThe hardest of the {len(new)} without a mask in training, to label next (all: {path})\ngamma")
    for gamma, *_, name in new[:10]:
        print(f" {gamma:.2f}  {name}".encode(errors="backslashreplace").decode())


def main(argv=None):
    """Exit code 2 for input that cannot be used, 1 if photographs were skipped."""
    parser = argparse.ArgumentParser(description="Segment photographs with a checkpoint of train.py.")
    parser.add_argument("checkpoint", type=Path,
        help="last.pth or best.pth in a run's folder")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH",
        help="photographs, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("predictions"),
        help="folder of the results (default: predictions)")
    parser.add_argument("--student", action="store_true",
        help="the student instead of the teacher")
    parser.add_argument("--hardness", action="store_true",
        help="rank the photographs by how far student and teacher are from a confident agreement "
             "(Eq. 7): hardness.csv, the hardest first, to label next")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, state = load_model(args.checkpoint, args.student, device)
        pair = None
        if args.hardness:
            other, _ = load_model(args.checkpoint, not args.student, device)
            pair = (model, other) if args.student else (other, model)
        skipped = predict_files(model, state, args.paths, args.out, device, pair)
    except (InputError, OSError) as error:
        text = error if isinstance(error, InputError) else (
            f"--out {args.out}: cannot be written ({error.strerror}); give another --out")
        print(f"predict.py: {text}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if skipped else 0)


if __name__ == "__main__":
    main()
