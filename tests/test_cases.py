"""Own data as people bring it: what prepare.py says of each case, and that its remedies work.

A case is twelve small photographs of a disc on a meadow, six of them with a mask, and one thing that is
different. Where prepare.py refuses it, a remedy does what the message says, and nothing else; then
prepare.py must pass it, and training must run.
"""

import contextlib
import io
import re
import shlex
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import predict
import prepare
import settings
import train
from data import open_data, open_photograph
from settings import parse_arguments
from test_data import custom
from test_run_folder import Small, run, small  # noqa: F401 (a fixture)

TINY = ("--backbone resnet18 --channels 16 --crop-size 32 --batch-size 2 --iters 2 --weights none "
        "--workers 0").split()
LISTS = "ImageSets/Segmentation"
HEIC = b"\0\0\0\x24ftypheic" + bytes(300)
DISC, MEADOW = (184, 61, 245), (0, 128, 0)


# -- Folders: functions of the root --

def scene(i, size=(48, 32)):
    """A photograph, (H, W, 3), and its labels: 0 meadow, 1 disc."""
    rng, (width, height) = np.random.default_rng(i), size
    y, x = np.mgrid[:height, :width]
    disc = (x - rng.uniform(.3, .7) * width) ** 2 + (y - rng.uniform(.3, .7) * height) ** 2 < height ** 2 / 16
    image = np.where(disc[..., None], (200, 60, 60), (60, 140, 60)) + rng.normal(0, 12, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), disc.astype(np.uint8)


def save(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    picture.save(path, **options)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def folder(mask=lambda labels: labels, images="images", masks="masks", image="p{:02d}.jpg",
           name="p{:02d}.png", count=12, masked=6, names="background\nthing\n", size=(48, 32)):
    """Own data, good unless told otherwise; `mask` makes a picture of the labels, `name` names it."""
    def make(root):
        (root / images).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture, labels = scene(i, size)
            save(picture, root / images / image.format(i))
            if i < masked:
                save(mask(labels), root / masks / name.format(i))
        if names:
            write(root / "class_names.txt", names)
    return make


def files(content, *names, **options):
    """A good folder, and files in it: content is bytes, or makes them of what was there."""
    def make(root):
        folder(**options)(root)
        for name in names:
            before = (root / name).read_bytes() if (root / name).exists() else b""
            write(root / name, content(before) if callable(content) else content)
    return make


def instead(picture, name, **options):
    """A good folder, but for photograph p09."""
    def make(root):
        folder()(root)
        (root / "images/p09.jpg").unlink()
        save(picture, root / "images" / name, **options)
    return make


def both(*makers):
    return lambda root: [make(root) for make in makers]


def lists(train=None, val=None, names=("train.txt", "val.txt")):
    return lambda root: [write(root / LISTS / name, ids if "\n" in ids else ids.replace(" ", "\n"))
                         for name, ids in zip(names, (train, val)) if ids]


def cvat(label_map="background:0,0,0::\nthing:184,61,245::\n", colours=((0, 0, 0), DISC), below="", masked=6):
    """An export of CVAT's "Segmentation mask 1.1", with its photographs."""
    return both(folder(coloured(*colours), f"JPEGImages/{below}", f"SegmentationClass/{below}", masked=masked,
                       names=None),
                lambda root: write(root / "labelmap.txt", f"# label:color_rgb:parts:actions\n{label_map}"),
                lists(train=" ".join(f"{below}p{i:02d}" for i in range(12)), names=("default.txt",)))


def unannotated(root):
    cvat()(root)
    for i in range(6, 12):
        save(np.zeros((32, 48, 3), np.uint8), root / f"SegmentationClass/p{i:02d}.png")


def one_class_each(root, name="{}/p{:02d}.png"):
    """Masks of 0 and 255 for each class: in a folder, or a file, of its own."""
    folder(masked=0)(root)
    for i in range(6):
        for k, label in enumerate(("background", "thing")):
            save((scene(i)[1] == k) * np.uint8(255), root / "masks" / name.format(*(
                (i, label) if name.startswith("p{:") else (label, i))))


def one_folder_each(root):
    """Masks of 0 and 255, those of even numbers in the folder of one class and the others in another's."""
    folder(grey(0, 255), names="one\nthing\n")(root)
    for i in range(6):
        path = root / "masks" / ("one", "thing")[i % 2] / f"p{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        (root / "masks" / path.name).rename(path)


def merge_classes(root, said):
    assert "masks: white is another class in each folder; merge their masks" in paste(root, said)
    merge(root, said)


def link(target, *names):
    return lambda root: [(root / name).symlink_to((root / target).resolve()) for name in names]


train_and_val = both(folder(images="images/train", masks="masks/train"),
                     folder(images="images/val", masks="masks/val", image="v{}.jpg", name="v{}.png", count=3))


# -- Masks: functions of the labels --

def grey(*values):
    return lambda labels: np.array(values, np.uint8)[labels]


def coloured(*colours, mode="RGB"):
    return lambda labels: Image.fromarray(np.array(colours, np.uint8)[labels]).convert(mode)


def indexed(*colours, order=(0, 1)):
    """An index PNG of these colours; `order` says which index stands for which label."""
    def make(labels):
        picture = Image.fromarray(np.array(order, np.uint8)[labels])
        picture.putpalette(np.array(colours, np.uint8).tobytes())
        return picture
    return make


def one_bit(labels):
    return Image.fromarray(labels * 255).convert("1")


def transparent(labels):
    return Image.fromarray(np.dstack([0 * labels] * 3 + [255 * labels]))


def left_and_right(labels):
    return np.where(np.arange(48) > 24, labels * 255, labels * 128).astype(np.uint8)


def from_1_with_0(labels):
    return (labels + 1) * (np.arange(48) > 5).astype(np.uint8)


def smoothed(labels):
    return Image.fromarray(labels * 255).resize((96, 64), 2).resize((48, 32), 2)


def as_arrays(root):
    folder(masked=0)(root)
    (root / "masks").mkdir()
    for i in range(6):
        np.save(root / f"masks/p{i:02d}.npy", scene(i)[1].astype(np.int32) - (i == 1))  # -1 is labelme's 255


# -- Odd files --

def rotated(orientation, *rational):
    """An EXIF with an orientation and perhaps a rational, (-1, 0) being one that Pillow cannot write."""
    entries = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)
    entries += struct.pack("<HHII", 0x11a, 10, 1, 38) if rational else b""
    head = b"II*\0" + struct.pack("<IH", 8, len(entries) // 12) + entries + bytes(4)
    return b"Exif\0\0" + head + (struct.pack("<ii", *rational) if rational else b"")


def tiff(channels, depth):
    """A TIFF of many channels, or of 16 bits a channel, which Pillow cannot write."""
    image = np.resize(scene(9)[0], (32, 48, channels)).astype(f"<u{depth // 8}") * (257 if depth == 16 else 1)
    tags = {256: 48, 257: 32, 258: 146, 259: 1, 262: 2, 273: 200, 277: channels, 278: 32, 279: image.nbytes,
            284: 1} | ({338: 0} if channels > 3 else {})
    counts = {258: channels, 338: channels - 3}
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, counts.get(tag, 1), value)
        for tag, value in tags.items())
    return (head.ljust(146, b"\0") + struct.pack("<H", depth) * channels).ljust(200, b"\0") + image.tobytes()


