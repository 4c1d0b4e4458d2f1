"""Is the data fit to train on? Checks it, downloads it, converts it.

    python prepare.py --dataset NAME --data-root DIR       says what is there, wrong with it, and unused
    python prepare.py --dataset voc --download             downloads and prepares PASCAL VOC 2012 and SBD
    python prepare.py --dataset custom --data-root DIR --convert   masks told by colour -> index masks

Stopped anywhere, the same command resumes: what is unfinished is called .part, and takes its own
name only when it is complete. What the user has is read, never changed.
"""

import argparse
import filecmp
import os
import re
import shutil
import socket
import sys
import tarfile
import zlib
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.datasets.voc import DATASET_YEAR_DICT

from check import check_data, originals, written
from data import (
    IGNORE,
    MASK_FOLDERS,
    SPLITS,
    InputError,
    open_data,
    read_class_names,
    read_lines,
    read_list,
    reading,
    short_list,
    split_ids,
    stems,
    upright,
    voc_palette,
)
from settings import PROTOCOLS, protocol

TRAINING_IDS = 10582  # VOC train and all of SBD, without VOC val
TIMEOUT = 60  # seconds for which a server may say nothing
AGAIN = "run the same command again"
CODE = np.array([1 << 16, 1 << 8, 1])  # of a colour


def download_voc(root):
    """Download VOC 2012 and SBD, and make SegmentationClassAug/, a mask for each of the 10,582 ids.

    3.4 GB come from torchvision's addresses, under its checksums; about 8 GB of disk hold it all.
    A VOC 2012 where open_voc looks for it, benchmark_RELEASE/ and the two archives in `root` are
    used if they are there.
    """
    folder, url, file, md5 = (DATASET_YEAR_DICT["2012"][key]
                              for key in ("base_dir", "url", "filename", "md5"))
    voc = next((root / parent for parent in (".", "VOC2012", "VOCdevkit/VOC2012", "..")
                if (root / parent / "JPEGImages").is_dir()), None)
    if voc is None or not stems(voc / "SegmentationClassAug"):
        try:
            from scipy.io import loadmat
        except ImportError:
            raise InputError(f"--download: reading SBD's .mat masks needs scipy; pip install scipy, and "
                             f"{AGAIN}") from None
        voc = voc or unpacked(root, folder, url, file, md5)
        make_blended_masks(voc, root, loadmat)
    lists, masks = voc / "ImageSets" / "Segmentation", voc / "SegmentationClassAug"
    ids = {*stems(masks), *read_list(lists / "train.txt")} - {*read_list(lists / "val.txt")}
    demand_count(ids, masks)
    print(f"{masks}: {len(ids)} training ids. {file}, {SBDataset.filename} and "
          f"benchmark_RELEASE/ in {root} may now be removed")


def make_blended_masks(voc, root, loadmat):
    """Make voc/SegmentationClassAug/ID.png: VOC's own mask where it has one, else SBD's."""
    lists = [f"ImageSets/Segmentation/{part}.txt" for part in ("train", "val")]
    demand(voc, lists)
    train, val = (read_list(voc / file) for file in lists)
    demand(voc, [f"SegmentationClass/{name}.png" for name in train + val])
    sbd = unpacked(root, "benchmark_RELEASE", SBDataset.url, SBDataset.filename, SBDataset.md5) / "dataset"
    demand(sbd, ["train.txt", "val.txt"])
    ids = sorted({*train, *read_list(sbd / "train.txt"), *read_list(sbd / "val.txt")} - {*val})
    demand_count(ids, sbd)
    own = stems(voc / "SegmentationClass")
    demand(voc, [f"JPEGImages/{name}.jpg" for name in ids])
    demand(sbd, [f"cls/{name}.mat" for name in ids if name not in own])

    part = voc / "SegmentationClassAug.part"
    part.mkdir(exist_ok=True)
    for number, name in enumerate(ids, 1):
        if (part / f"{name}.png").exists():
            continue
        path = own.get(name, sbd / "cls" / f"{name}.mat")
        with reading(path):  # scipy has a dozen kinds of errors for a damaged file
            labels = np.array(Image.open(path)) if name in own else loadmat(path)["GTcls"][
                "Segmentation"][0, 0]
        if labels.ndim != 2 or ((labels > 20) & (labels != IGNORE)).any():
            raise InputError(f"{path}: not a map of VOC's 21 classes; replace it, and {AGAIN}")
        write_png(labels, voc_palette(21), part / f"{name}.png")
        if number % 1000 == 0:
            print(f"{part}: {number} of {len(ids)} masks", flush=True)
    os.replace(part, voc / "SegmentationClassAug")


