"""Is a data set fit to train on, and which of its files are not used?"""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from data import (HEIC_SUFFIXES, IGNORE, IMAGE_SUFFIXES, MASK_FOLDERS, MASK_SUFFIXES, OLD_MASKS, InputError,
                  end_of, looks_like_mask, name_in, one_of, reading, short_list, tails, walk, written)
from ranks import progress

# Files of operating systems, of programs that note where a picture was taken, and predict.py's overlays.
SIDE_FILES = re.compile(r"thumbs\.db|.*\.ini|icon\r|.*:zone\.identifier|"
                        r".*\.(?:[a-z]{1,2}[gf]wx?|wld|ovr|prj|aux\.xml|aae|xmp|thm)|.*_overlay\.png", re.I)
# Names of folders and files of masks, as Segments.ai, Cityscapes, fastai, nnU-Net and others give them.
MASK_FOLDER = re.compile(r"(?:.*[-_ ]|train|val|test)?(?:masks?|labels?|gts?|segm?\w*|ann(?:ot(?:ation)?s?)?|"
                         r"ground.?truths?)(?:[-_ ].*|tr|ts|ids|\d*)", re.I)
MASK_ENDING = re.compile(r"(?:[-_. ]*(?:masks?|labels?\w*|gt\w*|seg\w*|annot\w*|ground.?truth|colou?red|"
                         r"overlays?|png|jpe?g)|[-_. ](?-i:[PL]))+$", re.I)
ANNOTATIONS = (".json", ".xml", ".txt", ".csv")
IMAGE_ENDING = re.compile(r"(?:[-_. ]*(?:img|images?|photo|rgb|sat|leftImg8bit)|_0000)+$", re.I)


@dataclass
class Findings:
    """What a check found.

    problems:  lines that forbid a run, the most telling one first.
    notes:     lines that do not.
    pixels:    id of an image -> how many pixels of its mask have each class id, (256 or more,).
    sides:     the longer side of each image.
    """
    problems: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    pixels: dict = field(default_factory=dict)
    sides: list = field(default_factory=list)


def check_data(data, labelled, unlabelled, supervised=False):
    """Check the data for a run on these ids, for prepare.py and train.py alike. Returns Findings."""
    found = check_files(data, sorted({*labelled, *data.val}), [] if supervised else unlabelled)
    both = sorted({*data.train} & {*data.val})
    if both:
        found.problems.append(f"validation images are among the training ones ({len(both)}): "
                              f"{short_list(both)}; keep each in one list")
    for part, names, needed in (("labelled", labelled, 2), ("validation", data.val, 1)):
        if not found.problems:
            check_classes(data, part, names, needed, found)
    lines = unused(data, found.pixels) if data.folders else []
    lacks = None
    if not data.images:
        lacks = f"{data.folders[0] if data.folders else data.root}: no photographs in it; put them there"
    elif not labelled:
        lacks = "no labelled image is left to train on; two are needed, as one is for validation: add masks"
        if data.folders:
            lacks += f", index PNGs of class ids, in {data.folders[1]}/, each with the stem of its image"
    elif not data.val:
        lacks = "no validation image; complete the data set, with leftImg8bit/val/ and gtFine/val/"
    elif not unlabelled and not supervised:
        small = [] if torch.cuda.is_available() else ["--small"]
        lacks = (f"no unlabelled image is left; add images without masks, train with --supervised, or leave "
                 f"the masks of half of them out: {data.command('train.py', '--split', '1_2', *small)}")
    if lacks:
        found.problems += [*lines, lacks]
    else:
        found.notes += lines
    found.notes = [note.encode(errors="backslashreplace").decode()  # for any terminal
                   for note in data.notes + found.notes]
    return found


