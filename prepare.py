"""Is the data fit to train on? Checks it, downloads it, writes its label map.

    python prepare.py --dataset NAME --data-root DIR               what is there, wrong or unused
    python prepare.py --dataset voc --download                     downloads PASCAL VOC 2012 and SBD
    python prepare.py --dataset custom --data-root DIR --colours   writes the label map: colour -> class

Run again after a stop, it keeps what is complete. Unfinished files end in .part, and an unfinished download
starts anew. The user's own files are never changed.
"""

import argparse
import errno
import os
import shutil
import sys
import tarfile
import zlib
from collections import Counter
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from shlex import quote
from statistics import median
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import check_integrity
from torchvision.datasets.voc import DATASET_YEAR_DICT

import data
from check import check_data
from data import IGNORE, InputError, command, reading, short_list, written
from ranks import command_line, progress
from settings import PROTOCOLS, protocol

TIMEOUT = 60  # seconds for which a server may say nothing
AGAIN = "run the same command again"
BLACK, WHITE = 0, 0xFFFFFF  # codes of colours


def download_voc(root):
    """Download VOC 2012 and SBD, and make SegmentationClassAug/, a mask for each of the 10,582 ids.

    It downloads 3.4 GB from torchvision's addresses, checks torchvision's checksums, and takes about 8 GB of
    disk. What open_voc finds, benchmark_RELEASE/ and the two archives are used where `root` has them.
    """
    try:
        train = data.open_voc(root).train
    except InputError:  # not there, or not complete
        make_blended_masks(root)
        train = data.open_voc(root).train
    blended = data.find_folder(root, "JPEGImages") / data.BLENDED_MASKS
    demand_all(train, blended if blended.exists() else blended.parent)
    print(f"{root}: {len(train)} training ids. The archives and benchmark_RELEASE/ in it may now be removed")


