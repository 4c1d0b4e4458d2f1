"""Data sets, their lists and masks, and the split into labelled and unlabelled images.

check.py says whether they are fit to train on; prepare.py is the command that reports on them.
"""

import os
import re
import shlex
import sys
import unicodedata
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from shapes import SHAPES_CLASSES, draw_shapes

if sys.version_info.minor < 10:  # every command comes by here
    sys.exit(f"HagSeg needs Python 3.10 or later; this is {sys.version_info[0]}.{sys.version_info[1]}")

IGNORE = 255
SPLITS = {"1_16": 16, "1_8": 8, "1_4": 4, "1_2": 2, "full": 1}
HERE = Path(__file__).resolve().parent


class InputError(Exception):
    """Something that the user can fix: one line that names the file or flag, and the remedy."""


VOC_CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor"]
CITYSCAPES = {  # class: (its labelId, its colour), in the order of the 19 training ids
    "road": (7, (128, 64, 128)), "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)), "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)), "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)), "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)), "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)), "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)), "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)), "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)), "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
TRAINING_SETS = {"voc": 10582, "voc_classic": 1464, "cityscapes": 2975}  # what a split is a part of
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"}
HEIC_SUFFIXES = {".heic", ".heif"}  # photographs too, which Pillow cannot read
MASK_FOLDERS = ("SegmentationClassIds", "SegmentationClass", "SegmentationClassPNG", "masks")
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Image.Transpose
warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata, large photographs: both are read


def voc_palette(num_classes):
    """VOC's colours: the bits of the class id, spread over red, green and blue."""
    return [tuple(sum((c >> 3 * i + k & 1) << 7 - i for i in range(8)) for k in range(3))
            for c in range(num_classes)]


@dataclass
class SegmentationData:
    """A data set: where its images and masks are, and what its classes are called.

    images, masks:  id -> file. An unlabelled image has no mask.
    train, val:     sorted ids; `labelled` are those of train that a split may take as labelled.
    test:           own data: ids in a folder test/, for evaluate.py --list alone.
    label_ids:      a table of 256 from the ids in the mask files to the training ids, or None.
    notes:          lines that say what was decided about this data set.
    dataset, root:  --dataset and --data-root, for commands in messages.
    folders:        own data: the folders of the photographs and of the masks.
    """
    classes: list
    palette: list
    images: dict = field(repr=False)
    masks: dict = field(repr=False)
    train: list = field(repr=False)
    val: list = field(repr=False)
    labelled: list = field(repr=False)
    label_ids: np.ndarray | None = field(default=None, repr=False)
    notes: list = field(default_factory=list, repr=False)
    dataset: str = "shapes"
    root: Path | None = None
    folders: tuple | None = field(default=None, repr=False)
    test: list = field(default_factory=list, repr=False)

    def image(self, name):
        """The photograph as a Pillow image, upright as its EXIF says. Decoded only when needed."""
        return open_photograph(self.images[name])

    def labels(self, name):
        """(labels, palette) of a mask: (H, W) integers, which may hold ids that no class has; and its own
        colours [r, g, b, r, ...], or None. Raises InputError for what cannot be read or is in colour."""
        path = self.masks[name]
        with reading(path), Image.open(path) as picture:
            labels, mode = np.array(upright(picture)), picture.mode
            palette = picture.getpalette() if mode == "P" else None
        if labels.dtype == bool and (len(self.classes) == 2 or not labels.any()):
            labels = labels.astype(np.uint8)
        if labels.ndim != 2 or labels.dtype.kind not in "ui" or labels.dtype == np.int32 and labels.min() < 0:
            kind = {"1": "of one bit", "F": "of floats", "I": "of negative numbers"}
            raise InputError(f"{path}: {kind.get(mode, 'a colour image')} ({mode}), not an index PNG (one "
                             f"channel of class ids); {self.conversion('replace the mask')}")
        if self.label_ids is not None:
            labels = np.where(labels > IGNORE, labels, self.label_ids[labels.clip(max=IGNORE)])
        return labels, palette

    def mask(self, name):
        """The label map as a Pillow "L" image of class ids and 255; raises InputError for other ids."""
        labels, _ = self.labels(name)
        strange = labels[(labels != IGNORE) & (labels >= len(self.classes))]
        if strange.size:
            raise InputError(f"{self.masks[name]}: holds the ids {short_list(np.unique(strange))}, but there "
                             f"are {len(self.classes)} classes; see {self.command('prepare.py')}")
        return Image.fromarray(labels.astype(np.uint8))

    def command(self, script, *options):
        return command(script, self.dataset, self.root, *options)

    def conversion(self, otherwise=""):
        """The remedy for masks that are told by colour: a command for own data."""
        return (f"make class ids of the masks: {self.command('prepare.py', '--convert')}"
                if self.dataset == "custom" else otherwise)