def demand(folder, files):
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{folder}: incomplete, without {short_list(missing)}; complete it, or move it "
                         f"away, and {AGAIN}")


def demand_count(ids, source):
    if len(ids) != TRAINING_IDS:
        raise InputError(f"{source}: gives {len(ids)} training ids, but the protocol has {TRAINING_IDS}; "
                         f"move that folder away, and {AGAIN}")


def unpacked(root, folder, url, filename, md5):
    """root / folder: as it is if it is there, else out of an archive that holds it by that name."""
    target, archive = root / folder, root / filename
    if target.exists():
        return target
    fetch(url, archive, md5)
    print(f"{archive}: unpacking", flush=True)
    part = target.with_name(f"{target.name}.part")  # beside it: a rename stays in one file system
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            # "data" refuses what would be written outside; Pythons before 3.10.12 and 3.11.4 have
            # no filters, and trust the checksum.
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda entry, path: entry)
            tar.extractall(part)
        os.replace(part / folder, target)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{archive}: cannot be unpacked ({reason}); make room, or remove it if damaged, and "
                         f"{AGAIN}") from None
    shutil.rmtree(part, ignore_errors=True)
    return target


def fetch(url, archive, md5):
    """Download an archive, unless it is there. It gets its name when its checksum is right."""
    if check_integrity(archive, md5):
        return
    print(f"{url} -> {archive}", flush=True)
    remedy = f"{AGAIN}, or copy the file from elsewhere to {archive}"
    try:
        socket.setdefaulttimeout(TIMEOUT)  # urllib alone would wait for ever
        download_url(url, archive.parent.absolute(), f"{archive.name}.part", md5)
        os.replace(f"{archive}.part", archive)
    except (OSError, HTTPException, RecursionError) as error:  # the last: redirects without end
        raise InputError(f"{url}: cannot be fetched ({error}); {remedy}") from None
    except RuntimeError:  # the checksum
        raise InputError(f"{archive}: truncated, or another file, as {url} gave it (its md5 is not {md5}); "
                         f"{remedy}") from None
    finally:
        socket.setdefaulttimeout(None)


def convert_masks(root):
    """Masks that are told by colour -> SegmentationClassIds/, index PNGs of class ids.

    labelmap.txt says which colour is which class; the ids are those of class_names.txt, or if it is not
    there yet, of the label map's own order. Black is ignored (255) where the label map has neither
    "background" nor a black label. Without a label map, black and white beside two class names and grey
    values that are ids already are taken as such; for other colours it is written, and asks for names.
    Run again, it adds the masks that are new; what it would have to change is an InputError.
    """
    names_file, label_map, final, part = (root / name for name in (
        "class_names.txt", "labelmap.txt", "SegmentationClassIds", "SegmentationClassIds.part"))
    folder, masks = originals(root)
    if not masks:
        raise InputError(f"{root}: no masks to convert in {'/, '.join(MASK_FOLDERS[1:])}/; give the folder "
                         f"that holds one of them as --data-root")
    found = colours_of(masks)
    if len(found) == 1:
        raise InputError(f"{folder}: its masks hold the colour {written(*found)} alone; export them again, "
                         f"with a colour for each class, and without transparency, and {AGAIN}")
    names = read_class_names(names_file) if names_file.exists() else []
    labels = read_label_map(label_map) if label_map.exists() else plain_labels(found, names)
    if not labels:
        ask_for_names(label_map, folder, found, names)
    known = list(dict.fromkeys(label for label in labels.values() if label != "ignore"))
    if "background" not in known:
        labels.setdefault((0, 0, 0), "ignore")
    strange = sorted(found.keys() - labels.keys())
    unnamed = [label for label in known if names and label not in names]
    if strange:
        raise InputError(f"{found[strange[0]][1]}: holds colours that {label_map} has not: "
                         f"{short_list(map(written, strange))}; add them there, and {AGAIN}")
    if unnamed:
        raise InputError(f"{names_file}: has not {short_list(unnamed)}, which {label_map} has; make them "
                         f"agree, or remove {names_file}, and {AGAIN}")
    names = names or known
    if len(names) < 2:
        raise InputError(f"{label_map}: one class alone; add a line for the rest, such as background:0,0,0, "
                         f"and {AGAIN}")
    ids, palette = np.full(1 << 24, IGNORE, np.uint8), voc_palette(len(names))
    for colour, label in reversed(labels.items()):
        if label != "ignore":
            ids[colour @ CODE], palette[names.index(label)] = names.index(label), colour
    total = sum(count for count, _ in found.values())
    for colour, (count, path) in sorted(found.items(), key=lambda item: -item[1][0]):
        print(f"{written(colour):13} -> {ids[colour @ CODE]:3} {labels[colour]:20} {count / total:7.2%} of "
              f"the pixels, {path.name} for one")

    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name, path in masks.items():
        write_png(ids[np.asarray(coloured(path)) @ CODE], palette, part / f"{name}.png")
    for path in stems(final).values():
        new = part / path.name
        if not new.exists() or not filecmp.cmp(path, new, shallow=False):
            raise InputError(f"{path}: not what {folder} now gives; move {final} away, and {AGAIN}")
    if not names_file.exists():
        names_file.with_suffix(".part").write_text("".join(f"{name}\n" for name in names), "utf-8")
        os.replace(names_file.with_suffix(".part"), names_file)
    if final.exists():
        for path in stems(part).values():
            os.replace(path, final / path.name)
        part.rmdir()
    else:
        os.replace(part, final)
    print(f"{final}: {len(masks)} masks, of the {len(names)} classes in {names_file}")


