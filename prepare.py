"""Is the data fit to train on? Checks it, downloads it, converts it.

    python prepare.py --dataset NAME --data-root DIR       says what is there, wrong with it, and unused
    python prepare.py --dataset voc --download             downloads and prepares PASCAL VOC 2012 and SBD
    python prepare.py --dataset custom --data-root DIR --convert   masks told by colour -> index masks

Stopped anywhere, the same command resumes: what is unfinished is called .part, and takes its own
name only when it is complete. What the user has is read, never changed.
"""

import argparse
import filecmp
import itertools
import os
import re
import shlex
import shutil
import socket
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob
from http.client import HTTPException
from pathlib import Path
from statistics import median
from unicodedata import normalize

import numpy as np
from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.datasets.voc import DATASET_YEAR_DICT

from data import (
    HEIC_SUFFIXES,
    IGNORE,
    IMAGE_SUFFIXES,
    MASK_FOLDERS,
    PROTOCOLS,
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

TRAINING_IDS = 10582  # VOC train and all of SBD, without VOC val
TIMEOUT = 60  # seconds for which a server may say nothing
AGAIN = "run the same command again"
CODE = np.array([1 << 16, 1 << 8, 1])  # of a colour
SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
LOSSLESS = (".tif", ".tiff", ".bmp", ".gif", ".npy")  # masks that --convert reads beside PNGs
MASK_WORDS = re.compile(r"(?:[-_. ]*(?:masks?|labels?\w*|gt\w*|seg\w*|annot\w*|png|jpe?g))+$", re.I)
IMAGE_WORDS = re.compile(r"(?:[-_. ]*(?:img|images?|photo|rgb|sat))+$", re.I)


@dataclass
class Findings:
    """What a check found: lines that refuse a run, the most telling one first; lines that are only said;
    how many pixels of the mask of each image hold each id, (256 or more,); each image's longer side."""
    problems: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    pixels: dict = field(default_factory=dict)
    sides: list = field(default_factory=list)


def check_data(data, labelled, unlabelled, supervised=False):
    """Whether a run on these ids can go well, as prepare.py and train.py both ask. Returns Findings."""
    found = check_files(data, sorted({*labelled, *data.val}), [] if supervised else unlabelled)
    both = sorted({*data.train} & {*data.val})
    if both:
        found.problems.append(f"{len(both)} validation images are among the training ones: "
                              f"{short_list(both)}; keep each in one list")
    for part, names, needed in (("labelled", labelled, 2), ("validation", data.val, 1)):
        if not found.problems:
            check_classes(data, part, names, needed, found)
    of_masks, of_photographs = unused(data, found.pixels) if data.folders else ([], [])
    lacks, lines = None, of_photographs + of_masks
    if not data.images:
        lacks = f"{data.folders[0] if data.folders else data.root}: no photographs in it; put them there"
    elif not labelled:
        lacks, lines = "no labelled image is left to train on; add masks", of_masks + of_photographs
        if data.folders:
            lacks += f", index PNGs of class ids, in {data.folders[1]}/, each with the stem of its image"
        if len(data.masks) == len(data.val) == 1:
            lacks = (f"{data.val[0]} alone has a mask, and two are needed, since one is kept for validation; "
                     f"add the mask of another")
    elif not data.val:
        lacks = "no validation image; list some, with masks, in ImageSets/Segmentation/val.txt"
    elif not unlabelled and not supervised:
        lacks = (f"no unlabelled image is left; add images without masks, train with --supervised, or leave "
                 f"the masks of half of them out: {data.command('train.py', '--split', '1_2')}")
    found.problems += [*lines, lacks] if lacks else []
    notes = data.notes + found.notes + ([] if lacks else lines)
    found.notes = [note.encode(errors="backslashreplace").decode() for note in notes]  # for any terminal
    return found


def check_files(data, masked, unmasked=()):
    """Reads the headers and ends of images, and the masks of those in `masked`. Returns Findings."""
    found, lines, palettes, with_mask = Findings(), {}, {}, {*masked}
    everything = sorted({*masked, *unmasked})
    absent = [name for name in everything if name not in data.images]
    bare = [name for name in masked if name not in data.masks]
    if absent:
        found.problems.append(f"{len(absent)} listed images are missing: {short_list(absent)}; complete the "
                              f"data set or fix the list")
    if bare:
        found.problems.append(f"{len(bare)} images of the labelled or validation list have no mask: "
                              f"{short_list(bare)}; add their masks or take them off the list")

    def look(name):
        said, side, pixels, palette = None, 0, None, None
        try:
            image = data.image(name)
            side = max(image.size)
            demand_whole(image, data.images[name])
            if name in with_mask and name in data.masks:
                labels, palette = data.labels(name)
                pixels = (np.array(Image.fromarray(labels).histogram()) if labels.dtype == np.uint8 else
                          np.bincount(labels.ravel(), minlength=256))  # five times slower
                if labels.shape[::-1] != image.size:
                    said = (f"{data.masks[name]}: {labels.shape[1]} x {labels.shape[0]} pixels, but its "
                            f"image (upright, as its EXIF says) has {image.width} x {image.height}; "
                            f"export the mask again")
        except InputError as error:
            said = str(error)
        return name, said, side, pixels, palette

    with ThreadPoolExecutor() as pool:
        for name, said, side, pixels, palette in pool.map(look, (n for n in everything if n in data.images)):
            found.sides.append(side)
            if said:  # one line for all files that have the same remedy
                lines.setdefault(said.rpartition("; ")[2], []).append(said)
            if pixels is not None:
                found.pixels[name], palettes[name] = pixels, palette
    for remedy, (said, *more) in lines.items():
        found.problems.append(
            f"{said.removesuffix('; ' + remedy)} (and {len(more)} more); {remedy}" if more else said)
    check_ids(data, found)
    check_palettes(data, palettes, found)
    return found


def demand_whole(image, path):
    """Raise InputError for a photograph that breaks off: a JPEG or PNG by its end, others by decoding."""
    mark = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(image.format)
    if not image.format:  # drawn, or turned and so decoded already
        return
    with reading(path), open(path, "rb") as file:
        for length in (16, 1 << 16) if mark else ():  # cameras append things of their own
            file.seek(max(0, os.fstat(file.fileno()).st_size - length))
            end = file.read()
            if end.rfind(mark) > end.rfind(b"\xff\xda"):  # a thumbnail's is before the scan
                return
        image.draft(None, (1, 1))
        image.load()


def check_classes(data, part, names, needed, found):
    """Add what the masks of a part of the data hold too little of: classes at all, or some class."""
    pixels = sum((found.pixels[name] for name in names), np.zeros(256, int))
    held = [label for label, count in zip(data.classes, pixels) if count]
    absent = [label for label in data.classes if label not in held]
    if names and len(held) < needed:
        remedy = "" if not held or not pixels[IGNORE] else data.conversion() if not converted(data) else (
            f"give what is ignored (black, where it has no line) a name in {data.root / 'labelmap.txt'}, and "
            f"{anew(data)}")
        found.problems.append(
            f"the {part} masks, {data.masks[names[0]]} for one, hold {held[0] if held else 'nothing'} alone"
            + f", beside {IGNORE}, which is ignored" * bool(pixels[IGNORE])
            + f"; {remedy or 'add masks of other classes'}")
    elif names and absent:
        found.notes.append(f"no {part} mask holds {short_list(absent)}, which "
                           f"{'will not be learnt' if part == 'labelled' else 'is not in the mean IoU'}")


def check_ids(data, found):
    """Add a line if masks hold ids that no class has."""
    C = len(data.classes)
    strange = {name: np.flatnonzero(counts[C:]) + C for name, counts in found.pixels.items()}
    files = [data.masks[name] for name, ids in strange.items() if {*ids} - {IGNORE}]
    if not files:
        return
    ids = np.setdiff1d(np.concatenate([*strange.values()]), IGNORE)
    names_file = data.root / "class_names.txt"
    if data.dataset != "custom":
        remedy = "replace the mask"
    elif (ids[ids > IGNORE] % 257).any():  # and not grey levels of 16 bits
        remedy = f"export the masks again, with class ids below {IGNORE}"
    elif [*ids] == [C]:
        remedy = ("no mask holds 0, and " * all(not counts[0] for counts in found.pixels.values())
                  + f"ids count from 0: if 0 is a class too, write its name as the first line of "
                    f"{names_file}; if it is what nobody annotated, {data.conversion()}")
    else:
        remedy = (f"if these are class ids, write a name for each id, from 0, into {names_file}; if they are "
                  f"grey levels or colours, {data.conversion()}")
    more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
    found.problems.append(f"{files[0]}{more}: holds the ids {short_list(ids)}, but there are {C} classes "
                          f"(0 to {C - 1}); {remedy}")


def check_palettes(data, palettes, found):
    """Add a line if two index PNGs give an id that both hold different colours."""
    shades = {}  # id -> its colour, and the first mask that says so
    for name, palette in palettes.items():
        for i in np.flatnonzero(found.pixels[name][:IGNORE]) if palette else ():
            colour = tuple(palette[3 * i:3 * i + 3])
            before, path = shades.setdefault(i, (colour, data.masks[name]))
            if before != colour:
                found.problems.append(
                    f"{path} and {data.masks[name]}: the id {i} is {written(before)} in the one and "
                    f"{written(colour)} in the other; {data.conversion('replace one')}")
                return


def unused(data, pixels):
    """What lies in an own folder and is not used, or not as it seems to be meant: lines about masks, and
    lines about photographs, each with an example, a count, and what to do."""
    owners = {IMAGE_WORDS.sub("", name).lower(): name for name in sorted(data.images, key=len, reverse=True)}

    def owner(stem):  # the image whose mask a file of this stem seems to be, or None
        return owners.get(MASK_WORDS.sub("", stem).lower())

    of_masks, of_photographs = (a + b for a, b in zip(misused(data, pixels, owner), unread(data, owner)))
    if converted(data):
        of_masks += outdated(data)
    return of_masks[:4], of_photographs[:4]


def converted(data):
    """Whether the masks are those that --convert made."""
    return data.folders is not None and data.folders[1].name == MASK_FOLDERS[0]


def anew(data):
    """The remedy that converts all masks again, and keeps what was made of them."""
    final = data.folders[1]
    backups = (final.with_name(f"{final.name}.old{i}") for i in itertools.count(1))
    old = next(path for path in backups if not path.exists())
    return f"convert the masks anew: {shlex.join(['mv', str(final), str(old)])} && " + data.command(
        "prepare.py", "--convert")


def misused(data, pixels, owner):
    """unused(): files that are read, or listed, otherwise than they seem to be meant."""
    def about(names, files, text):
        return [f"{files[names[0]]}: {len(names)} {text}"] if names else []

    copies = [name for name, path in data.images.items()
              if path.suffix.lower() == ".png" and owner(name) not in (None, name)]
    strays = sorted(data.masks.keys() - data.images.keys(), key=lambda name: (not owner(name), name))
    masked, meant = (owner(names[0]) if names else None for names in (copies, strays))
    one_class = [name for name in pixels if len({*np.flatnonzero(pixels[name])} - {IGNORE}) == 1]
    white = [name for name in one_class if pixels[name][IGNORE]]
    of_masks = about(
        copies, data.images, "files like this one look like masks, and are read as photographs; if they are "
        "masks, move them " + ("elsewhere" if masked in data.masks else
                               f"into {data.folders[1]}/, this one as {masked}.png, and so on"))
    of_masks += about(
        strays, data.masks, "masks like this one have no image of their name; a mask needs the stem of its "
        "image" + (f": call this one {meant}.png, and so on" if meant else ""))
    of_photographs = about(
        white, data.masks, f"masks like this one hold one class alone, beside {IGNORE}, which is ignored; if "
        f"{IGNORE} is a class in them, export them again, with its id")
    of_photographs += about(
        [name for name in one_class if name not in white], data.masks, "masks like this one hold one class "
        "alone; if nobody annotated these, remove them, and their images are unlabelled")
    of_photographs += about(
        sorted(data.images.keys() - {*data.train, *data.val, *data.test}), data.images, "photographs like "
        "this one are on no list in ImageSets/Segmentation; to train on them, add them to its train.txt")
    of_photographs += about(data.test, data.images, "photographs in test/ are not trained on; evaluate.py "
                            "takes a --list of them")
    return of_masks, of_photographs


def unread(data, owner):
    """unused(): files that are not read, a line for those of a folder and a suffix."""
    photographs, masks = data.folders
    source, raw = originals(data.root)
    of_masks, of_photographs, groups = [], [], {}
    used = {*data.images.values(), *data.masks.values()}
    # Beside those that are read: where they lie in subfolders, the folder above must stay empty.
    new_image = next(iter(data.images.values()), photographs / "x").parent
    new_mask = next(iter((raw if converted(data) else data.masks).values()), masks / "x").parent
    linked = (top / name for top in data.folders for name in glob("**/*", root_dir=top, recursive=True))
    for path in sorted({*data.root.rglob("*"), *linked}):  # rglob follows no links, which may lead anywhere
        hidden = any(part.startswith(".") for part in path.relative_to(data.root).parts)
        if not hidden and path not in used and path.is_file() and path.name not in SYSTEM_FILES:
            groups.setdefault((path.parent, path.suffix.lower()), []).append(path)
    for (folder, suffix), paths in groups.items():
        among_images = photographs in (folder, *folder.parents)
        among_masks = any(data.root / name in (folder, *folder.parents) for name in MASK_FOLDERS)
        is_source = source in (folder, *folder.parents)
        if not among_images:
            again = [path for path in paths if normalize("NFC", path.stem) in data.masks]
            paths = sorted({*paths} - {*again})
            if again and among_masks and suffix == ".png" and not is_source:
                of_masks.append(f"{folder}: {len(again)} masks are not read, as {masks} has masks of their "
                                f"names; move away those that are wrong")
        like_masks = not among_images and 2 * sum(bool(owner(path.stem)) for path in paths) > len(paths)
        lines = of_masks if among_masks or (like_masks and suffix in IMAGE_SUFFIXES) else of_photographs
        if lines is of_masks and is_source and (suffix in LOSSLESS or converted(data)):
            in_test = "test" in map(str.lower, folder.relative_to(data.root).parts)
            remedy = data.conversion() if not in_test else (
                "to evaluate on them, move them and their photographs to another folder, and convert there")
        elif lines is of_masks:
            remedy = "if they are masks, " + (
                f"move them into {new_mask}/" if suffix == ".png" else f"export them again, as PNGs, into "
                f"{new_mask}/" + ": JPEG changes ids" * (suffix[:3] in (".jp", ".jf")))
        elif suffix in IMAGE_SUFFIXES:
            remedy = f"to train on them, move them into {new_image}/, each under a name of its own"
        elif suffix in (".json", ".xml", ".txt"):
            remedy = "masks are read, not annotations: export index PNGs of them"
        else:
            remedy = "if they are photographs, " + (
                "convert them to JPEG" if suffix else f"call this one {paths[0].name}.jpg, and so on")
        if paths and (among_images or among_masks or suffix in IMAGE_SUFFIXES | HEIC_SUFFIXES):
            lines.append(f"{folder}: {len(paths)} files {suffix or 'without suffix'} ({paths[0].name} for "
                         f"one) are not read; {remedy}")
    return of_masks, of_photographs


def outdated(data):
    """[a line], if a mask, or the label map, is newer than what --convert made of it."""
    final = data.folders[1]
    made = {path: final / f"{name}.png" for name, path in originals(data.root)[1].items()}
    made[data.root / "labelmap.txt"] = next(iter(data.masks.values()))
    for path, mask in made.items():
        if path.exists() and path.stat().st_mtime > (mask if mask.exists() else final).stat().st_mtime:
            return [f"{path}: newer than {final}; if it has changed, {anew(data)}"]
    return []


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


def originals(root):
    """(folder, stem -> file): the masks that --convert starts from; {} if there are none."""
    for folder in (root / name for name in MASK_FOLDERS[1:]):
        masks = stems(folder, LOSSLESS) | stems(folder)
        if masks:
            break
    return folder, masks


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


def written(colour):
    return f"({','.join(map(str, colour))})"


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
    protocol = PROTOCOLS[args.dataset]
    try:
        root = Path(args.data_root or protocol.data_root)
        if args.download and args.dataset.startswith("voc"):
            download_voc(root)
        elif args.convert and args.dataset == "custom":
            convert_masks(root)
        elif args.download or args.convert:
            raise InputError("--download goes with --dataset voc, --convert with --dataset custom"
                             + ("; for Cityscapes, log in at cityscapes-dataset.com and unpack "
                                f"leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in {root}"
                                if args.dataset == "cityscapes" else ""))
        data = open_data(args.dataset, args.data_root)
        print(f"{args.dataset}: {len(data.images)} images, {len(data.masks)} masks; {len(data.train)} "
              f"for training, {len(data.val)} for validation")
        for split in SPLITS:
            with suppress(InputError):  # of an incomplete data set
                labelled, unlabelled = split_ids(data, args.dataset, split)
                print(f"--split {split:5} {len(labelled):6} labelled {len(unlabelled):6} unlabelled")
        labelled, unlabelled = split_ids(data, args.dataset, args.split or protocol.split)
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
        side, crop = round(median(found.sides)), protocol.crop_size
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
