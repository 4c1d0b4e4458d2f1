"""Is a data set fit to train on, and what lies there unused?"""

import itertools
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from glob import glob
from unicodedata import normalize

import numpy as np
from PIL import Image

from data import HEIC_SUFFIXES, IGNORE, IMAGE_SUFFIXES, MASK_FOLDERS, InputError, reading, short_list, stems

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


def originals(root):
    """(folder, stem -> file): the masks that --convert starts from; {} if there are none."""
    for folder in (root / name for name in MASK_FOLDERS[1:]):
        masks = stems(folder, LOSSLESS) | stems(folder)
        if masks:
            break
    return folder, masks


def written(colour):
    return f"({','.join(map(str, colour))})"