def png(width, height, depth, rows=b""):
    """A grey PNG of any depth, of rows of bytes."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)), (b"IDAT", rows),
              (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(content)) + name + content + struct.pack(
        ">I", zlib.crc32(name + content)) for name, content in chunks)


def huge_png():
    """A PNG that is larger than Pillow agrees to open."""
    return png(20000, 10000, 8)


def grey_png(labels):
    """A grey PNG of 4 bits, which Pillow scales by 17."""
    pairs = labels[:, ::2] << 4 | labels[:, 1::2]
    return png(48, 32, 4, zlib.compress(b"".join(b"\0" + row.tobytes() for row in pairs)))


# -- Remedies: functions of the root and of what was said --

def paste(root, said):
    """Run the command at the end of a line as it stands; returns what prepare.py says."""
    command = shlex.split(re.findall("python .*$", said, re.MULTILINE)[-1])
    assert str(root) in command and command[1] in ("prepare.py", "train.py")
    if command[1] == "train.py":
        train.main([*command[2:], *TINY, "--out", str(root / "pasted")])
    else:
        return check(*command[2:])[1]


def name_colours(**names):
    """The remedy is a command that writes labelmap.txt; then its ? are replaced, as it says. A name is given
    for a colour, written as c0_128_0; the others are ignored."""
    def fix(root, said):
        said = paste(root, said)
        assert "labelmap.txt: written, with the" in said
        assert "labelmap.txt: still has ? for a name" in check("--dataset", "custom", "--data-root", root)[1]
        text = (root / "labelmap.txt").read_text()
        for colour, name in names.items():
            line = colour[1:].replace("_", ",")
            assert f"\n?:{line}::" in text
            text = text.replace(f"?:{line}:", f"{name}:{line}:")
        write(root / "labelmap.txt", text.replace("?:", "ignore:"))
        assert "thing" in paste(root, said) or "disc" in text
    return fix


def names_and_colours(root, said):
    write(root / "class_names.txt", "meadow\nthing\n")
    said = check("--dataset", "custom", "--data-root", root)[1]
    name_colours(c0_128_0="meadow", c184_61_245="thing")(root, said)


def twice(root, said):
    """The remedy is a command, and so is that of what is left."""
    paste(root, paste(root, said))


def black_is_background(root, said):
    write(root / "labelmap.txt", (root / "labelmap.txt").read_text() + "background:0,0,0\n")


def move_masks(*names):
    return lambda root, said: [move(name, "elsewhere")(root, said) for name in names]


def texts(name, text):
    return lambda root, said: write(root / name, text)


def pictures(name, i=9, size=(48, 32), part=0):
    return lambda root, said: save(scene(i, size)[part], root / name)


def remove(*names):
    return lambda root, said: [(root / name).unlink() for name in names]


def move(pattern, target, rename=lambda name: name):
    def fix(root, said):
        (root / target).mkdir(exist_ok=True)
        for path in sorted(root.glob(pattern)):
            path.rename(root / target / rename(path.name))
    return fix


def without(text, by=""):
    return lambda name: name.replace(text, by)


def export_again(root, said):
    """Masks as index PNGs of the right size and name, in masks/."""
    shutil.rmtree(root / "masks", ignore_errors=True)
    folder()(root)


def merge(root, said):
    """One mask an image, where each pixel is its class; what was there is moved away."""
    (root / "masks").rename(root / "of_classes")
    folder()(root)


def to_jpeg(pattern):
    def fix(root, said):
        for i, path in enumerate(sorted(root.glob(pattern))):
            save(scene(i)[0], path.with_suffix(".jpg"))
            if path.suffix != ".jpg":
                path.unlink()
    return fix


def first_name(root, said):
    write(root / "class_names.txt", "nothing\n" + (root / "class_names.txt").read_text())


def folders_and_names(root, said):
    (root / "imgs").rename(root / "images")
    (root / "gts").rename(root / "masks")
    assert "call this one 00000_img.png" in check("--dataset", "custom", "--data-root", root)[1]
    move("masks/*", "masks", without("_gt", "_img"))(root, said)


def nothing_to_validate_by_draw(root):
    folder(count=30)(root)
    drawn, = open_data("custom", root).val
    save(np.full((32, 48), 255, np.uint8), root / f"masks/{drawn}.png")


def without_mask(root, said):
    shutil.move(re.search("the validation masks, (.*) for one", said)[1], root.parent / "elsewhere.png")


# name: (how the folder is made, what is said of it (None: nothing), the remedy followed, another remedy)
CASES = {
    "good": (folder(), None),
    # What a mask means
    "0 and 255": (folder(grey(0, 255)), "hold background alone, beside 255, which", paste),
    "0 and 255 with alpha": (folder(coloured((0, 0, 0), (255, 255, 255), mode="RGBA")),
                             r"p00.png: in colour.*\(and 5 more\)", paste),
    "0 and 255 in a palette": (folder(indexed((9, 9, 9), *[(0, 0, 0)] * 254, (200, 0, 0), order=(0, 255))),
                               "beside 255", name_colours(c200_0_0="thing")),
    "0, 128 and 255": (folder(left_and_right, names="background\nleft\nthing\n"), "ids 128",
                       name_colours(c128_128_128="left", c255_255_255="thing")),
    "data behind the end of a JPEG": (
        files(lambda jpeg: jpeg + bytes(100_000), "images/p00.jpg", "images/p09.jpg"), None),
    "one bit": (folder(one_bit), None),
    "one bit, three names": (folder(one_bit, names="a\nb\nthing"), r"p00.png: of one bit.*\(and 5 more\)",
                             name_colours(c255_255_255="thing")),
    "0 and 255 among others": (both(folder(), lambda root: save(scene(4)[1] * 255, root / "masks/p04.png")),
                               "p04.png: a mask of one class alone, beside 255, which"),
    "ids of instances": (folder(lambda labels: labels.astype(np.uint16) * 1000),
                         "ids 1000, .* export the masks again, with class ids below 255", export_again),
    "grey levels of 16 bits": (folder(lambda labels: labels.astype(np.uint16) * 65535), "ids 65535", paste),
    "one class": (folder(grey(0, 0)), "hold background alone; add masks of other classes", export_again),
    "nothing but 255": (folder(grey(255, 255)), "hold nothing, beside 255", export_again),
    "RGB that are ids": (folder(coloured((0, 0, 0), (1, 1, 1))), "p00.png: in colour", paste),
    "RGB colours": (folder(coloured((0, 0, 0), (128, 0, 0))), r"\(and 5 more\)",
                    name_colours(c0_0_0="background", c128_0_0="thing")),
    "grey with alpha": (folder(coloured((0, 0, 0), (1, 1, 1), mode="LA")), "p00.png: in colour", paste),
    "palettes in two orders": (
        both(folder(indexed((0, 0, 0), DISC)), lambda root: [
            save(indexed(DISC, (0, 0, 0), order=(1, 0))(scene(i)[1]), root / f"masks/p0{i}.png")
            for i in (4, 5)]),
        r"p00.png and .*p04.png: the id 0 is \(0,0,0\) in the one and \(184,61,245\)",
        name_colours(c0_0_0="background", c184_61_245="thing")),
    "palettes, one class in two colours": (
        both(folder(indexed((0, 0, 0), DISC)), lambda root: save(
            indexed((0, 0, 0), MEADOW)(scene(5)[1]), root / "masks/p05.png")),
        "the id 1 is", name_colours(c184_61_245="thing", c0_128_0="thing")),
    "ids of 16 bits": (folder(lambda labels: labels.astype(np.uint16)), None),
    "ids from 1": (folder(grey(1, 2)), "no mask holds 0, and ids count from 0", first_name,
                   name_colours(c1_1_1="background", c2_2_2="thing")),
    "ids from 1, 0 unlabelled": (folder(from_1_with_0, names="meadow\ndisc\n"),
                                 r"ids 2, but there are 2 classes \(0 to 1\); if .* lacks a name",
                                 first_name),
    "the last id is void": (folder(lambda labels: labels * 0 + np.arange(48, dtype=np.uint8) // 5,
                                   names="a\nb\nc\nd\ne\nf\ng\nh\nthing"),
                            "if 9 is what nobody annotated, say which", paste),
    "smoothed edges": (folder(smoothed), "if they are grey levels",
                       name_colours(c255_255_255="thing")),
    "masks as JPEG": (folder(grey(0, 255), name="p{:02d}.jpg"), "one of 6.: not read; .*export them again",
                      export_again),
    "masks as JPEG elsewhere": (folder(name="p{:02d}.jpg", masks="labels"),
                                r"labels/.*jpg .one of 6.: .*as PNGs, into .*masks/", export_again),
    "masks as TIFF": (folder(name="p{:02d}.tif"), None),
    "masks as TIFF of 16 bits": (folder(lambda labels: labels.astype(np.uint16) * 65535, name="p{:02d}.tif"),
                                 "ids 65535", paste),
    "masks as TIFF of 64 bits": (files(tiff(3, 64), "masks/p00.tif", name="p{:02d}.tif"),
                                 "TIFF of a kind that Pillow does not know.*; save it again as uint8",
                                 export_again),
    "colours of 16 bits": (
        both(folder(masked=0), lambda root: [write(
            root / f"masks/p{i:02d}.tif", tiff(3, 16)) for i in range(6)]),
        "has channels of 16 bits .and 5 more.; export it", export_again),
    "masks as GIF": (folder(name="p{:02d}.gif"), "p00.gif: in colour", paste),
    "masks as JPEG of another name": (
        both(folder(masked=0), lambda root: [save(scene(i)[1], root / f"masks/p{i:02d}.png", format="JPEG")
                                             for i in range(6)]),
        "p00.png: a JPEG, or of several pages .and 5 more.; export it again, as a PNG", export_again),
    "masks of pages": (
        both(folder(masked=0), lambda root: [
            save(1 - scene(i)[1], root / f"masks/p{i:02d}.tif", save_all=True,
                 append_images=[Image.fromarray(scene(i)[1])]) for i in range(6)]),
        "p00.tif: a JPEG, or of several pages .and 5 more.; export it again, as a PNG", export_again),
    "masks of 255": (both(folder(), lambda root: [
        save(np.full((32, 48), 255, np.uint8), root / f"masks/p{i:02d}.png") for i in (7, 8, 9)]),
        "p07.png .one of 3.: a mask of one class, or 255, alone; if nobody annotated it, move such"),
    "masks as .npy": (as_arrays, "5 labelled  *6 unlabelled"),
    "grey of 4 bits": (files(grey_png(scene(0)[1]), "masks/p00.png"), None),
    "labels/": (folder(masks="labels"), "labels/.*png .one of 6.: not read; if they are masks, move them",
                move("labels/*", "masks")),
    "p00_mask": (folder(name="p{:02d}_mask.png"), "one of 6.: a mask .*: call this one p00.png",
                 move("masks/*", "masks", without("_mask"))),
    "p00_mask.npy": (both(as_arrays, lambda root: move("masks/*", "masks", without(".", "_mask."))(root, 0)),
                     ": call this one p00.npy", move("masks/*", "masks", without("_mask"))),
    "p00.jpg.png": (folder(name="p{:02d}.jpg.png"), ": call this one p00.png",
                    move("masks/*", "masks", without(".jpg"))),
    "other names": (folder(images="imgs", masks="gts", image="{:05d}_img.jpg", name="{:05d}_gt.png"),
                    r"\(but gts, imgs\)", folders_and_names),
    "masks beside images": (folder(masks="images", name="p{:02d}_mask.png"),
                            "p00_mask.png .one of 6.: looks like a mask",
                            move("images/*_mask.png", "masks", without("_mask"))),
    "copies of masks": (both(folder(), folder(masks="images", name="p{:02d}_mask.png")),
                        "one of 6.: looks like a mask, .*; move such files elsewhere"),
    "a mask smaller": (both(folder(), lambda root: save(scene(0, (24, 16))[1], root / "masks/p00.png")),
                       "p00.png: 24 x 16 pixels, but its", export_again),
    "a mask cut short": (files(lambda mask: mask[:-30], "masks/p01.png"), "p01.png: cannot be read",
                         export_again),
    "a huge mask": (files(huge_png(), "masks/p00.png"), "p00.png: .*more than 178 megapix", export_again),
    "a mask of floats": (both(folder(), lambda root: save(
        np.full((32, 48), 0.5, np.float32), root / "masks/p00.png", format="TIFF")),
        "p00.png: cannot be read .not a whole number from 0 to 65535 .*; replace or remove it", export_again),
    "a mask of negative numbers": (both(folder(), lambda root: save(
        np.eye(32, 48, dtype=np.int32) - 2, root / "masks/p00.png", format="TIFF")),
        "p00.png: cannot be read .not a whole number from 0 to 65535 .*; replace or remove it", export_again),
    "transparency": (folder(transparent), "p00.png: its transparent pixels have the colour of visible",
                     export_again),
    "erased": (folder(lambda labels: Image.fromarray(np.dstack([
        labels * 200, 0 * labels, 0 * labels, 255 * (np.arange(48) > 5) + 0 * labels]).astype(np.uint8))),
        "p00.png: its transparent pixels .*; export it again, without transparency, with a colour for each",
        export_again),
    "JPEG in a TIFF": (both(folder(masked=5), lambda root: save(
        scene(5)[1], root / "masks/p05.tif", compression="jpeg")),
        "p05.tif: a JPEG, or of several pages; export it again, as a PNG", export_again),
    "ids from 1, and a name to spare": (folder(grey(1, 2), names="meadow\ndisc\nwater"),
                                        "mask holds meadow .the first name is that of the id 0., which will"),
    "numbered objects": (folder(lambda labels: labels * np.arange(1, 49, dtype=np.uint8)),
                         "p00.png.*, but .*; if they number objects, export masks of classes;", export_again),
    "two folders of masks": (both(folder(), folder(masks="SegmentationClass", masked=3)),
                             "masks/.* .one of 3.: not read, as .*/SegmentationClass has masks of"),
    "TIFF masks beside others": (
        both(folder(masks="SegmentationClass"), folder(name="p{:02d}.tif", masked=9)),
        "tif .one of 3.: .*if they are masks, move them into .*/SegmentationClass/$"),
    "a class absent": (folder(names="background\nthing\nunicorn"), "no labelled mask holds unicorn"),
    "no class in validation": (both(folder(), lists(val="p05"), lambda root: save(
        np.zeros((32, 48), np.uint8), root / "masks/p05.png")), "no validation mask holds thing"),
    "nothing to validate": (both(folder(), lists(val="p05"), lambda root: save(
        np.full((32, 48), 255, np.uint8), root / "masks/p05.png")), "the validation masks.* hold nothing",
        export_again),
    "nothing to validate, by draw": (nothing_to_validate_by_draw, "hold nothing, .*; annotate their images,",
                                     without_mask),
    "a name for each id": (folder(grey(0, 3)), "if these are class ids, write a name for each id, from 0,",
                           texts("class_names.txt", "a\nb\nc\nd\n")),
    "one of several is kept": (
        lambda root: one_class_each(root, "p{:02d}_{}.png"), "else keep one of them, under that",
        lambda root, said: [move("masks/*_background.png", "elsewhere")(root, said),
                            move("masks/*", "masks", lambda name: name.replace("_thing", ""))(root, said),
                            texts("labelmap.txt", "background:0,0,0\nthing:255,255,255")(root, said)]),
    # Class lists
    "__ignore__": (folder(names="__ignore__\n_background_\nthing"), "__ignore__ is 255",
                   texts("class_names.txt", "_background_\nthing")),
    "_background_": (folder(names="_background_\nthing"), None),
    "UTF-16": (files("a\r\nb\r\n".encode("utf-16"), "class_names.txt"), "save it as UTF-8",
               texts("class_names.txt", "a\r\nb\r\n")),
    "UTF-16 without its mark": (files("a\nb\n".encode("utf-16-le"), "class_names.txt"), "save it as UTF-8",
                                texts("class_names.txt", "a\nb\n")),
    "commas": (folder(names="background, thing"), "one class name a line", texts("class_names.txt", "a\nb")),
    "a name twice": (folder(names="a\na"), "is listed twice", texts("class_names.txt", "a\nb")),
    "numbered from 1": (folder(grey(1, 2), names="1 background\n2: thing"), "numbered 1, 2, but",
                        texts("class_names.txt", "nothing\nbackground\nthing")),
    "a comment": (folder(names="# my classes\nbackground\nthing"), "# my classes.* would be the name of",
                  texts("class_names.txt", "background\nthing")),
    "numbered below a headline": (folder(names="id,name\n0,background\n1,thing"), "numbered 0, 1, but",
                                  texts("class_names.txt", "background\nthing")),
    **{f"names in {kind}": (folder(names=text), rf"class_names.txt: '{line}.* would be the name of a class; "
                            "remove this line, or the marks around the name",
                            texts("class_names.txt", "background\nthing")) for kind, text, line in (
        ("JSON", '["background",\n"thing"]', r'\["background",'), ("YAML", "- background\n- thing", "- back"),
        ("a dict", "names:\nbackground\nthing", "names:"), ("quotes", "'background'\n'thing'", "'back"),
        ("a column", "Class Name\nbackground\nthing", "Class Name"))},
    "numbered from 0": (folder(names="0 background\n1 thing"), None),
    "numbered behind the names": (folder(names="thing, 2\nbackground, 1"), "numbered 2, 1, but",
                                  texts("class_names.txt", "background\nthing")),
    "numbers behind one name": (folder(names="lane 1\nlane 2"), None),
    "classes.txt": (both(folder(names=None), lambda root: write(root / "classes.txt", "a\nb\n")),
                    "or rename classes.txt", move("classes.txt", ".", without("classes", "class_names"))),
    # CVAT
    "CVAT": (cvat(), None),
    "CVAT, subfolders": (cvat(below="Dataset1/images/train/"), None),
    "CVAT, background last": (cvat("thing:184,61,245::\nbackground:0,0,0::\n"), None),
    "CVAT, spaces": (cvat("background: 0, 0, 0 ::\nthing: 184, 61, 245\n"), None),
    "CVAT, capitals": (cvat("Background:0,0,0::\nthing:184,61,245::\n"), None),
    "CVAT, Ignore": (cvat("Ignore:0,0,0::\nmeadow:0,128,0::\nthing:184,61,245::\n", (MEADOW, DISC)),
                     "^   1 thing "),
    "CVAT, no background": (cvat("meadow:0,128,0::\nthing:184,61,245::\n", (MEADOW, DISC)), None),
    "CVAT, one class": (cvat("thing:184,61,245::\n"), "labelmap.txt: one class alone; let a line name",
                        black_is_background),
    "names in labelmap.txt": (both(folder(), lambda root: write(root / "labelmap.txt", "background\nthing")),
                              "; fix it, or remove it if the masks hold class ids", remove("labelmap.txt")),
    "CVAT, black has no line": (both(cvat("thing:184,61,245::\n"), lambda root: write(
        root / "class_names.txt", "background\nthing\n")), r"labelmap.txt lacks: \(0,0,0\).*; add a line for",
        black_is_background),
    "CVAT, black is ignored": (both(cvat("thing:184,61,245::\n"), lambda root: write(
        root / "class_names.txt", "meadow\nthing\n")), "give what is ignored .black, where it has no line. a",
        lambda root, said: write(root / "labelmap.txt", "meadow:0,0,0\nthing:184,61,245::\n")),
    "CVAT, all have masks": (cvat(masked=12), "no unlabelled image is left", paste),
    "CVAT, black where nobody was": (unannotated, "one of 6.: a mask of one class, or 255, alone; if",
                                     move_masks(*(f"SegmentationClass/p{i:02d}.png" for i in range(6, 12))),
                                     paste),
    "CVAT's lists": (
        both(cvat(), lists("p00 p01 p02 p07", "p03 p04", ("Train.txt", "Validation.TXT")),
             lists("p05 p06", names=("Test.txt",))),
        "4 for training, 2 for valid[^$]*p08.jpg .one of 4.: a photograph on no list in .*\n"
        ".*p05.jpg .one of 2.: a photograph in test/ or on test.txt"),
    "colours, and no names": (folder(coloured(MEADOW, DISC), names=None), "class_names.txt: missing",
                              names_and_colours),
    # What lies there unused
    "HEIC among others": (files(HEIC, *(f"images/{i}.HEIC" for i in range(20))),
                          "0.HEIC .one of 20.: not read; .*convert them to JPEG"),
    "arrays among photographs": (files(b"", "images/p00.npy", "images/p09.npy"),
                                 "p00.npy .one of 2.: not read"),
    "HEIC beside its JPEG": (files(HEIC, "images/p00.HEIC", "images/p09.NEF"), None),
    "HEIC without a mask": (files(HEIC, *(f"images/{i}.HEIC" for i in range(9)), count=6),
                            "one of 9.: not read.*\nno unlabelled image", to_jpeg("images/*.HEIC"), paste),
    "HEIC called JPEG": (files(HEIC, "images/p09.jpg"), r"p09.jpg: .*\(HEIC or AVIF\); convert it to JPEG",
                         to_jpeg("images/p09.jpg")),
    "photographs elsewhere": (both(folder(count=6), folder(masked=0, images="unlabeled", image="u{}.jpg")),
                              "unlabeled/.*jpg .one of 12.: .*move them into .*\nno unlabelled",
                              move("unlabeled/*", "images")),
    "a subfolder": (both(folder(), folder(count=3, masked=0, images="images/more", image="m{}.jpg")),
                    "images/more/.*jpg .one of 3.: not read"),
    "train/ and val/": (train_and_val, "3 of the 9 labelled images, those of the folder val/"),
    **{f"{name}/": (both(train_and_val, folder(images=f"images/{name}", masks=f"masks/{name}")),
                    "12 for training, 3 for validation$") for name in ("test", "Testing", "test_set")},
    "test/, of other names": (
        both(train_and_val,
             folder(images="images/test", masks="masks/test", image="t{}.jpg", name="t{}.png")),
        "t0.jpg .one of 12.: a photograph in test/ or on test.txt, which .*; evaluate.py takes a --list of"),
    "val/ of the masks alone": (both(folder(masked=4, masks="masks/train"), lambda root: [
        save(scene(5)[1], root / "masks/val/p05.png"), save(scene(6)[1], root / "masks/test/p06.png")]),
        "10 for training, 1 for validation$"),
    "val.txt and test.txt": (both(folder(), lists("p04 p11", "p05", ("test.txt", "val.txt"))),
                             "9 for training, 1 for validation$"),
    "val.txt names some of val/": (both(train_and_val, lists(val="v0 v1")),
                                   "v2.jpg: a photograph in val/ without a mask or not in val.txt"),
    "val/ beside train.txt": (both(train_and_val, lists("p00 p01 p02 p07 p08 p09")),
                              "3 of the 6 labelled images, those of the folder val/"),
    "photographs above subfolders": (
        both(folder(images="images/train", count=6), folder(images="unlabeled", masked=0, image="u{}.jpg")),
        "unlabeled/.*jpg .one of 12.: .*move them into .*/images/train/.*\nno unlabelled",
        move("unlabeled/*", "images/train")),
    "links to folders": (both(folder(images="../train"), lambda root: (
        (root / "images").mkdir(), (root / "images/train").symlink_to(root.parent / "train"))),
        "11 for training, 1 for validation$"),
    "HEIC behind a link": (both(folder(images="../photographs"), lambda root: (
        (root / "images").symlink_to(root.parent / "photographs"), write(root / "images/p12.heic", HEIC))),
        "images/.*heic: not read"),
    "train.txt of labelled images": (both(folder(), lists("p00 p01 p02", "p04 p05")),
                                     "p03.jpg .one of 7.: a photograph on no list.*\nno unlabelled",
                                     texts(f"{LISTS}/train.txt", "p00\np01\np02\np07\np08\n")),
    "predictions": (both(folder(), folder(images="predictions", image="p{:02d}_overlay.png", count=6,
                                          masks="predictions")), None),
    "hidden files": (files(b"\0\5\x16\7" + bytes(99), "images/.DS_Store", "images/._p00.jpg",
                           "masks/._p00.png", "masks/Thumbs.db", "images/desktop.ini"), None),
    "files beside photographs": (files(
        b"", "images/Icon\r", "images/p00.AAE", "images/p00.xmp", "images/Picasa.ini", "masks/Icon\r",
        *(f"{name}:Zone.Identifier" for name in ("images/p00.jpg", "masks/p00.png"))), None),
    "thumbnails of a NAS": (both(folder(images="images/a"), folder(
        images="images/a/@eaDir/p00.jpg", image="thumb{}.jpg", masked=0)), "custom: 12 images, 6 masks"),
    "scans": (both(folder(images="scans"), lambda root: (root / "images").mkdir(), lambda root: [
        save(one_bit(scene(i)[1]), root / f"images/p{i:02d}.png") for i in range(12)],
        lambda root: shutil.rmtree(root / "scans")), None),
    **{kind: (files(b"{}", name, masked=0), f"{name.split('/')[0]}.*: not read; .*export index", export_again)
       for kind, name in (("COCO", "annotations/instances.json"), ("YOLO", "labels/p00.txt"))},
    "_classes.csv": (files(b"", "images/_classes.csv"), "masks are read, not annotations"),
    "annotations": (both(folder(masked=0), lambda root: write(root / "images/p00.json", "{}")),
                    "p00.json: not read; .*index PNGs of them\nno labelled image.* the stem of its image",
                    lambda root, said: folder()(root)),
    "the folder of photographs": (folder(images="images/images"), None),
    "no suffix": (both(folder(), lambda root: (root / "images/p09.jpg").rename(root / "images/p09")),
                  "p09: not read; .*call this one p09.jpg"),
    "one label": (folder(masked=1), "no labelled image is left .*; two are needed, as one is for validation",
                  pictures("masks/p01.png", 1, part=1)),
    "two labels": (folder(masked=2), "1 of the 2 labelled"),
    "all labelled": (folder(count=8, masked=8), "no unlabelled image is left", paste,
                     pictures("images/p09.jpg")),
    "no photographs": (folder(count=0), "images: no photographs in it", lambda root, said: folder()(root)),
    "no folder": (folder(images="."), "call the folder of the photographs images/", move("*.jpg", "images")),
    "Segments.ai": (folder(masks="images", name="p{:02d}_label_ground-truth.png"),
                    "p00_label_ground-truth.png .one of 6.: looks .*, this one as p00.png",
                    move("images/*.png", "masks", without("_label_ground-truth"))),
    **{kind: (folder(masks="labels", name=f"p{{:02d}}{end}.png"), "labels/.*one of 6.: .*, this one as p00",
              move("labels/*", "masks", without(end))) for kind, end in (("fastai", "_P"), ("CamVid", "_L"))},
    "one name": (folder(names="thing"), "from 2 to 255 lines .*, not 1: .* and background is a class, too",
                 texts("class_names.txt", "background\nthing")),
    "CVAT, the rest is ignored": (cvat("ignore:0,0,0::\nthing:184,61,245::\n"), "let a line name the rest",
                                  texts("labelmap.txt", "background:0,0,0::\nthing:184,61,245::\n")),
    "test_masks/": (folder(masks="test_masks"), "test_masks/.*png .one of 6.: not read; if they are masks",
                    move("test_masks/*", "masks")),
    "nnU-Net": (folder(image="c_{:03d}_0000.jpg", name="c_{:03d}.png"),
                ": call this one c_000_0000.png",
                move("masks/*", "masks", without(".png", "_0000.png"))),
    "labels of Cityscapes": (folder(image="c_{}_leftImg8bit.jpg", name="c_{}_gtFine_labelIds.png"),
                             "one of 6.: a mask .*: call this one c_0_leftImg8bit.png",
                             move("masks/*", "masks", without("gtFine_labelIds", "leftImg8bit"))),
    "labels/ among photographs": (
        both(folder(images="images/a", masked=3), folder(images="images/a", masks="images/labels")),
        "one of 6.: looks like a mask, and is read as a photograph; move such files elsewhere",
        move("images/labels/*.png", "elsewhere")),
    "a photograph and its mask": (folder(masks="images"), "one of 6.: have one name; .*if one is a mask, "
                                  "move it into a folder masks/ beside images/",
                                  move("images/*.png", "masks")),
    "masks of 16 bits among photographs": (
        folder(lambda labels: labels.astype(np.uint16), masks="images", name="p{:02d}_x.png"),
        "p00_x.png: has more than 8 bits a channel .and 5 more.; it looks like a mask: move it to the masks",
        move("images/*.png", "masks", without("_x"))),
    "a folder for each class": (
        one_class_each, "background/p00.png and .*thing/p00.png .one of 6.: one image .*; merge", merge),
    "an image in the folder of its class": (one_folder_each, "hold one alone, beside 255", merge_classes),
    "a folder for each image": (lambda root: one_class_each(root, "p{1:02d}/{0}.png"),
                                "one of 12.: one of several masks of an image, .*merge them", merge),
    "folders for each class beside": (
        lambda root: (one_class_each(root), [(root / "masks" / name).rename(root / name) for name in (
            "background", "thing")], (root / "masks").rmdir()),
        "background/.*png .one of 6.: .*others have the same names: .*merge.*\\n.*thing/.*one of 6",
        lambda root, said: folder()(root)),
    "a file for each class": (lambda root: one_class_each(root, "p{:02d}_{}.png"),
                              "one of 12.: one of several masks of an image, .*merge them", merge),
    "georeferences": (files(b"1", *(f"{name}{suffix}" for name in ("images/p00", "masks/p00")
                                    for suffix in (".jgw", ".pgw", ".wld", ".tfw", ".png.aux.xml"))), None),
    "a link to itself": (both(folder(), link("images", "images/images", "images/again")), None),
    "links in a circle": (
        both(folder(images="images/a"), link(".", "images/up"), link("images", "images/a/up")), None),
    # Names
    "numbered alike, and masks otherwise": (both(
        folder(images="images/train", masks="masks/train", name="p{:02d}_gt.png"),
        folder(images="images/val", masks="masks/val", name="p{:02d}_gt.png", count=3)),
        "one of 9.: a mask without an image .*: call this one p0.*.png",
        lambda root, said: [move(f"masks/{part}/*", f"masks/{part}", without("_gt"))(root, said)
                            for part in ("train", "val")]),
    "numbered alike": (both(folder(images="images/train", masks="masks/train"), folder(
        images="images/val", masks="masks/val", count=3)), "12 for training, 3 for validation$"),
    "edges": (both(folder(image=" p {:02d} .jpg", name=" p {:02d} .png"), lists(val=" p 04 \n p 05 ")),
              "10 for training, 2 for validation$"),
    "sizes as class names": (folder(names="10 mm bolt\n12 mm bolt"), None),
    "inches as class names": (folder(names="1 inch\n2 inch"), None),
    "capitals": (folder(image="p{:02d}.JPG", name="p{:02d}.PNG"), None),
    ".jfif": (both(folder(), lambda root: move("images/*", "images", without("jpg", "jfif"))(root, 0)), None),
    "names of Cityscapes": (both(folder(image="c_{}_leftImg8bit.jpg", name="c_{}_leftImg8bit.png"), lists(
        val="c_4_leftImg8bit c_5_leftImg8bit")), "2 for validation"),
    "two suffixes": (both(folder(image="p{}.jpg.png", name="p{}.jpg.png"), lists(val="p4.jpg p5.jpg")),
                     "2 for validation"),
    "spaces and dots": (folder(image="IMG 2024.06.{:02d} (1).jpg", name="IMG 2024.06.{:02d} (1).png"), None),
    "commas in names": (folder(image="a,{},b.jpg", name="a,{},b.png"), None),
    "names with #": (both(folder(image="#{}.jpg", name="#{}.png"), lists(val="#4 #5")), "2 for validation"),
    "Unicode": (folder(image="straße_照片_{}.jpg", name="straße_照片_{}.png"), None),
    "NFC and NFD": (folder(image="caf\u00e9{}.jpg", name="cafe\u0301{}.png"), None),
    "not UTF-8": (both(folder(), lambda root: (root / "images/p09.jpg").rename(root / "images/p\udce9.jpg")),
                  r"strange name 'p\\udce9.jpg'; rename",
                  move("images/p\udce9.jpg", "images", lambda _: "q.jpg")),
    "not UTF-8, and unused": (files(HEIC, "images/p\udce9.heic"), r"p\\udce9.heic: not read"),
    "two of one stem": (both(folder(), lambda root: save(scene(3)[0], root / "images/p02.png")),
                        "have one name; rename", remove("images/p02.png"),
                        move("images/p02.png", "images", lambda _: "q.png")),
    # Files that cannot be read, and odd ones that can
    "turned by EXIF": (both(folder(), lambda root: [
        save(scene(i, size)[0], root / f"images/p0{i}.jpg", exif=rotated(6))
        for i, size in enumerate([(32, 48), (48, 32)])]),
        "p01.png: 48 x 32 pixels, but its image .upright.* has 32 x 48",
        pictures("masks/p01.png", 1, (32, 48), 1)),
    "an odd EXIF": (instead(scene(9, (32, 48))[0], "p09.jpg", exif=rotated(6, -1, 0)), None),
    "an EXIF of noise": (instead(scene(9)[0], "p09.jpg", exif=b"Exif\0\0II*\0\xff\xff"), None),
    "a turned TIFF": (instead(scene(9, (32, 48))[0], "p09.tif", tiffinfo={0x112: 6}), None),
    "an animation": (instead(scene(9)[0], "p09.webp", save_all=True,
                             append_images=[Image.fromarray(scene(8)[0])]), None),
    "pages": (instead(scene(9)[0], "p09.tif", save_all=True,
                      append_images=[Image.fromarray(scene(8)[0])]), None),
    "TIFF of 16 bits": (instead(np.full((32, 48), 999, np.uint16), "p09.tif"),
                        "p09.tif: has more than 8 bits a channel; scale its values to 0 to 255, by one",
                        to_jpeg("images/p09.tif")),
    "TIFF of floats": (instead(np.ones((32, 48), np.float32), "p09.tif"),
                       "p09.tif: has more than 8 bits a channel", to_jpeg("images/p09.tif")),
    "TIFF of 16-bit RGB": (files(tiff(3, 16), "images/p12.tif"), "p12.tif: has more than 8 bits a channel",
                           to_jpeg("images/p12.tif")),
    "TIFF of 4 bands": (files(tiff(4, 8), "images/p12.tif"), None),
    "TIFF of 5 bands": (files(tiff(5, 8), "images/p12.tif"), None),
    "CMYK": (instead(Image.fromarray(scene(9)[0]).convert("CMYK"), "p09.jpg"), None),
    "a palette": (instead(Image.fromarray(scene(9)[0]).convert("P"), "p09.png", transparency=0), None),
    "RGBA": (instead(Image.fromarray(scene(9)[0]).convert("RGBA"), "p09.webp"), None),
    "huge": (files(huge_png(), "images/p12.png"), r"p12.png: .*\(more than 178 megapixels\); tile or shrink",
             pictures("images/p12.png")),
    "cut short": (files(lambda image: image[:-300], "images/p09.jpg", size=(300, 200)),
                  "p09.jpg: cannot be read", remove("images/p09.jpg"), to_jpeg("images/p09.jpg")),
    "cut short, PNG": (both(instead(scene(9)[0], "p09.png"), lambda root: write(
        root / "images/p09.png", (root / "images/p09.png").read_bytes()[:-99])), "p09.png: cannot be read",
        remove("images/p09.png")),
    **{f"cut short, {kind}": (both(instead(scene(9)[0], f"p09.{kind}"), lambda root, kind=kind: write(
        root / f"images/p09.{kind}", (root / f"images/p09.{kind}").read_bytes()[:-30])),
        f"p09.{kind}: cannot be read", remove(f"images/p09.{kind}")) for kind in ("bmp", "tif", "webp")},
    "padded": (files(lambda image: image + bytes(9999), "images/p09.jpg"), None),
    "empty": (files(b"", "images/p09.jpg"), r"p09.jpg: cannot be read \(not an image\); replace or remove it",
              remove("images/p09.jpg")),
    "a web page": (files(b"<html>404", "images/p09.jpg"), "not an image", remove("images/p09.jpg")),
    "a dead link": (both(folder(), lambda root: (root / "images/p12.jpg").symlink_to(root / "nowhere")),
                    "broken symbolic link; remove it", remove("images/p12.jpg")),
}


def check(*arguments):
    """(exit code, all that prepare.py says)."""
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            prepare.main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
    return code, said.getvalue().rstrip()


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_what_is_said(tmp_path, name):
    make, pattern, *remedies = CASES[name]
    root = tmp_path / "my data"
    make(root)
    before = contents(root)
    code, said = check("--dataset", "custom", "--data-root", root)
    assert code == (2 if remedies else 0), said
    assert re.search(pattern or "", said, re.MULTILINE), said
    assert "Traceback" not in said and len(said.splitlines()) < 20 and said.encode()
    for image in open_data("custom", root).images.values() if not remedies else ():
        assert open_photograph(image).convert("RGB").size in ((48, 32), (32, 48))
    if pattern is None:
        assert not re.search("not read|: a |: looks |: one of |holds? ", said), said
    if code == 0:
        command = shlex.split(said.splitlines()[-1].removeprefix("nothing wrong; next: "))
        settings = parse_arguments(command[2:])
        assert command[:2] == ["python", "train.py"] and settings.data_root == str(root) and settings.small
    assert contents(root) == before


NOTES = {
    "label images among photographs": (both(folder(), folder(masks="images", name="x{:02d}.png")),
                                       "one of 6.: looks like a mask, .*; move such files into .*masks/$",
                                       move("images/*.png", "masks")),
    "of two colours": (both(folder(), folder(coloured(MEADOW, DISC), masks="images", name="x{:02d}.png")),
                       "one of 6.: looks like a mask", move("images/*.png", "elsewhere")),
    "numbered alike, and masks of one folder": (
        both(folder(images="images/train"), folder(images="images/val", count=4, masked=0)),
        "one of 4.: a mask without an image .*and its folder, if several images have that stem",
        lambda root, said: [move("masks/p0[4-9].png", "masks/train")(root, said),
                            move("masks/*.png", "masks/train")(root, said)]),
    "a mask of a photograph elsewhere": (
        both(folder(images="images/1", masks="masks/1"), folder(
            images="images/2", masks="masks/2", image="q{}.jpg", name="p{:02d}.png", count=8, masked=7)),
        "masks/2/p00.png .one of 7.: a mask without an image .*and its folder, if",
        move("masks/2/*", "elsewhere")),
    "copies in validation": (both(train_and_val, folder(
        masked=0, images="images/train", image="copy{:02d}.jpg")),
                             "val/v0.jpg .one of 3.: a validation image that is a training image under "
                             "another name, here .*keep one copy of each", lambda root, said: [
                                 (root / f"images/{name}.jpg").unlink() for i in range(3) for name in (
                                     f"train/p{i:02d}", f"train/copy{i:02d}")]),
    "val/ without masks": (both(train_and_val, folder(images="images/val", masked=0, image="w{}.jpg")),
                           "one of 12.: a photograph in val/ without a mask or not in val.txt, which",
                           move("images/val/w*", "images/train")),
    "black is another id than 0": (
        folder(indexed((200, 0, 0), (0, 0, 0))), "p00.png: the id 1 is black, and 0 is .200,0,0.; if the",
        lambda root, said: name_colours(c200_0_0="thing", c0_0_0="background")(
            root, said.partition("\nnothing wrong")[0])),
    "photographs elsewhere, of the names of masks": (
        both(folder(), folder(images="more", masked=0, count=3)),
        "more/.*jpg .one of 3.: not read; if they are other photographs, .*move them into .*/images/,",
        move("more/*.jpg", "images", without("p", "more"))),
    "overlays among photographs": (
        both(folder(), lambda root: [save(scene(i)[0], root / f"images/p0{i}_overlay.jpg") for i in (8, 9)]),
        "p08_overlay.jpg .one of 2.: looks like a mask, .*; move such files elsewhere",
        move("images/*overlay*", "elsewhere")),
    "a list that is not read": (
        both(folder(), lists(val="p04 p05"), lambda root: shutil.move(root / LISTS / "val.txt", root)),
        "val.txt: not read; if it lists the validation images, move it to .*/ImageSets/Segmentation/val.txt$",
        lambda root, said: shutil.move(root / "val.txt", root / LISTS)),
    "test2 that is no test": (
        both(folder(images="images/a"), folder(images="images/test2", image="q{}.jpg", masked=0)),
        "if it is no test set, call the folder otherwise$",
        lambda root, said: (root / "images/test2").rename(root / "images/b")),
    "upside down by EXIF": (both(folder(), lambda root: [
        save(scene(i)[0], root / f"images/p0{i}.jpg", exif=rotated(3)) for i in (0, 7)]),
        "p00.jpg: its EXIF turns it, and the size of its mask does not show .*; save the photograph as",
        lambda root, said: save(scene(0)[0], root / "images/p00.jpg")),
    "squares turned by EXIF": (both(folder(size=(32, 32)), lambda root: [
        save(scene(i, (32, 32))[0], root / f"images/p0{i}.jpg", exif=rotated(6)) for i in range(2)]),
        "p00.jpg .one of 2.: its EXIF turns it", lambda root, said: [
            save(scene(i, (32, 32))[0], root / f"images/p0{i}.jpg") for i in range(2)]),
    "photographs in a subfolder": (
        both(folder(), folder(count=3, masked=0, images="images/more", image="m{}.jpg")),
        "images/more/.*jpg .one of 3.: not read; .*move them into .*images/,",
        move("images/more/*", "images")),
    "no suffix": (both(folder(), lambda root: (root / "images/p09.jpg").rename(root / "images/p09")),
                  "p09: not read; .*call this one p09.jpg", move("images/p09", "images", "{}.jpg".format)),
    "0 and 255 among others": (both(folder(), lambda root: save(scene(4)[1] * 255, root / "masks/p04.png")),
                               "p04.png: a mask of one class alone, beside 255, .* export them again, with",
                               export_again),
    "two folders of masks": (
        both(folder(), folder(masks="SegmentationClass", masked=3)),
        "masks/p00.png .one of 3.: not read, as .*/SegmentationClass has masks of the same names; move away",
        lambda root, said: [(root / f"masks/p{i:02d}.png").unlink() for i in range(3)]),
    "masks in a second folder": (
        both(folder(), folder(masks="SegmentationClass", masked=3)),
        "masks/p03.png .one of 3.: not read; if they are masks, move them into .*/SegmentationClass/$",
        lambda root, said: [(root / f"masks/p{i:02d}.png").rename(root / f"SegmentationClass/p{i:02d}.png")
                            for i in range(3, 6)]),
    "val.txt names some of val/": (
        both(train_and_val, lists(val="v0 v1")),
        "v2.jpg: a photograph in val/ without a mask or not in val.txt, which is not used; add what is",
        texts(f"{LISTS}/val.txt", "v0\nv1\nv2\n")),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_note_is_followed(tmp_path, name):
    make, pattern, remedy = NOTES[name]
    arguments = ["--dataset", "custom", "--data-root", tmp_path]
    make(tmp_path)
    code, said = check(*arguments)
    assert code == 0 and re.search(pattern, said, re.MULTILINE), said
    remedy(tmp_path, said)
    code, said = check(*arguments)
    assert code == 0 and not re.search(pattern, said, re.MULTILINE), said


@pytest.mark.parametrize("masks, end", [("labels", "_L"), ("old", "_mask")])
def test_no_note_has_a_mask_overwritten(tmp_path, masks, end):
    both(folder(), folder(masks=masks, name=f"p{{:02d}}{end}.png"))(tmp_path)
    code, said = check("--dataset", "custom", "--data-root", tmp_path)
    assert code == 0
    for place, name in re.findall(r"move (?:them|such files) into (\S+)/, this one as (\S+\.png)", said):
        assert not Path(place, name).exists(), said


def test_half_of_the_masks_are_left_out_of_the_run_that_was_asked_for(tmp_path, monkeypatch, small):  # noqa: F811
    monkeypatch.setattr(settings, "machine_memory", lambda: 16.0)
    folder(count=8, masked=8)(tmp_path / "my data")
    given = ["--dataset", "custom", "--data-root", str(tmp_path / "my data"), "--small", "--weights", "none",
             "--iters", "1"]
    code, _, err = run(*given, "--out", tmp_path / "run")
    remedy = shlex.split(err.strip().rpartition("leave the masks of half of them out: ")[2])
    assert code == 2 and remedy[:2] == ["python", "train.py"]
    code, _, err = run(*remedy[2:], "--weights", "none", "--iters", 1, "--out", tmp_path / "run")
    assert code == 0, err


FOLLOWED = {  # name: ({file: its text}, the flags, what is said, {file: its text, as the remedy has it})
    "image missing": ({f"{LISTS}/train.txt": "im0\nim1\nim7\nx1\n"}, "", "missing .1.: x1; .* fix the list",
                      {f"{LISTS}/train.txt": "im0\nim1\nim7\n"}),
    "no mask": ({"list.txt": "im0\nim8\n"}, "--split {}/list.txt", "no mask .1.: im8; .*take them off the",
                {"list.txt": "im0\n"}),
    "twice": ({"list.txt": "im0\nim1\nim0\n"}, "--split {}/list.txt", "im0; keep one line of each",
              {"list.txt": "im0\nim1\n"}),
    "empty": ({f"{LISTS}/val.txt": "# none\n"}, "", "val.txt: is empty; write one id per line",
              {f"{LISTS}/val.txt": "im5\n"}),
    "val among train": ({f"{LISTS}/train.txt": "im0\nim4\nim7\n"}, "", "im4; keep each in one list",
                        {f"{LISTS}/train.txt": "im0\nim7\n"}),
    "val among labelled": ({"list.txt": "im0\nim5\n"}, "--split {}/list.txt", "im5; take th.* off the list",
                           {"list.txt": "im0\n"}),
    "unlisted": ({f"{LISTS}/train.txt": "im0\nim1\nim7\n", "list.txt": "im0\nim2\n"}, "--split {}/list.txt",
                 "training set .1.: im2; .*put the others among the training images",
                 {f"{LISTS}/train.txt": "im0\nim1\nim2\nim7\n"}),
    "blank line": ({"class_names.txt": "sky\n\nroad\n"}, "", "none of them empty",
                   {"class_names.txt": "sky\nroad\n"}),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_list_is_mended_as_the_line_says(tmp_path, small, name):  # noqa: F811
    spoilt, flags, said, mended = FOLLOWED[name]
    root = custom(tmp_path / "data")
    flags = ["--dataset", "custom", "--data-root", root, *TINY, "--out", tmp_path / "out",
             *flags.format(root).split()]
    for code, texts_of in ((2, spoilt), (0, mended)):
        for file, text in texts_of.items():
            (root / file).write_text(text)
        found, _, err = run(*flags)
        assert found == code and (code == 0 or re.search(said, err)), err


def test_the_command_for_the_other_problems_names_them_all(tmp_path, small):  # noqa: F811
    root = custom(tmp_path / "my data", images=20, masks=20)
    (root / "list.txt").write_text("im0\nim1\n")
    (root / f"{LISTS}/train.txt").write_text("im0\nim1\nim2\nim3\nx1\n")
    for i in (0, 1):
        (root / f"SegmentationClass/im{i}.png").unlink()
    code, _, err = run("--dataset", "custom", "--data-root", root, *TINY, "--split", root / "list.txt",
                       "--out", tmp_path / "out")
    first, more, command = re.search(r"train.py: (.*) \(and (\d) more: (python .*)\)$", err.strip()).groups()
    said = check(*shlex.split(command)[2:])[1].splitlines()
    problems = [line for line in said if re.search("missing|no mask", line)]
    assert code == 2 and first in problems and len(problems) == 1 + int(more), said


REMEDIES = [(name, remedy) for name, (_, _, *remedies) in CASES.items() for remedy in remedies]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(REMEDIES)), ids=[name for name, _ in REMEDIES])
def test_a_remedy_is_followed_and_training_runs(tmp_path, capsys, monkeypatch, number):
    """train.py refuses it too, in words of prepare.py's; with the remedy both take it."""
    monkeypatch.setattr(train, "DeepLabV3Plus", Small)
    (name, remedy), root = REMEDIES[number], tmp_path / "my data"
    CASES[name][0](root)
    arguments = ["--dataset", "custom", "--data-root", str(root)]
    said = check(*arguments)[1]
    with pytest.raises(SystemExit) as end:
        train.main([*arguments, *TINY, "--out", str(tmp_path / "refused")])
    line = capsys.readouterr().err.strip().removeprefix("train.py: ")
    assert end.value.code == 2 and re.sub(r" \(and \d more: .*\)$", "", line) in said
    remedy(root, said)
    if not (root / "pasted").exists():  # else the remedy was to train otherwise
        code, said = check(*arguments)
        assert code == 0, said
        train.main([*arguments, *TINY, "--out", str(tmp_path / "run")])
        assert (tmp_path / "run" / "result.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mask", [grey(0, 255), coloured((0, 0, 0), (128, 0, 0))], ids=["0 and 255", "RGB"])
