"""Is the data fit to train on? Checks it, downloads it, converts it.

    python prepare.py --dataset NAME --data-root DIR       says what is there, and what is wrong with it
    python prepare.py --dataset voc --download             downloads and prepares PASCAL VOC 2012 and SBD
    python prepare.py --dataset custom --data-root DIR --convert   colour masks (CVAT) -> index masks

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
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.datasets.voc import DATASET_YEAR_DICT

from data import (
    IGNORE,
    PROTOCOLS,
    SPLITS,
    InputError,
    Shapes,
    open_data,
    read_list,
    short_list,
    split_ids,
    stems,
    unreadable,
    voc_palette,
)

TRAINING_IDS = 10582  # VOC train and all of SBD, without VOC val
TIMEOUT = 60  # seconds for which a server may say nothing
AGAIN = "run the same command again"


def check_data(data, labelled, unlabelled, supervised=False, contents=500):
    """Everything that would spoil a run on these ids, a line each; [] if all is well."""
    found = problems(data, labelled, [] if supervised else unlabelled, contents)
    if not unlabelled and not supervised:
        found.append("no unlabelled image is left; give a smaller --split (1_8 labels every eighth), "
                     "add images without masks, or train with --supervised")
    return found


def problems(data, labelled, unlabelled, contents=500):
    """Everything that would spoil a run, a line each; [] if all is well.

    Files and sizes are read from the headers of all images and masks; the contents of the masks,
    from at most `contents` of them, evenly spread (the others are checked whenever they are read).
    """
    if isinstance(data, Shapes):
        return []  # drawn, not read
    found = []
    if not labelled:
        found.append("no labelled image: no mask belongs to a training image; give masks, or another "
                     "--split")
    both = sorted(set(data.train) & set(data.val))
    if both:
        found.append(f"{len(both)} validation images are among the training ones: "
                     f"{short_list(both)}; keep each in one list")
    if not data.val:
        found.append("no validation image: list some, with masks, in ImageSets/Segmentation/val.txt")
    with_masks = sorted({*labelled, *data.val})
    everything = sorted({*with_masks, *unlabelled})
    absent = [n for n in everything if n not in data.images or not data.images[n].is_file()]
    if absent:
        found.append(f"{len(absent)} listed images are missing: {short_list(absent)}; complete the "
                     f"data set or fix the list")
    unmasked = [n for n in with_masks if n not in data.masks or not data.masks[n].is_file()]
    if unmasked:
        found.append(f"{len(unmasked)} images of the labelled or validation list have no mask: "
                     f"{short_list(unmasked)}; add their masks or take them off the list")
    skip = {*absent, *unmasked}

    def header(name):
        try:
            size = data.image(name).size
            if name in with_masks_set and name not in skip:
                with Image.open(data.masks[name]) as mask:
                    if mask.size != size:
                        return (f"{data.masks[name]}: {mask.width} x {mask.height} pixels, but its "
                                f"image (upright, as its EXIF says) has {size[0]} x {size[1]}; "
                                f"export the mask again")
        except InputError as error:
            return str(error)
        except (OSError, SyntaxError) as error:
            return unreadable(data.masks[name], error)

    def content(name):
        try:
            seen[np.unique(data.mask(name))] = True
        except InputError as error:
            return str(error)

    seen = np.zeros(256, bool)
    with_masks_set = set(with_masks)
    readable = [n for n in with_masks if n not in skip]
    with ThreadPoolExecutor() as pool:
        found += filter(None, pool.map(header, (n for n in everything if n not in absent)))
        found += filter(None, pool.map(content, readable[::-(-len(readable) // contents) or 1]))
    strays = sorted(data.masks.keys() - data.images.keys())
    if strays:
        found.append(f"{len(strays)} masks have no image of their name: {short_list(strays)}; a mask "
                     f"needs the stem of its image")
    if readable and not found and not seen[:IGNORE].any():
        found.append(f"the masks, {data.masks[readable[0]].name} for one, hold nothing but {IGNORE}, "
                     f"which is ignored; export them as class ids")
    return list(dict.fromkeys(found))


def download_voc(root):
    """Download VOC 2012 and SBD, and make SegmentationClassAug/, a mask for each of the 10,582 ids.

    3.4 GB come from torchvision's addresses, under its checksums; about 8 GB of disk hold it all.
    A VOC 2012 where open_voc looks for it, benchmark_RELEASE/ and the two archives in `root` are
    used if they are there.
    """
    root = Path(root)
    folder, url, file, md5 = (DATASET_YEAR_DICT["2012"][key]
                              for key in ("base_dir", "url", "filename", "md5"))
    voc = next((root / parent for parent in (".", "VOC2012", "VOCdevkit/VOC2012", "..")
                if (root / parent / "JPEGImages").is_dir()), None)
    if voc is None or not stems(voc / "SegmentationClassAug"):
        try:
            from scipy.io import loadmat
        except ImportError:
            raise InputError("--download: reading SBD's .mat masks needs scipy; pip install scipy, "
                             f"and {AGAIN}") from None
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
    sbd = unpacked(root, "benchmark_RELEASE", SBDataset.url, SBDataset.filename,
                   SBDataset.md5) / "dataset"
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
        try:
            labels = (np.array(Image.open(path)) if name in own
                      else loadmat(path)["GTcls"]["Segmentation"][0, 0])
        except Exception as error:  # scipy has a dozen kinds of them for a damaged file
            raise InputError(unreadable(path, error)) from None
        if labels.ndim != 2 or ((labels > 20) & (labels != IGNORE)).any():
            raise InputError(f"{path}: not a map of VOC's 21 classes; replace it, and {AGAIN}")
        write_png(labels, voc_palette(21), part / f"{name}.png")
        if number % 1000 == 0:
            print(f"{part}: {number} of {len(ids)} masks", flush=True)
    os.replace(part, voc / "SegmentationClassAug")


def demand(folder, files):
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{folder}: incomplete, without {short_list(missing)}; complete it, or "
                         f"move it away, and {AGAIN}")


def demand_count(ids, source):
    if len(ids) != TRAINING_IDS:
        raise InputError(f"{source}: gives {len(ids)} training ids, but the protocol has "
                         f"{TRAINING_IDS}; move that folder away, and {AGAIN}")


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
        raise InputError(f"{archive}: cannot be unpacked ({reason}); make room, or remove it if "
                         f"damaged, and {AGAIN}") from None
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
        raise InputError(f"{archive}: truncated, or another file, as {url} gave it (its md5 is not "
                         f"{md5}); {remedy}") from None
    finally:
        socket.setdefaulttimeout(None)


def convert_colour_masks(root):
    """CVAT's "Segmentation mask 1.1": SegmentationClass/ in colour -> SegmentationClassIds/ in ids.

    Ids count the lines of labelmap.txt from 0, and class_names.txt names them in that order. Black
    is ignored (255) where the label map has neither "background" nor a black label. Run again, it
    adds the masks that are new; what it would have to overwrite is an InputError.
    """
    root = Path(root)
    names, colours = read_label_map(root / "labelmap.txt")
    masks, names_file = stems(root / "SegmentationClass"), root / "class_names.txt"
    if not masks:
        raise InputError(f"{root}: no masks in SegmentationClass/*.png to convert; give the folder "
                         f"of the export as --data-root")
    if names_file.exists() and names_file.read_text("utf-8-sig", "replace").splitlines() != names:
        raise InputError(f"{names_file}: there already, and not the names of labelmap.txt; move it "
                         f"away, and {AGAIN}")
    ids = np.full(1 << 24, -1, np.int16)  # one for every colour there is
    if "background" not in names:
        ids[0] = IGNORE
    ids[colours @ [1 << 16, 1 << 8, 1]] = range(len(names))

    final = root / "SegmentationClassIds"
    part, old = final.with_suffix(".part"), final.with_suffix(".old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name, path in masks.items():
        try:
            pixels = np.array(Image.open(path).convert("RGB")).astype(np.int32)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(unreadable(path, error)) from None
        codes = pixels @ [1 << 16, 1 << 8, 1]
        labels = ids[codes]
        if (labels < 0).any():
            strange = (f"({c >> 16},{c >> 8 & 255},{c & 255})"
                       for c in np.unique(codes[labels < 0]))
            raise InputError(f"{path}: holds colours that labelmap.txt has not: "
                             f"{short_list(strange)}; add them there, or fix the mask")
        write_png(labels, colours, part / f"{name}.png")
    for path in stems(final).values():
        new = part / path.name
        if not new.exists() or not filecmp.cmp(path, new, shallow=False):
            raise InputError(f"{path}: not what SegmentationClass/ now gives; move {final} away, "
                             f"and {AGAIN}")
    names_file.with_suffix(".part").write_text("".join(f"{name}\n" for name in names), "utf-8")
    os.replace(names_file.with_suffix(".part"), names_file)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)
    print(f"{final}: {len(masks)} masks, of the {len(names)} classes in {names_file}")


def read_label_map(path):
    """Lines of label:r,g,b:parts:actions, and # comments -> the labels and their (C, 3) colours."""
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{unreadable(path, error)}; --convert is for CVAT's export named "
                         f"Segmentation mask 1.1, which has one") from None
    entries = [re.match(r"(.+?):(\d+),(\d+),(\d+)(:|\s*$)", line)
               for line in lines if not line.startswith("#")]
    colours = [tuple(map(int, entry.groups()[1:4])) for entry in entries if entry]
    if not 0 < len(set(colours)) == len(entries) <= IGNORE or max(map(max, colours)) > 255:
        raise InputError(f"{path}: not 1 to 255 lines of label:r,g,b:parts:actions, each of its "
                         f"own colour; fix it, and {AGAIN}")
    return [entry[1].strip() for entry in entries], np.array(colours)


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
    parser.add_argument("--data-root", help="folder of the data set (default: data/NAME)")
    parser.add_argument("--split", help="report on this split too: a name, or a file of ids")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--download", action="store_true",
                      help="voc: first download VOC 2012 and SBD, and make SegmentationClassAug/")
    task.add_argument("--convert", action="store_true",
                      help="custom: first turn CVAT's colour masks into SegmentationClassIds/")
    args = parser.parse_args(argv)
    try:
        root = Path(args.data_root or PROTOCOLS[args.dataset].data_root)
        if args.download or args.convert:
            if args.download and args.dataset.startswith("voc"):
                download_voc(root)
            elif args.convert and args.dataset == "custom":
                convert_colour_masks(root)
            else:
                raise InputError("--download goes with --dataset voc, --convert with --dataset custom"
                                 + ("; for Cityscapes, log in at cityscapes-dataset.com and unpack "
                                    f"leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in {root}"
                                    if args.dataset == "cityscapes" else ""))
        data = open_data(args.dataset, args.data_root)
        print(f"{args.dataset}: {len(data.images)} images, {len(data.masks)} masks; {len(data.train)} "
              f"for training, {len(data.val)} for validation" + (f"\n{data.note}" if data.note else ""))
        for split in SPLITS:
            try:
                labelled, unlabelled = split_ids(data, args.dataset, split)
            except InputError as error:
                print(error)
                continue
            print(f"--split {split:5} {len(labelled):6} labelled {len(unlabelled):6} unlabelled")
        labelled, unlabelled = split_ids(data, args.dataset, args.split)
        print(f"as given      {len(labelled):6} labelled {len(unlabelled):6} unlabelled")
        found = problems(data, labelled, unlabelled, contents=10 ** 9)
        for line in found:
            print(line, file=sys.stderr)
        if found:
            sys.exit(2)
        names = labelled
        with ThreadPoolExecutor() as pool:
            pixels = sum(pool.map(lambda name: np.bincount(np.asarray(data.mask(name)).ravel(),
                                                           minlength=256), names))
        for c, label in enumerate(data.classes):
            print(f"{c:4} {label:20} {pixels[c] / pixels[:IGNORE].sum():7.2%} of the labelled pixels")
        absent = [label for c, label in enumerate(data.classes) if not pixels[c]]
        if absent:
            print(f"classes without a labelled pixel: {short_list(absent)}")
        print(f" 255 {'ignored':20} {pixels[IGNORE] / pixels.sum():7.2%} of all pixels")
    except (InputError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.modules["data"] = sys.modules["__main__"]  # so that py raises this InputError
    main()