def make_blended_masks(root):
    """Make SegmentationClassAug/ID.png in the folder of VOC: VOC's own mask where it has one, else SBD's."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(f"--download: SBD's .mat masks need scipy; pip install scipy, and {AGAIN}") from None
    try:
        voc = data.find_folder(root, "JPEGImages")
    except InputError:
        voc = unpacked(root, *map(DATASET_YEAR_DICT["2012"].get, ("base_dir", "url", "filename", "md5")))
    lists = [f"ImageSets/Segmentation/{part}.txt" for part in ("train", "val")]
    train, val = map(data.read_list, demand(voc, lists))
    demand(voc, [f"SegmentationClass/{name}.png" for name in train + val])
    sbd = unpacked(root, "benchmark_RELEASE", SBDataset.url, SBDataset.filename, SBDataset.md5)
    lists = demand(sbd, ["dataset/train.txt", "dataset/val.txt"])
    ids = sorted({*train}.union(*map(data.read_list, lists)) - {*val})
    demand_all(ids, sbd)
    own = data.stems(voc / "SegmentationClass")
    demand(voc, [f"JPEGImages/{name}.jpg" for name in ids])
    demand(sbd, [f"dataset/cls/{name}.mat" for name in ids if name not in own])

    folder, colours = voc / f"{data.BLENDED_MASKS}.part", np.array(data.voc_palette(256), np.uint8).tobytes()
    folder.mkdir(exist_ok=True)
    for name in progress(ids, "masks written"):
        path = own.get(name, sbd / f"dataset/cls/{name}.mat")
        mask, part = folder / f"{name}.png", folder / name
        if mask.exists():
            continue
        with reading(path):  # scipy has a dozen kinds of errors for a damaged file
            labels = np.array(Image.open(path)) if name in own else loadmat(path)["GTcls"][
                "Segmentation"][0, 0]
        if labels.ndim != 2 or ((labels > 20) & (labels != IGNORE)).any():
            raise InputError(f"{path}: not a map of VOC's 21 classes; replace it, and {AGAIN}")
        picture = Image.fromarray(labels.astype(np.uint8))
        picture.putpalette(colours)
        picture.save(part, "PNG")
        os.replace(part, mask)
    os.replace(folder, voc / data.BLENDED_MASKS)


def demand(folder, files):
    """The paths of files in a folder. Raises InputError unless all are there."""
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{folder}: incomplete, without {short_list(missing)}; complete it, or move it "
                         f"away, and {AGAIN}")
    return [folder / file for file in files]


def demand_all(ids, source):
    if len(ids) != data.TRAINING_SETS["voc"]:
        raise InputError(f"{source}: gives {len(ids)} training ids, but the protocol has "
                         f"{data.TRAINING_SETS['voc']}; move that folder away, and {AGAIN}")


def unpacked(root, folder, url, filename, md5):
    """root / folder: as it is there, else from an archive that holds a folder of that name."""
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
            # "data" refuses files outside the folder; old Pythons lack it, and trust the checksum.
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda entry, path: entry)
            tar.extractall(part)
        os.replace(part / folder, target)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{archive}: cannot be unpacked ({' '.join(str(error).split())}); make room, or "
                         f"remove it if damaged, and {AGAIN}") from None
    shutil.rmtree(part, ignore_errors=True)
    return target


def fetch(url, archive, md5):
    """Download an archive, unless it is there. It gets its name once its checksum is right."""
    if check_integrity(archive, md5):
        return
    print(f"{url} -> {archive}", flush=True)
    part, remedy = Path(f"{archive}.part"), f"{AGAIN}, or copy the file from elsewhere to {archive}"
    archive.parent.mkdir(parents=True, exist_ok=True)
    try:
        request = Request(url, headers={"User-Agent": "HagSeg"})
        with urlopen(request, timeout=TIMEOUT) as response, open(part, "wb") as file:
            megabytes = iter(lambda: response.read(1 << 20), b"")
            for some in progress(megabytes, "MB", int(response.headers["Content-Length"] or 0) >> 20):
                file.write(some)
    except (OSError, HTTPException) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise InputError(f"{url}: cannot be fetched ({error}); {remedy}") from None
    if not check_integrity(part, md5):
        raise InputError(f"{archive}: truncated, or another file, as {url} gave it (its md5 is not {md5}); "
                         f"{remedy}")
    os.replace(part, archive)


def write_label_map(root):
    """Write labelmap.txt, which says which colour of the masks is which class, unless it is there.

    What is known is proposed: an index or a grey value is a class id, and of two classes the first is black,
    the second white. Every other colour gets a ?, which is refused until the user has replaced it.
    """
    label_map, part, names_file = map(root.joinpath, ("labelmap.txt", "labelmap.part", "class_names.txt"))
    if label_map.exists():
        return
    folder, files = data.mask_files(root)
    if not files:
        raise InputError(f"{root}: no masks in {'/, '.join(data.MASK_FOLDERS)}/; put masks there, as "
                         f"PNGs, or give the folder that holds one of them as --data-root")
    colours = find_colours(files)
    if len(colours) == 1:
        raise InputError(f"{folder}: its masks hold the colour {written(*colours)} alone; export them again, "
                         f"with a colour for each class, and without transparency, and {AGAIN}")
    names = data.read_class_names(names_file) if names_file.exists() else []
    if colours.keys() == {BLACK, WHITE} and len({path.parent.name for path in files} & {*names}) > 1:
        raise InputError(f"{folder}: white is another class in each folder; merge their masks (see "
                         f"docs/own-photographs.md), and {AGAIN}")
    labels = proposed_labels(colours, names)
    total = sum(count for count, *_ in colours.values())
    shares = {colour: f"{count / total:.2%} of the pixels" for colour, (count, *_) in colours.items()}
    text = "# label:color_rgb:parts:actions\n" + "".join(
        f"# {shares[colour]}, {path.name} for one\n{labels[colour]}:{written(colour)[1:-1]}::\n"
        for colour, (_, path, _) in colours.items())
    try:
        part.write_text(text, "utf-8")
        os.replace(part, label_map)
    except OSError as error:
        here, links = root.resolve(), quote(f"{root.resolve().name}-links")
        raise InputError(
            f"{label_map}: cannot be written ({error.strerror}); make room, or work in a folder of links: "
            f"mkdir {links} && ln -s {quote(str(here))}/* {links}/ && "
            f"{command('prepare.py', 'custom', f'{here.name}-links', '--colours')}") from None
    if "?" in labels.values():
        ignored = [*labels.values()].count("ignore")
        rest = f", {ignored} of them as ignore" if ignored else ""
        raise InputError(f"{label_map}: written, with the {len(colours)} colours of {folder}{rest}; put the "
                         f"name of its class, or ignore, in place of each ?, and check it: "
                         f"{command('prepare.py', 'custom', root)}")
    print(f"{label_map}: written", *(f"{written(colour):13} is {label}, {shares[colour]}"
                                     for colour, label in labels.items()), sep="\n")
    if labels.keys() == {BLACK, WHITE}:
        print(f"if it is the other way round, swap the two names in {label_map}")


def find_colours(files):
    """{colour: [number of pixels, a mask that has it, its ids]} of all masks, the most frequent first. The
    ids are the indices, bits or grey values that have this colour; None, where a mask holds the colour
    itself."""
    found = {}
    for path in progress(files, "masks read"):
        pixels, colours = data.read_colours(path)
        if pixels is None:
            colours, counts = np.unique(colours, return_counts=True)
            ids = [colour & 255 if colour % 0x010101 == 0 else None for colour in colours.tolist()]
        else:
            counts = np.bincount(pixels.ravel(), minlength=len(colours))
            ids = np.flatnonzero(counts).tolist()
            colours, counts = colours[ids], counts[ids]
        if len(colours) > 256:
            raise InputError(f"{path}: more than 256 colours, as smoothed edges or a JPEG give them; export "
                             f"the masks again without that, and {AGAIN}")
        for colour, count, i in zip(colours.tolist(), counts.tolist(), ids):
            entry = found.setdefault(colour, [0, path, set()])
            entry[0] += count
            entry[2].add(i)
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def proposed_labels(colours, names):
    """{colour: label} for what find_colours returns; a ? where nothing is known."""
    ids = {colour: min(ids) for colour, (_, _, ids) in colours.items() if len(ids) == 1 and None not in ids}
    shared = Counter(ids.values())  # an id of two colours may be two classes
    ids = {colour: i for colour, i in ids.items() if shared[i] == 1}
    # Greys beside colours are no ids, nor are the indices of a program that orders colours by itself.
    if 0 not in ids.values() or any(None in ids for _, _, ids in colours.values()) or (
            ids.get(BLACK) and colours.keys() != {BLACK, WHITE}):
        ids = {}
    labels = {colour: dict(enumerate(names)).get(ids.get(colour), "?") for colour in colours}
    rest = [colour for colour in colours if labels[colour] == "?"]
    if rest and len(names) == 2 and colours.keys() == {BLACK, WHITE}:
        return dict(zip((BLACK, WHITE), names))
    if len(colours) - len(rest) > 1 and {ids.get(colour) for colour in rest} <= {len(names), IGNORE}:
        return labels | dict.fromkeys(rest, "ignore")
    if len(rest) > (2 * len(names) + 8 if names else 64):  # the shades of smoothed edges
        return dict.fromkeys(colours, "ignore") | dict.fromkeys([*colours][:len(names) or 64], "?")
    return labels


def report(args, settings):
    """Print what the data set holds, and the next command. Exits with code 2 if something is wrong."""
    opened = data.open_data(args.dataset, args.data_root or settings.data_root)
    print(f"{args.dataset}: {len(opened.images)} images, {len(opened.masks)} masks; "
          f"{len(opened.train)} for training, {len(opened.val)} for validation")
    for split in data.SPLITS if args.dataset != "custom" else ():
        with suppress(InputError):  # of an incomplete data set
            labelled, unlabelled = data.split_ids(opened, args.dataset, split)
            print(f"--split {split:5} {len(labelled):6} labelled {len(unlabelled):6} unlabelled")
    labelled, unlabelled = data.split_ids(opened, args.dataset, args.split or settings.split)
    print(f"as given      {len(labelled):6} labelled {len(unlabelled):6} unlabelled")
    found = check_data(opened, labelled, unlabelled)
    for note in found.notes:
        print(note)
    if found.problems:
        print(*found.problems, sep="\n", file=sys.stderr)
        sys.exit(2)
    pixels = sum(found.pixels[name][:256] for name in labelled)
    for c, label in enumerate(opened.classes):
        print(f"{c:4} {label:20} {pixels[c] / pixels[:IGNORE].sum():7.2%} of the labelled pixels")
    print(f" 255 {'ignored':20} {pixels[IGNORE] / pixels.sum():7.2%} of all pixels")
    options = ["--split", args.split] if args.split else []
    side, crop = round(median(found.sides)), settings.crop_size
    if not torch.cuda.is_available() and args.dataset != "shapes":
        options.append("--small")
    elif side > 3 * crop:
        print(f"the photographs, of {side} pixels, are much larger than the crop, of {crop}, which would see "
              f"little of them: --image-size shrinks them")
        options += ["--image-size", str(2 * crop)]
    print(f"nothing wrong; next: {opened.command('train.py', *options)}")


@command_line
def main(argv=None):
    """Exit code 2 if something is wrong with the data set."""
    parser = argparse.ArgumentParser(description="Check a data set, and say what is wrong with it.")
    parser.add_argument("--dataset", choices=PROTOCOLS, default="shapes")
    parser.add_argument("--data-root",
                        help="folder of the data set (default: data/NAME; voc_classic data/voc)")
    parser.add_argument("--split", help="check this split: a name, or a file of ids (default: as train.py's)")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--download", action="store_true",
                      help="voc: first download VOC 2012 and SBD, and make SegmentationClassAug/")
    task.add_argument("--colours", "--convert", action="store_true",
                      help="custom: first write labelmap.txt, which names the class of each colour")
    args = parser.parse_args(argv)
    settings = protocol(args.dataset)
    root = Path(args.data_root or settings.data_root)
    try:
        if args.download and args.dataset.startswith("voc"):
            download_voc(root)
        elif args.colours and args.dataset == "custom":
            write_label_map(root)
        elif args.download or args.colours:
            raise InputError("--download goes with --dataset voc, --colours with --dataset custom; for "
                             "Cityscapes, log in at cityscapes-dataset.com and unpack "
                             "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in data/cityscapes")
        report(args, settings)
    except OSError as error:
        raise InputError(f"{error.filename or root}: {error.strerror}; make room, or allow it, and "
                         f"{AGAIN}") from None


if __name__ == "__main__":
    main()