def command(script, dataset, root, *options):
    """A whole command, for a message, as it can be pasted into a shell."""
    where = ["--data-root", str(root)] if root else []
    return shlex.join(["python", script, "--dataset", dataset, *where, *options])


def open_photograph(path):
    """A Pillow image, upright, and not decoded yet unless it had to be turned. Raises InputError."""
    with reading(path):
        image = Image.open(path)
        if image.mode[0] in "IF":
            raise InputError(f"{path}: has more than 8 bits a channel ({image.mode}); convert it to 8 bits")
        return upright(image)


def upright(image):
    """An open Pillow image, turned as its EXIF says."""
    orientation = None
    if "exif" in image.info or image.format == "TIFF":  # of others, getexif decodes the image
        with suppress(Exception):  # an EXIF that cannot be read says nothing
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation in TURNS and image.format == "TIFF":
        image.load()  # it turns itself
    elif orientation in TURNS:
        image = image.transpose(Image.Transpose(TURNS[orientation]))  # exif_transpose rewrites the EXIF
    return image


@contextmanager
def reading(path):
    """Makes an InputError, which names the file, of whatever reading it raises."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Pillow has a dozen kinds of them
        raise InputError(unreadable(Path(path), error)) from None


def unreadable(path, error):
    reason, remedy = (str(error) or type(error).__name__).splitlines()[0], "replace or remove it"
    if isinstance(error, FileNotFoundError):
        return f"{path}: " + ("a link to nothing; remove it" if path.is_symlink() else "no such file")
    if isinstance(error, PermissionError):
        reason, remedy = error.strerror, f"allow it: {shlex.join(['chmod', '-R', 'u+rwX', str(path)])}"
    if isinstance(error, UnicodeError):
        return f"{path}: not UTF-8; save it as UTF-8"
    if isinstance(error, Image.DecompressionBombError):
        reason, remedy = f"more than {2 * Image.MAX_IMAGE_PIXELS // 10 ** 6} megapixels", "tile or shrink it"
    if isinstance(error, UnidentifiedImageError):
        with open(path, "rb") as file:
            heic = file.read(8)[4:] == b"ftyp"
        reason, remedy = ("HEIC or AVIF", "convert it to JPEG") if heic else ("not an image", remedy)
    return f"{path}: cannot be read ({reason}); {remedy}"


def short_list(items, most=3):
    items = [str(item) for item in items]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def open_data(dataset, root=None):
    """The data set that --dataset and --data-root name. Raises InputError where it is not there."""
    if dataset == "shapes":
        if root:
            raise InputError(f"--data-root {root}: the data set shapes is drawn, not read; give --dataset "
                             f"custom (or voc, voc_classic, cityscapes) with it")
        return Shapes()
    root = Path(root)
    if not os.path.isdir(root):  # Path.is_dir raises where a folder above cannot be read
        remedy = {"voc": f", or download it: {command('prepare.py', 'voc', root, '--download')}",
                  "cityscapes": ", with leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
                                "cityscapes-dataset.com unpacked in it"}
        raise InputError(f"--data-root {root}: no such folder; give the folder of {dataset}"
                         + remedy.get(dataset.removesuffix("_classic"), ""))
    try:
        opened = {"cityscapes": open_cityscapes, "custom": open_custom}.get(dataset, open_voc)(root)
    except PermissionError as error:
        raise InputError(unreadable(Path(error.filename), error)) from None
    opened.dataset, opened.root = dataset, root
    if dataset == "voc":
        opened.labelled = opened.train
    return opened


def find_folder(root, child, parents):
    """The first of root / parent that holds the folder `child`."""
    for parent in parents:
        if (root / parent / child).is_dir():
            return root / parent
    raise InputError(f"--data-root {root}: no folder {child}/ in it; give the folder that holds it")


def open_voc(root):
    """PASCAL VOC 2012, with SBD's masks in SegmentationClassAug/ for the blended training set; only
    VOC's own training ids are `labelled`."""
    root = find_folder(root, "JPEGImages", (".", "VOC2012", "VOCdevkit/VOC2012", ".."))
    lists = root / "ImageSets" / "Segmentation"
    voc_train, val = read_list(lists / "train.txt"), read_list(lists / "val.txt")
    blended = stems(root / "SegmentationClassAug")
    own = stems(root / "SegmentationClass")
    if not blended:
        raise InputError(f"{root / 'SegmentationClassAug'}: no masks; the blended training set needs "
                         f"SBD's: {command('prepare.py', 'voc', root, '--download')}")
    train = sorted((set(blended) | set(voc_train)) - set(val))
    images = {name: root / "JPEGImages" / f"{name}.jpg" for name in train + val}
    return SegmentationData(VOC_CLASSES, voc_palette(21), images, blended | own, train, val, voc_train)


