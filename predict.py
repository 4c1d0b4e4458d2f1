"""Masks, overlays and hardness of any photographs, by a checkpoint of train.py.

    python predict.py CHECKPOINT PATH... --out DIR      files, or folders of them
    python predict.py CHECKPOINT PATH... --hardness     and which of them to label next
"""

import argparse
import csv
import os
import sys
import unicodedata
from pathlib import Path

import torch
from PIL import Image

from data import HEIC_SUFFIXES, IMAGE_SUFFIXES, InputError, files_in, open_photograph, short_list, tails
from evaluate import (autocast, caption, class_caption, colourize, confidence_map, decoded, load_model,
                      predict, results_into, to_pictures, with_legend)
from hardness import ratio_of_maxima, weighted_iou
from ranks import command_line, progress

# What is written into --out; STEM.jpg is a photograph.
RESULTS = {
    "STEM.png": "the class id of each pixel, at the photograph's own size, in the colours of the classes",
    "STEM_overlay.png": "the photograph tinted by class, with a legend; at most 1,024 pixels a side",
    "areas.csv": "a row per photograph, a column per class: the share of its pixels, 0 to 1"}
RANKING = {"hardness.csv": "gamma and the confident ratios (Eq. 5-7), the hardest first; 1 = hardest"}
GAMMA = "gamma (1 = hardest)"


def overlay(image, labels, areas, classes, palette):
    """A photograph (3, H, W), uint8, tinted by its class map, with a legend: the share of each class.

    Class 0 has no tint where it is what lies behind the objects: by its name, or if it is black.
    """
    photograph, tints = to_pictures(image, [labels], palette, side=1024)
    picture = Image.blend(photograph, tints.convert("RGB"), 0.5)
    colours = [tuple(colour) for colour in palette]
    if classes[0].strip("_").lower() == "background" or colours[0] == (0, 0, 0):
        picture.paste(photograph, mask=tints.point(lambda c: 255 * (c == 0), "L"))
        colours[0] = "white"
    return with_legend(picture, [caption(f"{class_caption(classes, c)} {area:.1%}", colours[c])
                                 for c, area in enumerate(areas) if area])


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
        if not os.path.exists(path):  # Path.exists raises where a folder above cannot be read
            raise InputError(f"{path}: no such file or folder")
        inside = files_in(path, IMAGE_SUFFIXES | HEIC_SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path}: no photograph in it; what is read is "
                             f"{' '.join(sorted(IMAGE_SUFFIXES))}")
        found += inside
    return list({file.resolve(): file for file in found}.values())  # each once