def colours_of(masks):
    """{(r, g, b): [how many pixels of all masks have it, a mask that does]}."""
    found = {}
    for path in masks.values():
        counts = coloured(path).getcolors(256)
        if not counts:
            raise InputError(f"{path}: more than 256 colours, as smoothed edges or a JPEG give them; export "
                             f"the masks again without that, and {AGAIN}")
        for count, colour in counts:
            found.setdefault(colour, [0, path])[0] += count
    return found


def coloured(path):
    """A mask as a Pillow RGB image, whatever holds its colours; ids of 16 bits become grey values."""
    with reading(path):
        if path.suffix.lower() == ".npy":
            grey = np.load(path)
        else:
            with Image.open(path) as picture:
                if picture.mode[0] not in "IF":
                    return upright(picture).convert("RGB")
                grey = np.array(upright(picture))
        grey = np.where(grey == -1, IGNORE, grey)  # labelme's
        grey = np.where(grey <= IGNORE, grey, grey / 257)  # 0 and 65535
        if grey.ndim != 2 or not np.isin(grey, range(256)).all():
            raise InputError(f"{path}: no map of class ids from 0 to 255; export it again")
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def plain_labels(colours, names):
    """{colour: label}, where grey values say it by themselves; else {}."""
    greys = {colour[0] for colour in colours}
    ids = greys & {*range(len(names))}
    if any(len({*colour}) > 1 for colour in colours):
        return {}
    if greys == {0, IGNORE} and len(names) == 2:
        return {(0, 0, 0): names[0], (IGNORE,) * 3: names[1]}
    if len(ids) < 2 or not greys <= ids | {IGNORE}:
        return {}
    return {(grey,) * 3: "ignore" if grey == IGNORE else names[grey] for grey in greys}


def ask_for_names(path, folder, colours, names):
    """Write a label map of the colours found, in which the user is to put the names right."""
    background = any("background" in name.lower() for name in names)
    largest = sorted(colours, key=lambda colour: (not any(colour) and not background, -colours[colour][0]))
    chosen = sorted(colours) if len(colours) <= len(names) else sorted(largest[:len(names)])
    proposed = dict(zip(chosen, names, strict=False))
    total = sum(count for count, _ in colours.values())
    lines = [f"# {count / total:.2%} of the pixels, {file.name} for one\n"
             f"{proposed.get((r, g, b), 'ignore' if names else '?')}:{r},{g},{b}::\n"
             for (r, g, b), (count, file) in sorted(colours.items())]
    path.write_text("".join(["# label:color_rgb:parts:actions\n", *lines]), "utf-8")
    raise InputError(f"{path}: written, with the {len(colours)} colours of {folder}; put the right name "
                     f"before each (ignore, if it is no class), and {AGAIN}")