def check_files(data, masked, unmasked=()):
    """Read the headers and ends of images, and the masks of those in `masked`. Returns Findings."""
    found, lines, palettes, turned, with_mask = Findings(), {}, {}, [], {*masked}
    everything = sorted({*masked, *unmasked})
    for lacking, what, remedy in (
            ([name for name in everything if name not in data.images], "listed images are missing",
             "complete the data set or fix the list, such as those in ImageSets/Segmentation/"),
            ([name for name in masked if name in data.images.keys() - data.masks.keys()], "images of the "
             "labelled or validation list have no mask", "add their masks or take them off the list")):
        if lacking:
            found.problems.append(f"{what} ({len(lacking)}): {short_list(lacking)}; {remedy}")

    def look(name):
        said, side, pixels, palette = None, 0, None, None
        try:
            image = data.image(name)
            size, side = image.size, max(image.size)  # demand_whole may shrink it
            demand_whole(image, data.images[name])
            if name in with_mask and name in data.masks:
                labels, palette = data.labels(name)
                pixels = (np.array(Image.fromarray(labels).histogram()) if labels.dtype == np.uint8 else
                          np.bincount(labels.ravel(), minlength=256))  # five times slower
                if labels.shape[::-1] != size:
                    said = (f"{data.masks[name]}: {labels.shape[1]} x {labels.shape[0]} pixels, but its "
                            f"image (upright, as its EXIF says) has {size[0]} x {size[1]}; export the mask "
                            f"again")
                elif data.folders and not image.format and Image.open(data.images[name]).size == size:
                    turned.append(data.images[name])
        except InputError as error:
            said = str(error)
        return name, said, side, pixels, palette

    there = [name for name in everything if name in data.images]
    with ThreadPoolExecutor() as pool:
        looks = pool.map(look, there)
        for name, said, side, pixels, palette in progress(looks, "images checked", len(there)):
            found.sides.append(side)
            if said:  # one line for all files that have the same remedy
                lines.setdefault(said.rpartition("; ")[2], []).append(said)
            if pixels is not None:
                found.pixels[name], palettes[name] = pixels, palette
    for remedy, (said, *more) in lines.items():
        found.problems.append(
            f"{said.removesuffix('; ' + remedy)} (and {len(more)} more); {remedy}" if more else said)
    if turned:
        found.notes.append(f"{one_of(sorted(turned))}: its EXIF turns it, and the size of its mask does not "
                           f"show whether the mask is turned, too; save the photograph as its mask lies, "
                           f"without EXIF")
    check_ids(data, found)
    check_palettes(data, palettes, found)
    return found


def demand_whole(image, path):
    """Raise InputError for a truncated photograph: a JPEG or PNG needs its end, others are decoded."""
    mark = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(image.format)
    if not image.format:  # drawn, or decoded already, to turn it
        return
    with reading(path):
        for length in (16, 1 << 16) if mark else ():  # cameras append data of their own
            end = end_of(path, length)
            if end.rfind(mark) > end.rfind(b"\xff\xda"):  # the end of a thumbnail is before the scan
                return
        image.draft(None, (1, 1))
        image.load()


def check_classes(data, part, names, needed, found):
    """Add a problem if the masks of a part of the data hold fewer than `needed` classes, else a note on those
    that they lack."""
    pixels = sum((found.pixels[name] for name in names), np.zeros(256, int))
    held = [label for label, count in zip(data.classes, pixels) if count]
    absent = [label for label in data.classes if label not in held]
    if names and len(held) < needed:
        what = f"{held[0]} alone" if held else "nothing"
        remedy = "add masks of other classes"
        if not held:
            remedy = f"annotate their images, or move such masks out of {data.root}"
        if pixels[IGNORE]:
            what += f", beside {IGNORE}, which is ignored"
        if pixels[IGNORE] and held:
            remedy = data.colours_remedy(remedy) if not data.label_map else (
                f"give what is ignored (black, where it has no line) a name in {data.root / 'labelmap.txt'}")
        found.problems.append(f"the {part} masks, {data.masks[names[0]]} for one, hold {what}; {remedy}")
    elif names and absent:
        first = " (the first name is that of the id 0)" if data.classes[0] in absent else ""
        found.notes.append(f"no {part} mask holds {short_list(absent)}{first}, which "
                           f"{'will not be learnt' if part == 'labelled' else 'is not in the mean IoU'}")


def check_ids(data, found):
    """Add a problem if masks hold ids of no class."""
    C = len(data.classes)
    strange = {name: np.setdiff1d(np.flatnonzero(counts[C:]) + C, IGNORE)
               for name, counts in found.pixels.items()}
    files = [data.masks[name] for name, ids in strange.items() if len(ids)]
    if not files:
        return
    ids = np.unique(np.concatenate([*strange.values()]))
    names_file, colours = data.root / "class_names.txt", data.colours_remedy("")
    if data.dataset != "custom":
        remedy = "replace the mask"
    elif (ids[ids > IGNORE] % 257).any():  # and not grey levels of 16 bits
        remedy = f"export the masks again, with class ids below {IGNORE}"
    elif not any(counts[0] for counts in found.pixels.values()):
        remedy = (f"no mask holds 0, and ids count from 0: if the names are those of the ids from 1 on, "
                  f"write one for 0 as the first line of {names_file}; else {colours}")
    elif [*ids] == [C]:
        remedy = (f"if {names_file} lacks a name, add it: the first line is the name of id 0, the next of "
                  f"id 1, and so on; if {C} is what nobody annotated, {colours}")
    else:
        remedy = (f"if these are class ids, write a name for each id, from 0, into {names_file}; if they "
                  f"number objects, export masks of classes; if they are grey levels or colours, {colours}")
    found.problems.append(f"{one_of(files)}: holds the ids {short_list(ids)}, but there are {C} classes "
                          f"(0 to {C - 1}); {remedy}")