@torch.inference_mode()
def predict_files(model, state, paths, folder, device, pair=None):
    """Write the RESULTS of the photographs in files and folders; with the `pair` (student, teacher), the
    RANKING too.

    A photograph that cannot be read, or whose results would overwrite anything but its earlier results,
    is named on stderr and skipped. Returns how many were. OSError: `folder` cannot be written.
    """
    photographs, settings = find_photographs(paths), state["settings"]
    for place in (folder.resolve(), *folder.resolve().parents):
        beside = {path.name for path in place.glob("*")}
        if beside & {"images", "JPEGImages"} and beside & {"class_names.txt", "labelmap.txt"}:
            raise InputError(f"--out {folder}: lies in the data set {place}, where training would take "
                             f"results for photographs or masks; give a folder elsewhere")
    results = RESULTS | RANKING if pair else RESULTS
    taken = {file.resolve() for file in photographs}  # no result may overwrite these
    tables = [folder / name for name in results if name.endswith(".csv")]
    for table in filter(Path.exists, tables):
        with open(table, encoding="utf-8", errors="surrogateescape", newline="") as file:
            header, *rows = [*filter(None, csv.reader(file))] or [[]]
        if header[:1] != ["file"]:  # as write_table begins
            raise InputError(f"--out {folder}: its {table.name} is not predict.py's; give another --out")
        others = [name for name, *_ in rows if Path(name).resolve() not in taken]
        if others:
            raise InputError(f"--out {folder}: its {table.name} has results of other photographs, "
                             f"{short_list(others)}, which would be lost; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    classes, palette = state["classes"], state["palette"]
    areas, hardness = [], []
    for file in progress(photographs, "photographs"):
        mask, picture = folder / f"{file.stem}.png", folder / f"{file.stem}_overlay.png"
        try:
            if taken & {mask.resolve(), picture.resolve()} or mask.exists() and not picture.exists():
                raise InputError(f"{file}: its results would overwrite {mask} or {picture}; predict it, "
                                 f"or its folder, by itself, with another --out")
            image = decoded(open_photograph(file), file)
        except InputError as error:
            print(f"predict.py: {error}", file=sys.stderr)
            continue
        with autocast(device, settings["amp"] and device.type == "cuda"):
            labels = predict(model, image.to(device), settings["window"], settings["image_size"]).cpu()
            if pair:
                hardness.append((str(file), *photograph_hardness(*pair, image.to(device), state)))
        shares = (labels.flatten().bincount(minlength=len(classes)) / labels.numel()).tolist()
        areas.append((str(file), *shares))
        overlay(image, labels, shares, classes, palette).save(picture)  # first: a mask without it is not ours
        colourize(labels, palette).save(mask)
        taken |= {mask.resolve(), picture.resolve()}
    write_table(folder / "areas.csv", ("file", *classes), areas)
    skipped = len(photographs) - len(areas)
    print(f"photographs predicted: {len(areas)}, skipped: {skipped}; written to {folder}:")
    print(list_results(results))
    if pair:
        hardness.sort(key=lambda row: (-row[1], row[0]))
        write_table(folder / "hardness.csv", ("file", GAMMA, "rho_student", "rho_teacher"), hardness)
        print_hardest(hardness, state.get("lists", {}))
    return skipped


def list_results(results):
    return "\n".join(f"  {name:18}{text}" for name, text in results.items())


def write_table(path, header, rows):
    """Write rows (file, values from 0 to 1) as CSV, whole or not at all. Names that are not UTF-8 are written
    as the bytes that they are."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows((name, *(f"{value:.6f}" for value in values)) for name, *values in rows)
    os.replace(temporary, path)


def print_hardest(ranked, lists):
    """Name the first ten that are to be labelled next: those that have no mask in the run's `lists`."""
    masked = {*lists.get("labelled", ()), *lists.get("val", ())}
    new = [row for row in ranked if not masked.intersection(
        tails(unicodedata.normalize("NFC", Path(row[0]).with_suffix("").as_posix())))]
    print(f"\nThe hardest of the {len(new)} without a mask in training, to label next:\n{GAMMA}")
    for name, gamma, *_ in new[:10]:
        print(f" {gamma:.2f}  {name}".encode(errors="backslashreplace").decode())


@command_line
def main(argv=None):
    """Exit code 2 for input that cannot be used, 1 if photographs were skipped."""
    parser = argparse.ArgumentParser(
        description="Segment photographs with a checkpoint of train.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="written to --out, for a photograph STEM.jpg:\n"
               f"{list_results(RESULTS)}\nand with --hardness:\n{list_results(RANKING)}")
    parser.add_argument("checkpoint", type=Path, help="last.pth or best.pth in a run's folder")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="photographs, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("predictions"),
        help="folder of the results (default: predictions)")
    parser.add_argument("--student", action="store_true", help="the student instead of the teacher")
    parser.add_argument("--hardness", action="store_true",
        help="rank the photographs by their hardness (Eq. 7), to label the hardest next: those where student "
             "and teacher are far from a confident agreement")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, state = load_model(args.checkpoint, args.student, device)
    pair = None
    if args.hardness:
        other, _ = load_model(args.checkpoint, not args.student, device)
        pair = (model, other) if args.student else (other, model)
    with results_into(args.out, "--out"):
        skipped = predict_files(model, state, args.paths, args.out, device, pair)
    sys.exit(1 if skipped else 0)


if __name__ == "__main__":
    main()