def read_label_map(path):
    """Lines of label:r,g,b:parts:actions, and # comments -> {(r, g, b): label}."""
    entries = [re.match(r"(.+?):\s*(\d+),\s*(\d+),\s*(\d+)\s*(:|$)", line)
               for line in read_lines(path) if line and not line.startswith("#")]
    labels = {tuple(map(int, entry.groups()[1:4])): entry[1].strip() for entry in entries if entry}
    if not 0 < len(labels) == len(entries) or len({*labels.values()}) > IGNORE or max(map(max, labels)) > 255:
        raise InputError(f"{path}: not 1 to 255 lines of label:r,g,b:parts:actions, each of its own colour; "
                         f"fix it, and {AGAIN}")
    if "?" in labels.values():
        raise InputError(f"{path}: still has ? for a name; put the name of the colour's class there (ignore, "
                         f"if it is none), and {AGAIN}")
    return labels


def write_png(labels, colours, path):
    """Write (H, W) ids as an index PNG, which has another name until it is complete."""
    colours = [*colours, *voc_palette(256)[len(colours):]]  # given fewer, Pillow cuts 255 short
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(np.array(colours, np.uint8).tobytes())
    picture.save(path.with_suffix(".part"), "PNG")
    os.replace(path.with_suffix(".part"), path)


def main(argv=None):
    """Report on a data set; exit code 2 if something is wrong with it."""
    parser = argparse.ArgumentParser(description="Check a data set, and say what is wrong with it.")
    parser.add_argument("--dataset", choices=PROTOCOLS, default="shapes")
    parser.add_argument("--data-root",
                        help="folder of the data set (default: data/NAME; voc_classic data/voc)")
    parser.add_argument("--split", help="check this split: a name, or a file of ids (default: as train.py's)")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--download", action="store_true",
                      help="voc: first download VOC 2012 and SBD, and make SegmentationClassAug/")
    task.add_argument("--convert", action="store_true",
                      help="custom: first turn masks told by colour into SegmentationClassIds/")
    args = parser.parse_args(argv)
    settings = protocol(args.dataset)
    try:
        root = Path(args.data_root or settings.data_root)
        if args.download and args.dataset.startswith("voc"):
            download_voc(root)
        elif args.convert and args.dataset == "custom":
            convert_masks(root)
        elif args.download or args.convert:
            raise InputError("--download goes with --dataset voc, --convert with --dataset custom"
                             + ("; for Cityscapes, log in at cityscapes-dataset.com and unpack "
                                f"leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in {root}"
                                if args.dataset == "cityscapes" else ""))
        data = open_data(args.dataset, args.data_root or settings.data_root)
        print(f"{args.dataset}: {len(data.images)} images, {len(data.masks)} masks; {len(data.train)} "
              f"for training, {len(data.val)} for validation")
        for split in SPLITS:
            with suppress(InputError):  # of an incomplete data set
                labelled, unlabelled = split_ids(data, args.dataset, split)
                print(f"--split {split:5} {len(labelled):6} labelled {len(unlabelled):6} unlabelled")
        labelled, unlabelled = split_ids(data, args.dataset, args.split or settings.split)
        print(f"as given      {len(labelled):6} labelled {len(unlabelled):6} unlabelled")
        found = check_data(data, labelled, unlabelled)
        print(*found.notes, sep="\n", end="\n" * bool(found.notes))
        if found.problems:
            print(*found.problems, sep="\n", file=sys.stderr)
            sys.exit(2)
        pixels = sum(found.pixels[name][:256] for name in labelled)
        for c, label in enumerate(data.classes):
            print(f"{c:4} {label:20} {pixels[c] / pixels[:IGNORE].sum():7.2%} of the labelled pixels")
        print(f" 255 {'ignored':20} {pixels[IGNORE] / pixels.sum():7.2%} of all pixels")
        side, crop = round(median(found.sides)), settings.crop_size
        if side > 3 * crop:
            options = ["--split", args.split] * bool(args.split) + ["--image-size", str(2 * crop)]
            print(f"the photographs, of {side} pixels, are much larger than the crop, of {crop}, which would "
                  f"see little of them; smaller: {data.command('train.py', *options)}")
    except (InputError, OSError) as error:
        text = error if isinstance(error, InputError) else (
            f"{error.filename or root}: {error.strerror}; make room, or allow it, and {AGAIN}")
        print(f"prepare.py: {text}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
