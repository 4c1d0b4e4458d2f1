"""Own data as people bring it: what prepare.py says of each case, and that its remedies work.

Each case is twelve small photographs of a disc on a meadow, six of them with a mask, and one thing that
is different. Where prepare.py refuses it, `fix` does what the message says, and nothing else; then
prepare.py must pass it and training must run.
"""

import contextlib
import io
import re
import shlex
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import prepare
import train
from data import open_data, open_photograph

TINY = ["--backbone", "resnet18", "--channels", "16", "--crop-size", "32", "--batch-size", "2", "--iters",
        "2", "--weights", "none", "--workers", "0"]


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


def folder(root, mask=lambda labels: labels, images="images", masks="masks", image_name="p{:02d}.jpg",
           mask_name="p{:02d}.png", count=12, masked=6, names="background\nthing\n", size=(48, 32)):
    """Own data, good unless told otherwise; `mask` makes a picture of the labels of a mask."""
    for i in range(count):
        image, labels = scene(i, size)
        save(image, root / images / image_name.format(i))
        if i < masked:
            save(mask(labels), root / masks / mask_name.format(i))
    if names:
        (root / "class_names.txt").write_text(names)


def coloured(*colours, mode="RGB"):
    return lambda labels: Image.fromarray(np.array(colours, np.uint8)[labels]).convert(mode)


def indexed(*colours, order=(0, 1)):
    """An index PNG of these colours; `order` says which index stands for which label."""
    def make(labels):
        picture = Image.fromarray(np.array(order, np.uint8)[labels])
        picture.putpalette(np.array(colours, np.uint8).tobytes())
        return picture
    return make


def cvat(root, label_map="background:0,0,0::\nthing:184,61,245::\n", colours=((0, 0, 0), (184, 61, 245)),
         below="", masked=6, names=("default.txt",)):
    """An export of CVAT's "Segmentation mask 1.1", with its photographs."""
    folder(root, coloured(*colours), f"JPEGImages/{below}", f"SegmentationClass/{below}", masked=masked,
           names=None)
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + label_map)
    write(root, "ImageSets/Segmentation/default.txt", "".join(f"{below}p{i:02d}\n" for i in range(12)))


def write(root, name, text):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def paste(root, said):
    """Run the command at the end of a message as it stands; returns what it says."""
    command = shlex.split(re.findall("python .*$", said, re.MULTILINE)[-1])
    assert str(root) in command and command[1] in ("prepare.py", "train.py")
    if command[1] == "train.py":
        train.main([*command[2:], *TINY, "--out", str(root / "pasted")])
    else:
        return check(*command[2:])[1]


def check(*arguments):
    """(exit code, all that prepare.py says)."""
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            prepare.main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
    return code, said.getvalue().rstrip()


def again(root, said):
    """--convert, and once more when labelmap.txt, which the first has written, has been looked at."""
    assert "labelmap.txt: written" in paste(root, said)
    paste(root, said)


def first_name(root, said):
    names = root / "class_names.txt"
    names.write_text("nothing\n" + names.read_text())


def edit(name, *change):
    """The fix that replaces some text of a file, or all of it."""
    def fix(root, said):
        old, new = change if len(change) == 2 else ((root / name).read_text(), *change)
        write(root, name, (root / name).read_text().replace(old, new))
    return fix


def remove(*names):
    return lambda root, said: [(root / name).unlink() for name in names]


def export_again(root, said):
    """Masks as index PNGs of the right size and name, in masks/."""
    shutil.rmtree(root / "masks")
    folder(root)


def grey(values):
    return lambda labels: np.array(values, np.uint8)[labels]


def with_alpha(labels):
    return np.stack([*[labels * 255] * 3, np.full_like(labels, 255)], 2)


def spoiled(name, content, **options):
    """A good folder, but for one file."""
    def make(root):
        folder(root, **options)
        before = (root / name).read_bytes() if (root / name).exists() else b""
        write(root, name, content(before) if callable(content) else content)
    return make


def instead(name, picture, new_name=None, **options):
    """A good folder, but for one picture."""
    def make(root):
        folder(root)
        (root / name).unlink()
        save(picture, root / (new_name or name), **options)
    return make


def both(*makers):
    return lambda root: [make(root) for make in makers]