def open_cityscapes(root):
    """Cityscapes: leftImg8bit/ and gtFine/, with labelTrainIds or only labelIds masks."""
    root = find_folder(root, "leftImg8bit", (".", "cityscapes", ".."))
    if not (root / "gtFine").is_dir():
        raise InputError(f"{root}: no folder gtFine/ in it; unpack gtFine_trainvaltest.zip there")
    images, masks, lists = {}, {}, {"train": [], "val": []}
    for part, names in lists.items():
        for path in sorted((root / "leftImg8bit" / part).rglob("*_leftImg8bit.png")):
            name = path.name.removesuffix("_leftImg8bit.png")
            names.append(name)
            images[name] = path
            city = path.parent.relative_to(root / "leftImg8bit")
            masks[name] = root / "gtFine" / city / f"{name}_gtFine_labelTrainIds.png"
    label_ids = None
    if not any(path.exists() for path in masks.values()):
        masks = {name: path.with_name(path.name.replace("TrainIds", "Ids"))
                 for name, path in masks.items()}
        label_ids = np.full(256, IGNORE, np.uint8)
        label_ids[[label_id for label_id, _ in CITYSCAPES.values()]] = range(19)
    masks = {name: path for name, path in masks.items() if path.exists()}
    return SegmentationData(list(CITYSCAPES), [colour for _, colour in CITYSCAPES.values()], images,
                            masks, lists["train"], lists["val"], lists["train"], label_ids)