def check_palettes(data, palettes, found):
    """Add a problem if an id has two colours in index PNGs, a note if black is another id than 0."""
    shades = {}  # id -> its colour, and the first mask with it
    for name, palette in palettes.items():
        for i in np.flatnonzero(found.pixels[name][:IGNORE]) if palette is not None else ():
            colour = written(palette[i])
            before, path = shades.setdefault(i, (colour, data.masks[name]))
            if before != colour:
                found.problems.append(f"{path} and {data.masks[name]}: the id {i} is {before} in the one and "
                                      f"{colour} in the other; {data.colours_remedy('replace one')}")
                return
    black = next((i for i, (colour, _) in shades.items() if colour == written(0)), 0)
    if black and 0 in shades:
        found.notes.append(f"{shades[black][1]}: the id {black} is black, and 0 is {shades[0][0]}; if the "
                           f"colours count and not the ids, {data.colours_remedy('replace the masks')}")


def unused(data, pixels):
    """Lines on custom data's files that are not used, or not as they seem to be meant: of each kind an
    example, their number, and what to do."""
    owners = {IMAGE_ENDING.sub("", tails(name)[-1]).lower(): tails(name)[-1]
              for name in sorted(data.images, key=len, reverse=True)}
    kinds = (*masks_among_photographs(data, owners), *stray_masks(data, owners),
             *list(unread(data, owners))[:4], *masks_of_one_class(data, pixels), *photographs_left_out(data))
    return [f"{one_of(files)}: {text}" for files, text in kinds if files]


def owner(owners, path):
    """The stem of the image whose mask a file seems to be by its name, if it is not its own."""
    image = owners.get(MASK_ENDING.sub("", path.stem).lower())
    return None if image == path.stem else image


def beginning(owners, path):
    """The stem of an image that is the beginning of a file's name, or the name of its folder; else None."""
    stem = path.stem.lower()
    starts = [path.parent.name.lower(), *(stem[:cut.start()] for cut in re.finditer("[-_. ]", stem))]
    return next((owners[start] for start in starts[::-1] if start in owners), None)


def masks_among_photographs(data, owners):
    copies = [path for path in data.images.values() if owner(owners, path) or looks_like_mask(path)]
    if any(data.images.get(name) in copies for name in data.masks):  # scanned pages have few colours, too
        copies = [path for path in copies if owner(owners, path)]
    copies.sort(key=lambda path: (not owner(owners, path), path))
    if copies:
        meant, place = owner(owners, copies[0]), f"into {data.folders[1]}/"
        if {meant, copies[0].stem} & data.masks.keys() or not any(map(looks_like_mask, copies)):
            place = "elsewhere"
        elif meant:
            place += f", this one as {meant}{copies[0].suffix}, and so on"
        yield copies, f"looks like a mask, and is read as a photograph; move such files {place}"


def stray_masks(data, owners):
    strays = sorted((data.masks[name] for name in data.masks.keys() - data.images.keys()),
                    key=lambda path: (not owner(owners, path), path))
    starts = Counter((path.parent, beginning(owners, path)) for path in strays)
    several = [path for path in strays
               if (start := beginning(owners, path)) and starts[path.parent, start] > 1]
    yield several, ("one of several masks of an image, which has one mask, of its own stem; if each is of "
                    "one class, merge them (see docs/own-photographs.md); else keep one of them, under that "
                    "stem")
    strays = [path for path in strays if path not in several]
    meant = owner(owners, strays[0]) or beginning(owners, strays[0]) if strays else None
    how = f": call this one {meant}{strays[0].suffix}, and so on" if meant and meant not in data.masks else ""
    yield strays, (f"a mask without an image of its name; a mask needs the stem of its image, and its "
                   f"folder, if several images have that stem{how}")


def masks_of_one_class(data, pixels):
    held = {data.masks[name]: {*np.flatnonzero(counts)} for name, counts in pixels.items()}
    yield ([path for path, ids in held.items() if len(ids) == 2 and IGNORE in ids],
           f"a mask of one class alone, beside {IGNORE}, which is ignored; if {IGNORE} is a class in such "
           f"masks, export them again, with its id")
    yield ([path for path, ids in held.items() if len(ids) == 1],
           f"a mask of one class, or {IGNORE}, alone; if nobody annotated it, move such masks out of "
           f"{data.root}: their images are unlabelled then")


def photographs_left_out(data):
    unlisted = sorted(data.images[name] for name in data.images.keys() - {*data.train, *data.val, *data.test})
    if any(path.name.lower() == "train.txt" for path in (data.root / "ImageSets/Segmentation").glob("*")):
        yield unlisted, ("a photograph on no list in ImageSets/Segmentation; to train on such photographs, "
                         "add them to its train.txt")
    else:
        yield unlisted, ("a photograph in val/ without a mask or not in val.txt, which is not used; add "
                         "what is lacking, or move such photographs to the training images")
    yield [data.images[name] for name in data.test], (
        "a photograph in test/ or on test.txt, which is not trained on; evaluate.py takes a --list of them; "
        "if it is no test set, call the folder otherwise")
    twins = twins_of(data)
    yield [*twins], (f"a validation image that is a training image under another name, here "
                     f"{short_list(twins.values(), 1)}; mIoU counts what was learnt by heart: keep one copy "
                     f"of each")