def rotated(orientation, *more):
    """Photographs with an EXIF orientation; `more`: a rational that Pillow cannot write again."""
    entries = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)
    entries += struct.pack("<HHII", 0x11a, 10, 1, 38) if more else b""
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries) // 12) + entries + struct.pack("<I", 0)
    return b"Exif\0\0" + tiff + (struct.pack("<ii", *more) if more else b"")


def tiff(channels, depth):
    """A TIFF of 8 or 16 bits a channel that Pillow cannot write."""
    image = np.resize(scene(9)[0], (32, 48, channels)).astype(f"<u{depth // 8}") * (257 if depth == 16 else 1)
    tags = {256: 48, 257: 32, 258: 8 + 2 + 12 * 11 + 4, 259: 1, 262: 2, 273: 200, 277: channels, 278: 32,
            279: image.nbytes, 284: 1, 338: 0}
    if channels == 3:
        del tags[338]
    counts = {258: channels, 338: channels - 3}
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, counts.get(tag, 1), value)
        for tag, value in tags.items()) + b"\0" * 4
    return (head.ljust(146, b"\0") + struct.pack("<H", depth) * channels).ljust(200, b"\0") + image.tobytes()


def huge_png(width, height):
    """The header of a large PNG: more than Pillow agrees to open."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
            + struct.pack(">I", 4) + b"IDAT")


def train_and_val_folders(root):
    folder(root, images="images/train", masks="masks/train")
    folder(root, images="images/val", masks="masks/val", image_name="v{:02d}.jpg", mask_name="v{:02d}.png",
           count=3, masked=3)


def unannotated(root):
    cvat(root)
    for i in range(6, 12):
        save(np.zeros((32, 48, 3), np.uint8), root / f"SegmentationClass/p{i:02d}.png")


def to_jpeg(pattern):
    def fix(root, said):
        for i, path in enumerate(sorted(root.glob(pattern))):
            save(scene(i)[0], path.with_suffix(".jpg"))
            path.unlink()
    return fix


def moved(pattern, target, rename=lambda name: name):
    def fix(root, said):
        (root / target).mkdir(exist_ok=True)
        for path in sorted(root.glob(pattern)):
            path.rename(root / target / rename(path.name))
    return fix


def folders_and_names(root, said):
    (root / "imgs").rename(root / "images")
    (root / "gts").rename(root / "masks")
    said = check("--dataset", "custom", "--data-root", root)[1]
    assert "call this one 00000_img.png" in said
    moved("masks/*", "masks", lambda name: name.replace("_gt", "_img"))(root, said)


def pasted_twice(root, said):
    """The remedy is a command, and so is that of what is left."""
    paste(root, paste(root, said))


def convert_and_remove(root, said):
    said = paste(root, said)
    assert "6 masks like this one hold one class" in said and "SegmentationClassIds/p06.png" in said
    remove(*(f"SegmentationClassIds/p{i:02d}.png" for i in range(6, 12)))(root, said)


LISTS, HEIC = "ImageSets/Segmentation", b"\0\0\0\x24ftypheic" + bytes(300)
DISC, MEADOW = (184, 61, 245), (0, 128, 0)
# name: (how the folder is made, what is said of it, the remedy followed, or another remedy)
CASES = {
    "good": (folder, None),
    # What a mask means
    "0 and 255": (lambda r: folder(r, grey([0, 255])), "hold background alone, beside 255, which", paste),
    "0 and 255 with alpha": (lambda r: folder(r, with_alpha), r"colour image \(RGBA\)", paste),
    "0 and 255 in a palette": (lambda r: folder(r, indexed((9, 9, 9), *[(0, 0, 0)] * 254, (200, 0, 0),
                                                           order=(0, 255))), "beside 255", again),
    "0, 128 and 255": (lambda r: folder(r, lambda m: np.where(np.arange(48) > 24, m * 255, m * 128).astype(
        np.uint8), names="background\nleft\nright\n"), "holds the ids 128", again),
    "one bit": (lambda r: folder(r, lambda m: Image.fromarray(m * 255).convert("1")), None),
    "one bit, three names": (lambda r: folder(r, lambda m: Image.fromarray(m * 255).convert("1"), names="a\nb\nc"),
                             r"p00.png: of one bit \(1\).* \(and 5 more\)", again),
    "one class": (lambda r: folder(r, grey([0, 0])), "hold background alone; add masks of other", export_again),
    "nothing but 255": (lambda r: folder(r, grey([255, 255])), "hold nothing alone, beside 255", export_again),
    "RGB that are ids": (lambda r: folder(r, coloured((0, 0, 0), (1, 1, 1))), r"colour image \(RGB\)", paste),
    "RGB colours": (lambda r: folder(r, coloured((0, 0, 0), (128, 0, 0))), r"\(and 5 more\)", again),
    "grey with alpha": (lambda r: folder(r, coloured((0, 0, 0), (1, 1, 1), mode="LA")), r"\(LA\)", paste),
    "palettes in two orders": (lambda r: both(
        lambda r: folder(r, indexed((0, 0, 0), (255, 0, 0)), masked=3),
        lambda r: [save(indexed((255, 0, 0), (0, 0, 0), order=(1, 0))(scene(i)[1]), r / f"masks/p{i:02d}.png")
                   for i in range(3, 6)])(r),
        r"p00.png and .*p03.png: the id 0 is \(0,0,0\) in the one and \(255,0,0\) in the other", again),
    "ids of 16 bits": (lambda r: folder(r, lambda m: m.astype(np.uint16)), None),
    "ids from 1": (lambda r: folder(r, grey([1, 2])), "no mask holds 0, and ids count from 0", first_name, again),
    "ids from 1, 0 unlabelled": (lambda r: folder(r, lambda m: (m + 1) * (np.arange(48) > 5).astype(np.uint8)),
                                 "2 classes .0 to 1.; ids count from 0", first_name, again),
    "smoothed edges": (lambda r: folder(r, lambda m: Image.fromarray(m * 255).resize((96, 64), 2).resize(
        (48, 32), 2)), "if they are grey levels", again),
    "masks as JPEG": (lambda r: folder(r, grey([0, 255]), mask_name="p{:02d}.jpg"),
                      "6 files .jpg .*export the masks again, as PNGs", export_again),
    "masks as TIFF": (lambda r: folder(r, mask_name="p{:02d}.tif"), "6 files .tif", paste),
    "masks as .npy": (lambda r: [folder(r, masked=0), *(write(r, f"masks/p{i:02d}.npy", b"") or np.save(
        r / f"masks/p{i:02d}.npy", scene(i)[1].astype(np.int32) - (i == 1)) for i in range(6))],
        "6 files .npy", paste),
    "labels/": (lambda r: folder(r, masks="labels"), "labels: 6 files .png .*if they are masks, move them into",
                moved("labels/*", "masks")),
    "p00_mask": (lambda r: folder(r, mask_name="p{:02d}_mask.png"), "6 masks like this .*: call this one p00.png",
                 moved("masks/*", "masks", lambda name: name.replace("_mask", ""))),
    "p00.jpg.png": (lambda r: folder(r, mask_name="p{:02d}.jpg.png"), ": call this one p00.png",
                    moved("masks/*", "masks", lambda name: name.replace(".jpg", ""))),
    "other names": (lambda r: folder(r, images="imgs", masks="gts", image_name="{:05d}_img.jpg",
                                     mask_name="{:05d}_gt.png"), r"\(but gts, imgs\)", folders_and_names),
    "masks beside images": (lambda r: folder(r, masks="images", mask_name="p{:02d}_mask.png"),
                            "p00_mask.png: 6 files like this one look like masks",
                            moved("images/*_mask.png", "masks", lambda name: name.replace("_mask", ""))),
    "a mask smaller": (lambda r: both(folder, lambda r: save(scene(0, (24, 16))[1], r / "masks/p00.png"))(r),
                       "p00.png: 24 x 16 pixels, but its", export_again),
    "a mask cut short": (spoiled("masks/p01.png", lambda before: before[:-30]), "p01.png: cannot be read",
                         export_again),
    "a huge mask": (spoiled("masks/p00.png", huge_png(20000, 10000)), "more than 178 megapixels", export_again),
    "a class absent": (lambda r: folder(r, names="background\nthing\nunicorn"), "no labelled mask holds unicorn"),
    "no class in validation": (both(folder, lambda r: [write(r, f"{LISTS}/val.txt", "p05\n"), save(
        np.zeros((32, 48), np.uint8), r / "masks/p05.png")]), "no validation mask holds thing"),
    "nothing to validate": (both(folder, lambda r: [write(r, f"{LISTS}/val.txt", "p05\n"), save(
        np.full((32, 48), 255, np.uint8), r / "masks/p05.png")]), "the validation masks.* hold nothing",
        export_again),
    # Class lists
    "__ignore__": (lambda r: folder(r, names="__ignore__\n_background_\nthing"), "__ignore__ is 255",
                   edit("class_names.txt", "__ignore__\n", "")),
    "_background_": (lambda r: folder(r, names="_background_\nthing"), None),
    "UTF-16": (spoiled("class_names.txt", "background\r\nthing\r\n".encode("utf-16")), "save it as UTF-8",
               lambda r, said: write(r, "class_names.txt", "background\r\nthing\r\n")),
    "UTF-16, no mark": (spoiled("class_names.txt", "a\nb\n".encode("utf-16-le")), "save it as UTF-8",
                        lambda r, said: write(r, "class_names.txt", "a\nb\n")),
    "commas": (lambda r: folder(r, names="background, thing"), "one class name a line",
               edit("class_names.txt", ", ", "\n")),
    "a name twice": (lambda r: folder(r, names="thing\nthing"), "thing stands there twice",
                     edit("class_names.txt", "thing\nthing", "background\nthing")),
    "numbered from 1": (lambda r: folder(r, grey([1, 2]), names="1 background\n2: thing"), "numbered from 1",
                        edit("class_names.txt", "nothing\nbackground\nthing")),
    "numbered from 0": (lambda r: folder(r, names="0 background\n1 thing"), None),
    "classes.txt": (both(lambda r: folder(r, names=None), lambda r: write(r, "classes.txt", "a\nb\n")),
                    "or rename classes.txt", lambda r, said: (r / "classes.txt").rename(r / "class_names.txt")),
    # CVAT
    "CVAT": (cvat, "labelmap.txt: says", paste),
    "CVAT, subfolders": (lambda r: cvat(r, below="Dataset1/images/train/"), "labelmap.txt: says", paste),
    "CVAT, background last": (lambda r: cvat(r, "thing:184,61,245::\nbackground:0,0,0::\n"), "", paste),
    "CVAT, capitals": (lambda r: cvat(r, "Background:0,0,0::\nthing:184,61,245::\n"), "", paste),
    "CVAT, no background": (lambda r: cvat(r, "meadow:0,128,0::\nthing:184,61,245::\n", (MEADOW, DISC)), "", paste),
    "CVAT, all have masks": (lambda r: cvat(r, masked=12), "", pasted_twice),
    "CVAT, black where nobody was": (unannotated, "", convert_and_remove, pasted_twice),
    "CVAT's lists": (both(cvat, lambda r: [write(r, f"{LISTS}/Train.txt", "p00\np01\np02\np07\n"), write(
        r, f"{LISTS}/Validation.TXT", "p03\np04\n")]), "", lambda r, said: re.search(
            "4 for training, 2 for validation", paste(r, said))[0]),
    # What lies there unused
    "HEIC among others": (lambda r: [folder(r), *(write(r, f"images/IMG_{i}.HEIC", HEIC) for i in range(20))],
                          "20 files .heic .IMG_0.HEIC for one. are not read; .*convert them to JPEG"),
    "HEIC without a mask": (lambda r: [folder(r, count=6), *(write(r, f"images/I{i}.HEIC", HEIC) for i in range(9))],
                            "^[^\\n]*9 files .heic.*\nno unlabelled image", to_jpeg("images/*.HEIC"), paste),
    "HEIC called JPEG": (spoiled("images/p09.jpg", HEIC), r"p09.jpg: cannot be read \(HEIC or AVIF\); convert it",
                         to_jpeg("images/p09.jpg")),
    "photographs elsewhere": (lambda r: [folder(r, count=6), folder(r, count=9, masked=0, images="unlabeled",
                                                                    image_name="u{}.jpg")],
                              "unlabeled: 9 files .jpg .*move them into .*\nno unlabelled",
                              moved("unlabeled/*", "images")),
    "a subfolder": (lambda r: [folder(r), folder(r, count=3, masked=0, images="images/more",
                                                 image_name="m{}.jpg")], "images/more: 3 files .jpg .*not read"),
    "train/ and val/": (train_and_val_folders, r"3 of the 9 labelled images, those of the folder val/"),
    "test/": (both(train_and_val_folders, lambda r: folder(r, images="images/test", masked=0, image_name="t{}.jpg")),
              "images/test: 12 files .jpg .*not read"),
    "train.txt of labelled images": (both(folder, lambda r: [write(r, f"{LISTS}/train.txt", "p00\np01\np02\n"),
                                                             write(r, f"{LISTS}/val.txt", "p04\np05\n")]),
                                     "p03.jpg: 7 photographs like this one are on no list.*\nno unlabelled",
                                     edit(f"{LISTS}/train.txt", "p02\n", "p02\np07\np08\n"),
                                     remove(f"{LISTS}/train.txt")),
    "hidden files": (lambda r: [folder(r), *(write(r, name, b"\0\5\x16\7" + bytes(99)) for name in (
        "images/.DS_Store", "masks/.DS_Store", "images/._p00.jpg", "masks/._p00.png", "images/Thumbs.db",
        "masks/Thumbs.db", "images/desktop.ini"))], None),
    "no suffix": (lambda r: [folder(r), (r / "images/p09.jpg").rename(r / "images/p09")],
                  "1 files without suffix .p09 for one.*such as .jpg"),
    "one label": (lambda r: folder(r, masked=1), "p00 alone has a mask, and two are needed",
                  lambda r, said: save(scene(1)[1], r / "masks/p01.png")),
    "two labels": (lambda r: folder(r, masked=2), "1 of the 2 labelled"),
    "all labelled": (lambda r: folder(r, count=8, masked=8), "no unlabelled image is left", paste,
                     lambda r, said: save(scene(9)[0], r / "images/p09.jpg")),
    "no photographs": (lambda r: [(r / "images").mkdir(parents=True), folder(r, count=0)], "images: no photographs in it",
                       lambda r, said: folder(r)),
    "no folder": (lambda r: folder(r, images="."), "call the folder of the photographs images/", moved("*.jpg", "images")),
    # Names
    "capitals": (lambda r: folder(r, image_name="p{:02d}.JPG", mask_name="p{:02d}.PNG"), None),
    ".jfif": (lambda r: [folder(r), *((r / f"images/p{i:02d}.jpg").rename(r / f"images/p{i:02d}.jfif")
                                      for i in range(12))], None),
    "spaces and dots": (lambda r: folder(r, image_name="IMG 2024.06.{:02d} (copy).jpg",
                                         mask_name="IMG 2024.06.{:02d} (copy).png"), None),
    "commas in names": (lambda r: folder(r, image_name="a,{},b.jpg", mask_name="a,{},b.png"), None),
    "names with #": (lambda r: [folder(r, image_name="#{}.jpg", mask_name="#{}.png"),
                                write(r, f"{LISTS}/val.txt", "#4\n#5\n")], "2 for validation"),
    "Unicode": (lambda r: folder(r, image_name="straße_照片_{:02d}.jpg", mask_name="straße_照片_{:02d}.png"), None),
    "NFC and NFD": (lambda r: folder(r, image_name="caf\u00e9{}.jpg", mask_name="cafe\u0301{}.png"), None),
    "not UTF-8": (lambda r: [folder(r), (r / "images/p09.jpg").rename(r / "images/p\udce909.jpg")],
                  r"strange name 'p\\udce909.jpg'; rename", moved("images/p\udce909.jpg", "images", lambda name: "p09.jpg")),
    "two of one stem": (instead("images/p03.jpg", scene(3)[0], "images/p02.png"), "two files for one id",
                        remove("images/p02.png"), moved("images/p02.png", "images", lambda name: "p03.png")),
    # Files that cannot be read, and odd ones that can
    "turned by EXIF": (lambda r: [folder(r), save(scene(0, (32, 48))[0], r / "images/p00.jpg", exif=rotated(6)),
                                  save(scene(1)[0], r / "images/p01.jpg", exif=rotated(6))],
                       "p01.png: 48 x 32 pixels, but its image .upright.* has 32 x 48",
                       lambda r, said: save(scene(1, (32, 48))[1], r / "masks/p01.png")),
    "an odd EXIF": (instead("images/p09.jpg", scene(9, (32, 48))[0], exif=rotated(6, -1, 0)), None),
    "an EXIF of noise": (instead("images/p09.jpg", scene(9)[0], exif=b"Exif\0\0" + b"II*\0\xff\xff"), None),
    "an animation": (instead("images/p09.jpg", Image.fromarray(scene(9)[0]), "images/p09.webp", save_all=True,
                             append_images=[Image.fromarray(scene(8)[0])]), None),
    "pages": (instead("images/p09.jpg", Image.fromarray(scene(9)[0]), "images/p09.tif", save_all=True,
                      append_images=[Image.fromarray(scene(8)[0])]), None),
    "TIFF of 16 bits": (instead("images/p09.jpg", np.full((32, 48), 999, np.uint16), "images/p09.tif"),
                        "p09.tif: has more than 8 bits a channel", to_jpeg("images/p09.tif")),
    "TIFF of floats": (instead("images/p09.jpg", np.ones((32, 48), np.float32), "images/p09.tif"),
                       "p09.tif: has more than 8 bits a channel", to_jpeg("images/p09.tif")),
    "TIFF of 16-bit RGB": (both(spoiled("images/p12.tif", tiff(3, 16))), None),
    "TIFF of 4 bands": (spoiled("images/p12.tif", tiff(4, 8)), None),
    "TIFF of 5 bands": (spoiled("images/p12.tif", tiff(5, 8)), None),
    "CMYK": (instead("images/p09.jpg", Image.fromarray(scene(9)[0]).convert("CMYK")), None),
    "palette": (instead("images/p09.jpg", Image.fromarray(scene(9)[0]).convert("P"), "images/p09.png",
                        transparency=0), None),
    "RGBA": (instead("images/p09.jpg", Image.fromarray(scene(9)[0]).convert("RGBA"), "images/p09.webp"), None),
    "huge": (spoiled("images/p12.png", huge_png(20000, 10000)), "p12.png: .*more than 178 megapixels.*; tile or shrink",
             lambda r, said: save(scene(9)[0], r / "images/p12.png")),
    "cut short": (spoiled("images/p09.jpg", lambda before: before[:-300], size=(300, 200)), "p09.jpg: cannot be read",
                  remove("images/p09.jpg"), to_jpeg("images/p09.jpg")),
    "cut short, PNG": (both(instead("images/p09.jpg", scene(9)[0], "images/p09.png"), lambda r: (
        r / "images/p09.png").write_bytes((r / "images/p09.png").read_bytes()[:-99])), "p09.png: cannot be read",
        remove("images/p09.png")),
    "things behind the end": (spoiled("images/p09.jpg", lambda before: before + bytes(9999)), None),
    "empty": (spoiled("images/p09.jpg", b""), r"p09.jpg: cannot be read \(not an image\)", remove("images/p09.jpg")),
    "a web page": (spoiled("images/p09.jpg", b"<html>404"), r"not an image", remove("images/p09.jpg")),
    "a dead link": (lambda r: [folder(r), (r / "images/p12.jpg").symlink_to(r / "nowhere")], "a link to nothing; remove",
                    remove("images/p12.jpg")),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_said(tmp_path, name):
    make, pattern, *fixes = CASES[name]
    root = tmp_path / "my data"
    make(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    code, said = check("--dataset", "custom", "--data-root", root)
    assert code == (2 if fixes else 0), said
    assert re.search(pattern or "", said, re.MULTILINE), said
    assert "Traceback" not in said and len(said.splitlines()) < 20
    for image in open_data("custom", root).images.values() if not fixes else ():
        assert open_photograph(image).convert("RGB").size in ((48, 32), (300, 200))
    if pattern is None:
        assert not re.search("not read|like this one|holds? ", said), said
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


REMEDIES = [(name, fix) for name, (_, _, *fixes) in CASES.items() for fix in fixes]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(REMEDIES)), ids=[name for name, _ in REMEDIES])
def test_a_remedy_is_followed_and_training_runs(tmp_path, capsys, number):
    """prepare.py refuses, the user does what it says, prepare.py passes and train.py trains."""
    (name, fix), root = REMEDIES[number], tmp_path / "my data"
    CASES[name][0](root)
    arguments = ["--dataset", "custom", "--data-root", str(root)]
    said = check(*arguments)[1]
    with pytest.raises(SystemExit) as end:  # train.py refuses it too, in words of prepare.py's
        train.main([*arguments, *TINY, "--out", str(tmp_path / "refused")])
    line = capsys.readouterr().err.strip().removeprefix("train.py: ")
    assert end.value.code == 2 and re.sub(r" \(and \d more: .*\)$", "", line) in said
    fix(root, said)
    if not (root / "pasted").exists():  # else the remedy was to train otherwise
        code, said = check(*arguments)
        assert code == 0, said
        train.main([*arguments, *TINY, "--out", str(tmp_path / "run")])
        assert (tmp_path / "run" / "result.txt").exists()