def test_own_photographs_as_the_readme_has_it(tmp_path, capsys, mask):
    """30 photographs, 10 masks: check, label map as it says, train, predict."""
    root = tmp_path / "mine"
    folder(mask, count=30, masked=10)(root)
    before = contents(root)
    arguments = ["--dataset", "custom", "--data-root", str(root)]
    code, said = check(*arguments)
    assert code == 2
    said = paste(root, said)
    if "?" in said:
        label_map = (root / "labelmap.txt").read_text()
        write(root / "labelmap.txt", label_map.replace("?:0,", "background:0,").replace("?", "thing"))
        said = paste(root, said)
    assert before.items() <= contents(root).items() and len(contents(root)) == len(before) + 1
    assert said.endswith(f"nothing wrong; next: python train.py --dataset custom --data-root {root} --small")
    train.main([*arguments, *TINY, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        predict.main([str(tmp_path / "run/best.pth"), str(root / "images"), "--out", str(tmp_path / "out")])
    assert end.value.code == 0 and len(list((tmp_path / "out").glob("*_overlay.png"))) == 30
    folder(grey(9, 9), count=30, masked=10)(root)  # a validation set in which nothing is labelled
    write(root / "labelmap.txt", (root / "labelmap.txt").read_text() + "ignore:9,9,9")
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path / "run/best.pth")])
    assert end.value.code == 2 and "the validation masks" in capsys.readouterr().err