def twins_of(data):
    """Validation image -> training image with the same bytes; both are files."""
    def middle(path):
        with open(path, "rb") as file:
            file.seek(path.stat().st_size // 2)
            return hash(file.read(4096))

    val, train = ([data.images[name] for name in names if os.access(data.images.get(name, ""), os.R_OK)]
                  for names in (data.val, sorted({*data.train} - {*data.val})))
    sizes = {path.stat().st_size for path in val}
    known = {middle(path): path for path in train if path.stat().st_size in sizes}
    pairs = {path: known[middle(path)] for path in val if middle(path) in known}
    return {path: twin for path, twin in pairs.items() if path.read_bytes() == twin.read_bytes()}


def unread(data, owners):
    """Yields files that are not read, by folder and suffix, and what to do with them."""
    (photographs, masks), groups = data.folders, {}
    used = {*data.images.values(), *data.masks.values()}
    # A file of a photograph's name beside it, such as a camera's raw one, is passed over.
    photographed = {path.with_suffix("") for path in data.images.values()}
    # Where files may be moved: into a subfolder, if those that are read are in subfolders (see files_in).
    new_image, new_mask = (min(files.values()).parent if files else folder
                           for files, folder in ((data.images, photographs), (data.masks, masks)))
    for path in walk(data.root, (f"{photographs}/", f"{masks}/")):
        if path not in used and path.exists() and not SIDE_FILES.fullmatch(path.name) and (
                path.suffix.lower() in (*ANNOTATIONS, *MASK_SUFFIXES)
                or path.with_suffix("") not in photographed):
            groups.setdefault((path.parent, path.suffix.lower()), []).append(path)
    alike = Counter(path.stem for (_, suffix), paths in groups.items() for path in paths
                    if suffix in MASK_SUFFIXES)
    for (folder, suffix), paths in groups.items():
        parts = folder.relative_to(data.root).parts or ("",)
        among_images, among_masks = folder.is_relative_to(photographs), parts[0] in (*MASK_FOLDERS, OLD_MASKS)
        named = any(map(MASK_FOLDER.fullmatch, parts))
        lists = [path for path in paths if data.notes and re.match("(train)?val.*[.]txt$", path.name, re.I)]
        if lists:
            yield lists, (f"not read; if it lists the validation images, move it to "
                          f"{data.root / 'ImageSets/Segmentation/val.txt'}")
        copies = not among_images and (among_masks or named or looks_like_mask(paths[0]))
        fresh = [path for path in paths if not copies or data.masks.keys().isdisjoint(
            (owner(owners, path), *tails(name_in(data.root, path))))]
        if len(fresh) < len(paths) and among_masks and suffix in MASK_SUFFIXES:
            yield sorted({*paths} - {*fresh}), (f"not read, as {masks} has masks of the same names; move "
                                                f"away those that are wrong or left over")
        notes = suffix in ANNOTATIONS and (among_images or named and not data.masks)
        if not (fresh and (among_images or among_masks or notes or suffix in IMAGE_SUFFIXES | HEIC_SUFFIXES)):
            continue
        meant, remedy = owner(owners, fresh[0]), "if they are photographs, convert them to JPEG"
        seem_masks = among_masks or suffix in IMAGE_SUFFIXES and (
            named or looks_like_mask(fresh[0])
            or 2 * sum(bool(owner(owners, path)) for path in fresh) > len(fresh))
        if seem_masks and alike[fresh[0].stem] > 1:
            remedy = (f"others have the same names: if each folder has the masks of one class, merge them "
                      f"(see docs/own-photographs.md); else move those of one folder into {new_mask}/")
        elif seem_masks and suffix in MASK_SUFFIXES:
            rename = f", this one as {meant}{suffix}, and so on" if meant else ""
            remedy = f"if they are masks, move them into {new_mask}/{rename}"
        elif seem_masks:
            remedy = f"if they are masks, export them again, as PNGs, into {new_mask}/: those keep ids exact"
        elif suffix in IMAGE_SUFFIXES:
            remedy = (f"if they are other photographs, to train on them, move them into {new_image}/, each "
                      f"under a name of its own")
        elif notes:
            remedy = "masks are read, not annotations: export index PNGs of them"
        elif not suffix:
            remedy = f"if they are photographs, call this one {fresh[0].name}.jpg, and so on"
        yield fresh, f"not read; {remedy}"