def open_custom(root):
    """Own photographs in the VOC layout, as labelme and CVAT export it, or in images/ and masks/.

    Every training image with a mask is labelled; every one without is not.
    """
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    photographs = next((root / name for name in ("JPEGImages", "images") if root / name in folders), None)
    if photographs is None:
        raise InputError(f"--data-root {root}: neither JPEGImages/ nor images/ in it (but "
                         f"{short_list(path.name for path in folders) or 'no folder'}); give the folder "
                         f"that holds one of them, or call the folder of the photographs images/, and that "
                         f"of the masks masks/")
    for mask_folder in (root / name for name in MASK_FOLDERS):
        masks = stems(mask_folder)
        if masks:
            break
    label_map = root / "labelmap.txt"
    if label_map.exists() and root / "SegmentationClassIds" not in folders:
        raise InputError(f"{label_map}: says that the masks are told by colour; make class ids of them: "
                         f"{command('prepare.py', 'custom', root, '--convert')}")
    classes = read_class_names(root / "class_names.txt")
    images, notes = stems(photographs, IMAGE_SUFFIXES), []
    test = stems(photographs, IMAGE_SUFFIXES, test=True)
    test = {name: test[name] for name in test.keys() - images.keys()}
    listed = root / "ImageSets" / "Segmentation"
    lists = {path.name.lower(): path for path in sorted(listed.glob("*"))}
    train_list, val_list = lists.get("train.txt"), lists.get("val.txt") or lists.get("validation.txt")
    train = sorted(read_list(train_list, images) if train_list else images)
    held_out = sorted(name for name in images.keys() & masks.keys() if {"val", "valid", "validation"} & {
        part.lower() for part in images[name].relative_to(photographs).parts[:-1]})
    if val_list:
        val = read_list(val_list, images)
    else:
        # By its name alone, so that an image stays where it is when other masks are added or removed.
        draw = {name: np.random.default_rng([*name.encode()]).random() for name in train if name in masks}
        tenth = min(sum(value < 0.1 for value in draw.values()), len(draw) // 5)
        val = held_out or sorted(sorted(draw, key=draw.get)[:max(1, tenth)])
        notes = [f"no {listed / 'val.txt'}: validation takes {len(val)} of the {len({*draw, *val})} labelled "
                 f"images, {'those of the folder val/' if held_out else 'about a tenth, by their names'}"]
    if not val_list or not train_list:
        train = sorted({*train} - {*val})
    labelled = [name for name in train if name in masks]
    masks |= {name: path for name, path in stems(mask_folder, test=True).items() if name in test}
    return SegmentationData(classes, voc_palette(len(classes)), images | test, masks, train, val, labelled,
                            notes=notes, folders=(photographs, mask_folder), test=sorted(test))


def read_class_names(path):
    """The names in class_names.txt: a line's number, from 0, is the class id."""
    names = read_lines(path) if path.exists() else []
    while names and not names[-1]:
        names.pop()
    comments = [name for name in names if re.match(r"#(\s|$)", name)]
    numbers = [int(number[1]) for name in names if (number := re.match(r"(\d+)(?:\W|$)", name))]
    if not names:
        other = [f"; or rename {name}, if it is that" for name in ("classes.txt", "labels.txt")
                 if path.with_name(name).exists()]
        text = f"missing or empty; write one class name a line, in the order of the ids{''.join(other[:1])}"
    elif "__ignore__" in names:
        text = "__ignore__ is 255 in the masks, and no class; remove its line"
    elif comments:
        text = f"'{comments[0]}' would be the name of a class; remove this line"
    elif not all(names) or not 2 <= len(names) <= IGNORE:
        text = (f"{len(names)} lines; from 2 to {IGNORE} are needed, one class name a line, none of them "
                f"empty: a line's number, from 0, is its class id")
    elif len({*names}) < len(names):
        text = f"{max(names, key=names.count)} stands there twice; give each class a name of its own"
    elif len(numbers) == len(names) and numbers != [*range(len(names))]:
        text = (f"numbered from {numbers[0]}, but a line's number, from 0, is its class id; write a line "
                f"for each id in the masks, from 0, without numbers")
    else:
        return names
    raise InputError(f"{path}: {text}")


def read_lines(path):
    with reading(path):
        text = path.read_text("utf-8-sig")
        if "\0" in text:  # UTF-16 without its mark
            raise UnicodeError
        return [line.strip() for line in text.splitlines()]


def files_in(folder, suffixes):
    """The files of a folder with one of the suffixes, sorted; where it has none itself, those in its
    subfolders and behind its links. Hidden ones are left out."""
    if folder.is_dir():
        os.listdir(folder)  # a PermissionError, which glob would leave out
    for pattern in ("*", "**/*"):
        found = sorted(folder / name for name in glob(pattern, root_dir=folder, recursive=True)
                       if os.path.splitext(name)[1].lower() in suffixes)
        if found:
            break
    return found


def stems(folder, suffixes=(".png",), test=False):
    """stem -> file, of files_in(folder, suffixes), sorted, but for those in test/, or of those alone. Stems
    are in Unicode's form NFC, whatever the file system or a list uses."""
    found = {}
    for path in files_in(folder, suffixes):
        if ("test" in map(str.lower, path.relative_to(folder).parts[:-1])) != test:
            continue
        stem = unicodedata.normalize("NFC", path.stem)
        if re.search("[\n\ud800-\udfff]", stem):  # the latter: bytes that are no UTF-8
            raise InputError(f"{folder}: a file has the strange name {ascii(path.name)}; rename it")
        if stem in found:
            raise InputError(f"{path} and {found[stem]}: two files for one id; rename one, remove it, or, "
                             f"if it is a mask, move it away from the photographs")
        found[stem] = path
    return found


def read_list(path, known=()):
    """The ids in a list, one a line: one of the `known` ids as it stands, or any form in use: bare ids,
    JPEGImages/ID.jpg with or without its mask behind it, or leftImg8bit/train/CITY/ID_leftImg8bit.png. A #
    and a space open a comment."""
    ids = []
    for line in filter(None, read_lines(path)):
        if re.match(r"#(\s|$)", line):
            continue
        file = re.match(r"(.+?)\.(?:jpe?g|jfif|png|bmp|webp|tiff?)(?:\s|$)", line, re.IGNORECASE)
        name = re.split(r"[/\\]", file[1] if file else line)[-1].removesuffix("_leftImg8bit")
        ids.append(unicodedata.normalize("NFC", line if line in known else name))
    twice = sorted(name for name in set(ids) if ids.count(name) > 1) if len(set(ids)) < len(ids) else []
    if twice:
        raise InputError(f"{path}: ids listed twice: {short_list(twice)}; keep one line of each")
    if not ids:
        raise InputError(f"{path}: is empty; write an id a line")
    return ids


def split_ids(data, dataset, split):
    """The (labelled, unlabelled) training ids under --split: sorted, disjoint, complete.

    A name of SPLITS takes the positions in splits/DATASET/NAME.txt if there is such a list, else
    every 16th, 8th, 4th or 2nd of the sorted ids, from the first: the rule of CPS's blended VOC
    partitions. A file is a list of labelled ids. None labels every image that has a mask.
    """
    pool = sorted(data.labelled)
    if split in SPLITS:
        if len(pool) != TRAINING_SETS.get(dataset, len(pool)):
            raise InputError(f"--split {split}: takes its part of all {TRAINING_SETS[dataset]} training "
                             f"images of {dataset}, and {len(pool)} are here; complete them, or give "
                             f"a list of ids")
        positions = HERE / "splits" / dataset / f"{split}.txt"
        if positions.exists():
            labelled = [pool[int(p)] for p in read_list(positions)]
        else:
            labelled = pool[::SPLITS[split]]
    elif split is None:
        labelled = pool
    elif Path(split).is_file():
        labelled = read_list(Path(split), data.images)
        unknown = sorted({*labelled} - {*data.train})
        held_out = sorted({*unknown} & {*data.val})
        if held_out:
            raise InputError(f"--split {split}: validation images among the labelled ones: "
                             f"{short_list(held_out)}; remove them")
        if unknown:
            raise InputError(f"--split {split}: {len(unknown)} ids are not in {dataset}'s training "
                             f"set: {short_list(unknown)}; fix the list or complete the data")
    else:
        raise InputError(f"--split {split}: {dataset} has no such split and there is no such file; "
                         f"give one of {', '.join(SPLITS)}, or a list of ids")
    return sorted(labelled), sorted(set(data.train) - set(labelled))


class Shapes(SegmentationData):
    """The embedded data set: 256 training and 128 validation images that shapes.py draws."""
    TRAIN, VAL = 256, 128

    def __init__(self):
        train = [f"train_{i:03d}" for i in range(self.TRAIN)]
        val = [f"val_{i:03d}" for i in range(self.VAL)]
        files = {name: Path("shapes") / name for name in train + val}
        super().__init__(list(SHAPES_CLASSES), voc_palette(len(SHAPES_CLASSES)), files, files, train,
                         val, train)

    def image(self, name):
        return draw_shapes(name)[0]

    def labels(self, name):
        return np.array(draw_shapes(name)[1]), None
