"""Data sets, their lists and masks, and the split into labelled and unlabelled images."""

import os
import re
import shlex
import sys
import unicodedata
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.datasets import Cityscapes

from ranks import CommandError
from shapes import SHAPES_CLASSES, draw_shapes

if sys.version_info.minor < 10:  # every command imports this file
    sys.exit(f"HagSeg needs Python 3.10 or later; this is {sys.version_info[0]}.{sys.version_info[1]}")

IGNORE = 255
SPLITS = {"1_16": 16, "1_8": 8, "1_4": 4, "1_2": 2, "full": 1}
HERE = Path(__file__).resolve().parent


class InputError(CommandError):
    """Something that the user can fix: one line that names the file or flag, and the remedy."""


VOC_CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor"]
CITYSCAPES = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < IGNORE), key=lambda c: c.train_id)
TRAINING_SETS = {"voc": 10582, "voc_classic": 1464, "cityscapes": 2975}  # images that a split divides
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"}
TEST = "test(ing)?"  # what the folder of a test set is called
HEIC_SUFFIXES = {".heic", ".heif"}  # photographs too, which Pillow cannot read
MASK_SUFFIXES = {".png", ".tif", ".tiff", ".bmp", ".gif", ".npy"}  # lossless
MASK_FOLDERS = ("SegmentationClassPNG", "SegmentationClass", "masks")
BLENDED_MASKS = "SegmentationClassAug"
OLD_MASKS = "SegmentationClassIds"  # the index PNGs that earlier versions made of colour-coded masks
FEW_COLOURS = 20  # photographs have more, label images do not
OKABE_ITO = [(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
             (213, 94, 0), (204, 121, 167)]
warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd metadata and large photographs: both are read


def voc_palette(num_classes):
    """VOC's colours: the bits of the class id, spread over red, green and blue."""
    return [tuple(sum(((c >> (3 * i + k)) & 1) << (7 - i) for i in range(8)) for k in range(3))
            for c in range(num_classes)]


def distinct_palette(num_classes):
    """Colours that colour-blind people can tell apart, too: the eight of Okabe and Ito (2008), "Color
    Universal Design"; then their darker and lighter shades; then VOC's."""
    eight = np.array(OKABE_ITO)
    shades = np.concatenate([eight, eight[1:] // 2, (eight + 255) // 2])[:num_classes]
    return [*map(tuple, shades.tolist()), *voc_palette(num_classes)[len(shades):]]


@dataclass(repr=False)
class SegmentationData:
    """A data set: where its images and masks are, and what its classes are called.

    images, masks:  id -> file. An unlabelled image has no mask.
    train, val:     sorted ids; `labelled` are those of train that a split may take as labelled.
    notes:          lines that say what was decided about this data set.
    dataset, root:  --dataset and --data-root, for commands in messages.
    Custom data: the folders of photographs and masks; the label map, (r, g, b) -> class or "ignore", without
    which masks hold ids; and the ids of its test set.
    """
    classes: list
    palette: list
    images: dict
    masks: dict
    train: list
    val: list
    labelled: list
    notes: list = field(default_factory=list)
    dataset: str = "shapes"
    root: Path | None = None
    folders: tuple | None = None
    label_map: dict = field(default_factory=dict)
    test: list = field(default_factory=list)
    packed: dict = field(default_factory=dict)  # id -> the shape and the packed labels of a mask in colour

    def image(self, name):
        """The photograph as a Pillow image, upright as its EXIF says. Decoded only when needed."""
        return open_photograph(self.images[name])

    def labels(self, name):
        """(labels, palette) of a mask. labels: (H, W) integers, which may be the ids of no class. palette:
        the 256 colours of an index PNG that is read without a label map, else None. Raises InputError for a
        mask that cannot be read, is in colour, or has a colour that the label map lacks."""
        path = self.masks[name]
        if self.label_map:
            if name not in self.packed:  # decoding a PNG in colour again would take four times as long
                labels = labels_by_colour(path, self.label_map, self.classes)
                self.packed[name] = labels.shape, zlib.compress(labels, 1)
            shape, packed = self.packed[name]
            return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(shape), None
        labels, palette = read_mask(path)
        if labels is None or labels.dtype == bool and labels.any() and len(self.classes) != 2:
            kind = "in colour" if labels is None else "of one bit"
            raise InputError(f"{path}: {kind}, not one channel of class ids; "
                             + self.colours_remedy("replace the mask"))
        if self.dataset == "cityscapes" and path.name.endswith("_labelIds.png"):
            training_ids = np.full(256, IGNORE, np.uint8)
            training_ids[[c.id for c in CITYSCAPES]] = range(19)
            labels = np.where(labels > IGNORE, labels, training_ids[labels.clip(max=IGNORE)])
        return labels, palette

    def mask(self, name):
        """The mask as a Pillow "L" image of class ids and 255; raises InputError for other ids."""
        labels, _ = self.labels(name)
        strange = labels[(labels != IGNORE) & (labels >= len(self.classes))]
        if strange.size:
            raise InputError(f"{self.masks[name]}: holds the ids {short_list(np.unique(strange))}, but there "
                             f"are {len(self.classes)} classes; see {self.command('prepare.py')}")
        return Image.fromarray(labels.astype(np.uint8))

    def command(self, script, *options):
        return command(script, self.dataset, self.root, *options)

    def colours_remedy(self, otherwise):
        """What to do where masks hold no class ids: for custom data, a command."""
        own = f"say which colour is which class: {self.command('prepare.py', '--colours')}"
        return own if self.dataset == "custom" else otherwise


def command(script, dataset, root, *options):
    """A command for a message, complete, and quoted for a shell."""
    where = ["--data-root", str(root)] if root else []
    return shlex.join(["python", script, "--dataset", dataset, *where, *options])


def open_photograph(path):
    """A photograph as a Pillow image, upright; decoded only if it is turned. Raises InputError."""
    with reading(path):
        image = Image.open(path)
        if image.mode[0] in "IF" or ";16" in str(image.tile[:1]):  # in RGB Pillow keeps 8 of 16
            remedy = ("it looks like a mask: move it to the masks" if looks_like_mask(path) else
                      "scale its values to 0 to 255, by one factor for all photographs, and save it with 8 "
                      "bits a channel")
            raise InputError(f"{path}: has more than 8 bits a channel; {remedy}")
        return upright(image)


def upright(image):
    """An open Pillow image, turned as its EXIF says."""
    # Of others getexif decodes the image. ImageMagick writes the EXIF of a PNG behind its pixels.
    if ({"exif", "Raw profile type exif"} & image.info.keys() or image.format == "TIFF"
            or image.format == "PNG" and b"eXIf" in end_of(image.filename, 1 << 17)):
        with suppress(Exception):  # an EXIF that cannot be read says nothing
            if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
                image.filename = ""  # else Pillow maps some TIFFs into memory with their sides exchanged
                image.info.pop("exif", None)  # exif_transpose would write it anew, which may fail
                return ImageOps.exif_transpose(image)
    return image


def end_of(path, length):
    """The last bytes of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - length))
        return file.read()


def read_mask(path):
    """(pixels, colours) of a mask. Indices (H, W) come with their colours (256,). Ids, grey values or bits
    (H, W) come with None. Of a mask in colour the pixels are None and the colours (H, W). A colour is the
    number r + 256 g + 65536 b."""
    with reading(path):
        if path.suffix.lower() == ".npy":
            pixels = np.load(path)
            if pixels.dtype == np.uint8 and pixels.shape[2:] == (3,):
                return None, colours_of(Image.fromarray(pixels))
            return whole_numbers(pixels), None
        with Image.open(path) as opened:
            if ({opened.format, opened.info.get("compression")} & {"JPEG", "MPO", "jpeg"}  # under any suffix
                    or getattr(opened, "n_frames", 1) > 1):
                raise InputError(f"{path}: a JPEG, or of several pages; export it again, as a PNG")
            how, picture = str(opened.tile[:1]), upright(opened)
            if picture.mode in ("1", "L", "F") or picture.mode[0] == "I":
                scale = 17 if "'L;4" in how else 85 if "'L;2" in how else 1  # as Pillow scales few bits
                pixels = whole_numbers(np.array(picture))
                return pixels if scale == 1 else pixels // scale, None
            if picture.mode == "P" and opened.format != "GIF":  # whose indices are in any order
                ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
                ramp.putpalette(picture.getpalette())
                return np.array(picture), colours_of(ramp)[0]
            if ";16" in how:  # Pillow keeps 8 of them
                raise InputError(f"{path}: has channels of 16 bits; export it with 8 bits a channel")
            colours = colours_of(picture)
            if picture.mode in ("RGBA", "LA"):
                hidden = np.array(picture.getchannel("A")) == 0
                if hidden.any() and np.intersect1d(colours[hidden], colours[~hidden]).size:
                    raise InputError(f"{path}: its transparent pixels have the colour of visible ones; "
                                     f"export it again, without transparency, with a colour for each class")
            return None, colours


def colours_of(picture):
    pixels = picture.convert("RGB").tobytes("raw", "RGBX")
    return np.frombuffer(pixels, "<u4").reshape(picture.height, picture.width) & 0xFFFFFF


def whole_numbers(pixels):
    """(H, W) numbers of any type as integers below 65536; labelme's -1 becomes 255. Raises ValueError."""
    signed = pixels.dtype.kind in "if"
    pixels = np.where(pixels == -1, IGNORE, pixels) if signed else pixels
    if pixels.ndim != 2 or pixels.max() > 65535 or signed and ((pixels < 0) | (pixels % 1 != 0)).any():
        raise ValueError(f"not a whole number from 0 to 65535 a pixel, with {IGNORE} where there is no "
                         f"class, but {pixels.dtype} of shape {pixels.shape}")
    return pixels.astype(np.int64) if signed else pixels


def read_colours(path):
    """As read_mask, but ids, grey values and bits come with the 256 greys as their colours."""
    pixels, colours = read_mask(path)
    if colours is None:
        with reading(path):
            colours = np.arange(256) * 0x010101
            pixels = pixels * np.uint8(255) if pixels.dtype == bool else pixels
            if pixels.max() > IGNORE:
                pixels = whole_numbers(np.where(pixels > IGNORE, pixels / 257, pixels))  # 65535 is white
    return pixels, colours


def labels_by_colour(path, label_map, classes):
    """The class ids, (H, W) uint8, of a mask whose colours are looked up in the label map."""
    pixels, colours = read_colours(path)
    table = np.zeros(1 << 24, np.uint16)  # colour -> 1 + id; untouched zeros take no memory
    for (r, g, b), label in label_map.items():
        table[r | g << 8 | b << 16] = 1 + (IGNORE if label == "ignore" else classes.index(label))
    labels = table[colours] if pixels is None else table[colours][pixels]
    if not labels.all():
        lacking = np.unique((colours if pixels is None else colours[pixels])[labels == 0])
        raise InputError(f"{path}: holds colours that labelmap.txt lacks: "
                         f"{short_list(map(written, lacking))}; add a line for each there, with the name of "
                         f"its class, or ignore")
    return (labels - 1).astype(np.uint8)


def written(colour):
    return f"({colour & 255},{colour >> 8 & 255},{colour >> 16})"


def looks_like_mask(path):
    """Whether a picture has as few colours as a label image."""
    if path.suffix.lower() not in MASK_SUFFIXES:
        return False
    with suppress(Exception), Image.open(path) as picture:
        dense = 0.3 if picture.format == "PNG" else 1.1  # bytes a pixel; a photograph has more, undecoded
        if path.stat().st_size < 1024 + dense * picture.width * picture.height:
            colours = np.unique(picture) if picture.mode[0] in "IF" else picture.getcolors(FEW_COLOURS) or ()
            return 2 <= len(colours) <= FEW_COLOURS
    return False


@contextmanager
def reading(path):
    """Turns any error of reading a file into an InputError that names the file and the remedy."""
    try:
        yield
        return
    except InputError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        wrong = "broken symbolic link; remove it" if Path(path).is_symlink() else "no such file"
    except UnicodeError:
        wrong = "not UTF-8; save it as UTF-8"
    except PermissionError as error:
        folder = path if os.path.isdir(path) else Path(path).parent  # one command for all files in it
        allow = shlex.join(["chmod", "-R", "u+rwX", str(folder)])
        wrong = f"cannot be read ({error.strerror}); allow it: {allow}"
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10 ** 6
        wrong = f"cannot be read (more than {limit} megapixels); tile or shrink it"
    except Exception as error:  # Pillow has a dozen kinds of them
        reason, remedy = (str(error) or type(error).__name__).splitlines()[0], "replace or remove it"
        if isinstance(error, UnidentifiedImageError):
            with open(path, "rb") as file:
                start, reason = file.read(8), "not an image"
            if start[4:] == b"ftyp":
                reason, remedy = "HEIC or AVIF", "convert it to JPEG"
            elif start[:2] in (b"II", b"MM"):
                reason = ("a TIFF of a kind that Pillow does not know, such as of 64 bits, two channels or "
                          "three floats")
                remedy = "save it again as uint8, with one or three channels"
        wrong = f"cannot be read ({reason}); {remedy}"
    raise InputError(f"{path}: {wrong}")


def short_list(items, most=3):
    items = [str(item) for item in items]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def one_of(items):
    """The first of some items and how many there are, for a message about all of them."""
    return f"{items[0]} (one of {len(items)})" if len(items) > 1 else f"{items[0]}"


def walk(top, links_below=None):
    """Yields the files below a folder, but for hidden ones and the thumbnails of a Synology NAS. Each folder
    is read once, however many links lead to it. With `links_below`, links are followed only in those folders,
    and folders without permission are skipped."""
    def identity(folder):
        return os.stat(folder).st_dev, os.stat(folder).st_ino

    folders, links, seen = [str(top)], [], {*map(identity, Path(top).resolve().parents)}
    while folders or links:
        folder = (folders or links).pop(0)  # links last, so that a folder has its own name
        if identity(folder) in seen or links_below and not os.access(folder, os.R_OK | os.X_OK):
            continue
        seen.add(identity(folder))
        with reading(folder):
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith((".", "@eaDir")):
                continue
            if not entry.is_dir():
                yield Path(entry.path)
            elif not entry.is_symlink():
                folders.append(entry.path)
            elif links_below is None or f"{entry.path}/".startswith(links_below):
                links.append(entry.path)


def files_in(folder, suffixes):
    """A folder's own files with one of the suffixes, sorted; if it has none, those below it."""
    found = [path for path in walk(folder) if path.suffix.lower() in suffixes] if folder.is_dir() else []
    return sorted([path for path in found if path.parent == folder] or found)


def tails(path):
    """a/b/c, b/c and c."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def name_in(folder, path):
    """A file's path in a folder, without suffix, in Unicode's form NFC: file systems differ in it."""
    return unicodedata.normalize("NFC", os.path.splitext(str(path)[len(str(folder)) + 1:])[0])


def in_folder(name, pattern):
    """Whether a folder on a path matches a pattern, perhaps with an ending as in Test2 or test_set."""
    return any(re.fullmatch(pattern + r"[-_ ]?(set|images|\d*)", folder, re.IGNORECASE)
               for folder in name.split("/")[:-1])


def with_ids(folder, files, images=None):
    """id -> file. A photograph's id is its stem; where train/ and val/ share a stem, its path in the folder,
    without suffix. (Files in test/ change no other id.) A mask's id is that of its photograph in `images`,
    which is in a folder of the same name, if there is one. A mask without a photograph keeps its own.
    """
    names, found, known = [name_in(folder, path) for path in files], {}, images or {}
    folders = {path.parent.name for path in known.values()}
    stem = {name: tails(name)[-1] for name in names}
    all_stems = Counter(stem.values())
    but_test = Counter(stem[name] for name in stem if not in_folder(name, TEST))
    for path, name in zip(files, names):
        alike = (all_stems if in_folder(name, TEST) else but_test)[stem[name]]
        own = stem[name] if alike == 1 and stem[name] not in known else name
        ways = [way for way in tails(name) if way in known and (
            path.parent.name == known[way].parent.name or path.parent.name not in folders)]
        if re.search("[\n\r\ud800-\udfff]", name):  # the latter: bytes that are no UTF-8
            raise InputError(f"{folder}: a file has the strange name {ascii(path.name)}; rename it")
        found.setdefault([*ways, own][0], []).append(path)
    clashes = [paths for paths in found.values() if len(paths) > 1]
    if clashes:
        text = (f"one image has both as its mask, as if each were of one class; merge the masks of an image "
                f"into one, directly in {folder}/: see docs/own-photographs.md")
        if images is None:
            text = (f"have one name; rename one of each, or, if one is a mask, move it into a folder masks/ "
                    f"beside {folder.name}/")
        raise InputError(f"{one_of([f'{one} and {other}' for one, other, *_ in clashes])}: {text}")
    return {name: path for name, (path,) in found.items()}


def stems(folder, suffixes=(".png",)):
    return with_ids(folder, files_in(folder, suffixes))


def mask_files(root, folders=MASK_FOLDERS):
    """(folder, files): custom data's masks, in the first of the folders that has some. Of two files with one
    stem, the PNG is taken."""
    for name in folders:
        files = files_in(root / name, MASK_SUFFIXES)
        if files:
            break
    pngs_last = sorted(files, key=lambda path: path.suffix.lower() == ".png")
    return root / name, sorted({path.with_suffix(""): path for path in pngs_last}.values())


def open_data(dataset, root=None):
    """The data set of --dataset and --data-root. Raises InputError where it is not there."""
    if dataset == "shapes":
        if root:
            raise InputError(f"--data-root {root}: the data set shapes is drawn, not read; give --dataset "
                             f"custom (or voc, voc_classic, cityscapes) with it")
        return Shapes()
    root = Path(root)
    if not os.path.isdir(root):  # Path.is_dir raises where a folder above cannot be read
        child = {"custom": "", "cityscapes": "leftImg8bit"}.get(dataset, "JPEGImages")
        raise InputError(f"--data-root {root}: no such folder; give the folder of {dataset}"
                         + where_to_get(root, child))
    try:
        opened = {"cityscapes": open_cityscapes, "custom": open_custom}.get(dataset, open_voc)(root)
    except OSError as error:
        with reading(error.filename or root):
            raise
    opened.dataset, opened.root = dataset, root
    if dataset == "voc":
        opened.labelled = opened.train
    return opened


def where_to_get(root, child):
    """Where the data set that has the folder `child` can be had, for a message."""
    return {"JPEGImages": f", or download it: {command('prepare.py', 'voc', root, '--download')}",
            "leftImg8bit": ", with leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
                           "cityscapes-dataset.com unpacked in it"}.get(child, "")


def find_folder(root, child):
    """The first of root, and the folders around it that archives have, that holds the folder `child`."""
    for parent in (".", "VOC2012", "VOCdevkit/VOC2012", "cityscapes", ".."):
        if os.path.isdir(root / parent / child):
            return root / parent
    raise InputError(f"--data-root {root}: no folder {child}/ in it; give the folder that holds it"
                     + where_to_get(root, child))


def open_voc(root):
    """PASCAL VOC 2012, with SBD's masks in SegmentationClassAug/ for the blended training set, or all masks
    in SegmentationClass/, as UniMatch and U2PL have them; only VOC's own training ids are `labelled`."""
    root = find_folder(root, "JPEGImages")
    lists = [root / "ImageSets" / "Segmentation" / name for name in ("train.txt", "val.txt")]
    for path in lists:
        if not path.exists():
            raise InputError(f"{path}: no such file; copy it there from VOC's archive, or from UniMatch's "
                             f"repository (splits/pascal/: 1464/labeled.txt is the train.txt)")
    voc_train, val = map(read_list, lists)
    own, blended = stems(root / "SegmentationClass"), stems(root / BLENDED_MASKS)
    if not blended and own.keys() - {*voc_train, *val}:
        blended = own
    if not blended:
        raise InputError(f"{root / BLENDED_MASKS}: no masks; the blended training set needs SBD's: "
                         f"{command('prepare.py', 'voc', root, '--download')}")
    train = sorted({*blended, *voc_train} - {*val})
    photographs = stems(root / "JPEGImages", (".jpg",))
    images = {name: photographs[name] for name in train + val if name in photographs}
    return SegmentationData(VOC_CLASSES, voc_palette(21), images, blended | own, train, val, voc_train)


def open_cityscapes(root):
    """Cityscapes: leftImg8bit/ and gtFine/. labelIds are mapped where there are no labelTrainIds."""
    root = find_folder(root, "leftImg8bit")
    if not (root / "gtFine").is_dir():
        raise InputError(f"{root}: no folder gtFine/ in it; unpack gtFine_trainvaltest.zip there")
    images, masks, lists = {}, {}, {"train": [], "val": []}
    for part, names in lists.items():
        for path in sorted((root / "leftImg8bit" / part).rglob("*_leftImg8bit.png")):
            name = path.name.removesuffix("_leftImg8bit.png")
            names.append(name)
            images[name] = path
            city = root / "gtFine" / path.parent.relative_to(root / "leftImg8bit")
            for kind in ("labelIds", "labelTrainIds"):
                if (city / f"{name}_gtFine_{kind}.png").exists():
                    masks[name] = city / f"{name}_gtFine_{kind}.png"
    return SegmentationData([c.name for c in CITYSCAPES], [c.color for c in CITYSCAPES], images, masks,
                            lists["train"], lists["val"], lists["train"])


def open_custom(root):
    """Own photographs in the VOC layout, as labelme and CVAT export it, or in images/ and masks/.

    Every training image with a mask is labelled; every one without is not.
    """
    with reading(root):
        folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    photographs = next((root / name for name in ("JPEGImages", "images") if root / name in folders), None)
    if photographs is None:
        raise InputError(f"--data-root {root}: neither JPEGImages/ nor images/ in it (but "
                         f"{short_list(path.name for path in folders) or 'no folder'}); give the folder that "
                         f"holds one of them, or call the folder of the photographs images/, and that of the "
                         f"masks masks/")
    label_map = read_label_map(root / "labelmap.txt")
    classes = class_names(root, label_map)
    images = stems(photographs, IMAGE_SUFFIXES)
    folder, files = mask_files(root, MASK_FOLDERS if label_map else (OLD_MASKS, *MASK_FOLDERS))
    masks, notes = with_ids(folder, files, images), []

    def images_in(pattern):  # those that are in such a folder, or whose masks are
        return [name for name, path in images.items() if in_folder(name_in(photographs, path), pattern)
                or name in masks and in_folder(name_in(folder, masks[name]), pattern)]

    test, held_out = images_in(TEST), images_in("val(id(ation)?)?")
    listed = root / "ImageSets" / "Segmentation"
    lists = {path.name.lower(): path for path in sorted(listed.glob("*"))}
    test += read_list(lists["test.txt"], images) if "test.txt" in lists else []
    train_list, val_list = lists.get("train.txt"), lists.get("val.txt") or lists.get("validation.txt")
    train = read_list(train_list, images) if train_list else images.keys() - {*test, *held_out}
    if val_list:
        val = read_list(val_list, images)
    else:
        # Drawn from its name alone, so that an image stays in its part when masks are added or removed.
        draw = {name: np.random.default_rng([*name.encode()]).random() for name in train if name in masks}
        tenth = min(sum(value < 0.1 for value in draw.values()), len(draw) // 5)
        in_val = sorted(name for name in held_out if name in masks)
        val = in_val or sorted(sorted(draw, key=draw.get)[:max(1, tenth)])
        notes = [f"no {listed / 'val.txt'}: validation takes {len(val)} of the {len({*draw, *val})} labelled "
                 f"images, {'those of the folder val/' if in_val else 'about a tenth, by their names'}"]
    train = sorted(train if val_list and train_list else {*train} - {*val})
    return SegmentationData(
        classes, own_palette(classes, label_map, masks), images, masks, train, val,
        [name for name in train if name in masks], notes, folders=(photographs, folder), label_map=label_map,
        test=sorted({*images} & {*test} - {*train, *val}))


def own_palette(classes, label_map, masks):
    """The colours of the label map, else of an index PNG among the first masks. Where two of them are hard to
    tell apart: distinct_palette's."""
    shown = {label: colour for colour, label in reversed(label_map.items())}
    for path in [] if label_map else list(masks.values())[:8]:
        with suppress(InputError):
            pixels, colours = read_mask(path)
            if pixels is not None and colours is not None:
                shown = dict(zip(classes, ((c & 255, c >> 8 & 255, c >> 16) for c in colours.tolist())))
                break
    distinct = distinct_palette(len(classes))
    found = np.array([shown.get(name, colour) for name, colour in zip(classes, distinct)])
    differ = abs(found[:, None] - found).max(2) + 255 * np.eye(len(found), dtype=int)
    return [*map(tuple, found.tolist())] if differ.min() > 24 else distinct


def read_label_map(path):
    """Lines of label:r,g,b:parts:actions, and # comments -> {(r, g, b): label}; {} without such a file."""
    if not path.exists():
        return {}
    lines = [line for line in map(str.strip, read_lines(path)) if line and line[0] != "#"]
    entries = [re.match(r"(.+?):\s*(\d+),\s*(\d+),\s*(\d+)\s*(:|$)", line) for line in lines]
    labels = {tuple(map(int, entry.groups()[1:4])): re.sub("(?i)^ignored?$", "ignore", entry[1].strip())
              for entry in entries if entry}
    if not 0 < len(labels) == len(lines) or len({*labels.values()}) > IGNORE or max(map(max, labels)) > 255:
        raise InputError(f"{path}: not 1 to 255 lines of label:r,g,b:parts:actions, each of its own colour; "
                         f"fix it, or remove it if the masks hold class ids")
    if "?" in labels.values():
        raise InputError(f"{path}: still has ? for a name; put the name of the colour's class there, or "
                         f"ignore")
    return labels


def class_names(root, label_map):
    """The names in class_names.txt, or else in the label map. Where the label map has no line for black and
    no class is background, this adds a line that ignores black."""
    names_file, map_file = root / "class_names.txt", root / "labelmap.txt"
    known = [label for label in dict.fromkeys(label_map.values()) if label != "ignore"]
    names = read_class_names(names_file) if names_file.exists() or not label_map else known
    unnamed = [label for label in known if label not in names]
    if unnamed:
        raise InputError(f"{names_file}: lacks {short_list(unnamed)}, which {map_file} names; make them "
                         f"agree, or remove {names_file}")
    if len(names) < 2:
        raise InputError(f"{map_file}: one class alone; let a line name the rest, such as background:0,0,0")
    if label_map and "background" not in names:
        label_map.setdefault((0, 0, 0), "ignore")
    return names


def read_class_names(path):
    """The names in class_names.txt: a line's number, from 0, is the class id."""
    names = [line.strip() for line in read_lines(path)] if path.exists() else []
    while names and not names[-1]:
        names.pop()
    other = [name for name in ("classes.txt", "labels.txt", "codes.txt") if path.with_name(name).exists()]
    no_names = [name for name in names if re.match(r"""#(\s|$)|[-"'\[\]{}]|.*[",:]$""", name)] + [
        name for name in names[:1] if re.fullmatch("(?i)(class|label|name)s?([_ ]?names?)?", name)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    matches = {i: match for i, name in enumerate(names) if (match := re.search(r"^\d+\b|\b\d+$", name))}
    numbers = [int(match[0]) for match in matches.values()]
    rests = {names[i].removeprefix(match[0]).removesuffix(match[0]).strip() for i, match in matches.items()}
    # Distinct names, or none, behind the numbers; but 1 inch and 2 inch are names.
    numbering = sorted(numbers) in ([*range(len(numbers))], [*range(1, len(numbers) + 1)]) and (
        len(rests) == len(numbers) or rests == {""}) and len(names) - len(numbers) < 2 <= len(numbers)
    for wrong, text in (
            (not names, "missing or empty; write one class name a line, in the order of the ids"
                        + (f"; or rename {other[0]}, if it is that" if other else "")),
            ("__ignore__" in names, "__ignore__ is 255 in the masks, and no class; remove its line"),
            (no_names, f"'{short_list(no_names, 1)}' would be the name of a class; remove this line, or the "
                       f"marks around the name"),
            (not all(names) or not 2 <= len(names) <= IGNORE,
             f"from 2 to {IGNORE} lines are needed, not {len(names)}: one class name a line, none of them "
             f"empty; a line's number, from 0, is its class id, and background is a class, too"),
            (twice, f"{short_list(twice)} is listed twice; give each class a name of its own"),
            (numbering and numbers != [*matches],  # of all lines, or all but a headline
             f"numbered {short_list(numbers)}, but a line's number, from 0, is its class id; write a line "
             f"for each id in the masks, from 0, without numbers")):
        if wrong:
            raise InputError(f"{path}: {text}")
    return names


def read_lines(path):
    with reading(path):
        text = path.read_text("utf-8-sig")
        if "\0" in text:  # UTF-16 without its mark
            raise UnicodeError
        return text.split("\n")


def read_list(path, known=()):
    """The ids in a list, one per line, in any form in use: a `known` id as it is, a bare id,
    JPEGImages/ID.jpg with or without its mask behind it, or leftImg8bit/train/CITY/ID_leftImg8bit.png. "# "
    starts a comment."""
    ids = []
    for line in read_lines(path):
        line = unicodedata.normalize("NFC", line)
        line = line if line in known else line.strip()
        if line in known:
            ids.append(line)
        elif line and not re.match(r"#(\s|$)", line):
            file = re.match(r"(.+?)\.(?:jpe?g|jfif|png|bmp|webp|tiff?)(?:\s|$)", line, re.IGNORECASE)
            ways = tails((file[1] if file else line).replace("\\", "/"))
            ids.append(next((way for way in ways if way in known), ways[-1].removesuffix("_leftImg8bit")))
    twice = sorted(name for name, count in Counter(ids).items() if count > 1)
    if twice:
        raise InputError(f"{path}: ids listed twice: {short_list(twice)}; keep one line of each")
    if not ids:
        raise InputError(f"{path}: is empty; write one id per line")
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
            raise InputError(f"--split {split}: is a part of all {TRAINING_SETS[dataset]} training "
                             f"images of {dataset}, but {len(pool)} are here; complete them, or give "
                             f"a list of ids")
        positions = HERE / "splits" / dataset / f"{split}.txt"
        labelled = ([pool[int(p)] for p in read_list(positions)] if positions.exists() else
                    pool[::SPLITS[split]])
    elif split is None:
        labelled = pool
    elif Path(split).is_file():
        labelled = read_list(Path(split), data.images)
        unknown = sorted({*labelled} - {*data.train})
        if unknown:
            raise InputError(f"--split {split}: not in {dataset}'s training set ({len(unknown)}): "
                             f"{short_list(unknown)}; take those of validation images off the list, or "
                             f"put the others among the training images")
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
        super().__init__(list(SHAPES_CLASSES), distinct_palette(len(SHAPES_CLASSES)), files, files, train,
                         val, train)

    def image(self, name):
        return draw_shapes(name)[0]

    def labels(self, name):
        return np.array(draw_shapes(name)[1]), None
