"""Data sets in the layouts that people have, the splits and the checks."""

import os
import shlex
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import prepare
from batches import TrainingDraws
from check import check_data
from data import SPLITS, InputError, Shapes, open_data, read_list, split_ids
from shapes import draw_shapes

HERE = Path(__file__).parent.parent
CAMVID = HERE.parent / "shared" / "camvid"


DRAWN_SPLITS = {"voc_classic": (92, 183, 366, 732), "cityscapes": (186, 372, 744, 1488)}


def problems(found, labelled, unlabelled):
    return check_data(found, labelled, unlabelled, supervised=not unlabelled).problems


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path, **options)


def photograph(seed=0, height=12, width=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def custom(root, images=10, masks=6, val=2, classes="sky\nroad\n"):
    """Own data: masks on the first of the images; the last masked ones are for validation."""
    for i in range(images):
        save(root / "JPEGImages" / f"im{i}.jpg", photograph(i))
    for i in range(masks):
        save(root / "SegmentationClass" / f"im{i}.png", np.arange(12 * 16).reshape(12, 16) % 2)
    if val:
        lists = root / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "val.txt").write_text("".join(f"im{i}\n" for i in range(masks - val, masks)))
    (root / "class_names.txt").write_text(classes)
    return root


def voc(root):
    """VOC's layout: 6 train and 2 val images with masks of VOC's own, 4 more with SBD's."""
    base = root / "VOCdevkit" / "VOC2012"
    for i in range(12):
        save(base / "JPEGImages" / f"2007_{i:06d}.jpg", photograph(i))
        save(base / "SegmentationClassAug" / f"2007_{i:06d}.png", np.full((12, 16), 20))
        if i < 8:
            save(base / "SegmentationClass" / f"2007_{i:06d}.png", np.full((12, 16), i))
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("".join(f"2007_{i:06d}\n" for i in range(6)))
    (lists / "val.txt").write_text("2007_000006\n2007_000007\n")
    return root


def cityscapes(root, kind="labelIds"):
    for part, city in (("train", "aachen"), ("train", "ulm"), ("val", "bonn")):
        for i in range(2):
            stem = f"{city}_{i:06d}_000019"
            save(root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png", photograph(i))
            save(root / "gtFine" / part / city / f"{stem}_gtFine_{kind}.png",
                 np.resize([7, 8, 33, 0, 3, 26] if kind == "labelIds" else [0, 1, 18, 255, 255, 13],
                           (12, 16)))
    return root


@pytest.mark.parametrize("place", [".", "VOCdevkit", "VOCdevkit/VOC2012", "VOCdevkit/VOC2012/JPEGImages"])
def test_voc_is_found_from_the_folders_above_and_below(tmp_path, place):
    found = open_data("voc", voc(tmp_path) / place)
    assert len(found.classes) == 21 and len(found.train) == 10 and len(found.val) == 2
    assert np.unique(found.mask("2007_000003")) == [3]   # VOC's own mask wins
    assert np.unique(found.mask("2007_000009")) == [20]  # SBD's
    assert open_data("voc_classic", tmp_path / place).labelled == [f"2007_{i:06d}" for i in range(6)]
    assert problems(found, found.train, []) == []


def test_voc_classic_takes_labels_from_voc_and_the_rest_unlabelled(tmp_path, monkeypatch):
    monkeypatch.setitem(data.TRAINING_SETS, "voc_classic", 6)
    monkeypatch.setattr(data, "HERE", tmp_path)
    (tmp_path / "splits" / "voc_classic").mkdir(parents=True)
    (tmp_path / "splits" / "voc_classic" / "1_16.txt").write_text("# positions\n4\n0\n3\n")
    found = open_data("voc_classic", voc(tmp_path))
    labelled, unlabelled = split_ids(found, "voc_classic", "1_16")
    assert labelled == [f"2007_{i:06d}" for i in (0, 3, 4)]
    assert sorted(labelled + unlabelled) == found.train
    assert len(split_ids(found, "voc_classic", "full")[0]) == 6


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_masks_become_training_ids(tmp_path, kind):
    found = open_data("cityscapes", cityscapes(tmp_path, kind))
    assert len(found.classes) == 19 and len(found.train) == 4 and len(found.val) == 2
    mask = np.asarray(found.mask("ulm_000001_000019")).ravel()[:6]
    assert mask.tolist() == [0, 1, 18, 255, 255, 13]
    assert problems(found, found.train, []) == []


def test_cityscapes_takes_label_ids_where_an_image_has_no_others(tmp_path):
    root = cityscapes(cityscapes(tmp_path), "labelTrainIds")
    for path in root.glob("gtFine/*/ulm/*labelTrainIds.png"):
        path.unlink()
    found = open_data("cityscapes", root)
    assert found.masks["aachen_000000_000019"].name.endswith("TrainIds.png")
    for name in found.train + found.val:
        assert np.asarray(found.mask(name)).ravel()[:6].tolist() == [0, 1, 18, 255, 255, 13]


def test_voc_as_unimatch_has_it(tmp_path):
    """All masks in SegmentationClass/; where the lists are missing, they are copied from its repository."""
    base = voc(tmp_path) / "VOCdevkit/VOC2012"
    for path in (base / "SegmentationClassAug").iterdir():
        path.rename(base / "SegmentationClass" / path.name)
    (base / "SegmentationClassAug").rmdir()
    lists = base / "ImageSets/Segmentation"
    lists.rename(tmp_path / "splits")
    with pytest.raises(InputError, match="train.txt: no such file; copy it there") as error:
        open_data("voc", tmp_path)
    assert "1464/labeled.txt is the train.txt" in str(error.value)
    lists.mkdir()
    for name in ("train.txt", "val.txt"):
        (lists / name).write_text("".join(f"JPEGImages/{i}.jpg SegmentationClass/{i}.png\n" for i in (
            tmp_path / "splits" / name).read_text().split()))
    found = open_data("voc", tmp_path)
    assert len(found.train) == 10 and len(found.val) == 2
    assert open_data("voc_classic", tmp_path).labelled == [f"2007_{i:06d}" for i in range(6)]


@pytest.mark.parametrize("name", ["scan 01 ", " a", "# b", "c.jpg d", "train/0001", "e\u2028f"])
def test_ids_survive_a_list(tmp_path, name):
    (tmp_path / "list.txt").write_text(f"{name}\nother\n")
    assert read_list(tmp_path / "list.txt", {name: 0, "other": 0}) == [name, "other"]


def test_photographs_of_one_stem_have_ids_with_their_folders(tmp_path):
    root = custom(tmp_path, val=0)
    for top in (root / "JPEGImages", root / "SegmentationClass"):
        top.rename(tmp_path / "train")
        top.mkdir()
        (tmp_path / "train").rename(top / "train")
    for name, value in (("im0", 0), ("im7", 1), ("v", 1)):
        save(root / f"JPEGImages/val/{name}.jpg", photograph(99))
        save(root / f"SegmentationClass/val/{name}.png", np.full((12, 16), value))
    lists = root / "ImageSets/Segmentation"
    found = open_data("custom", root)
    assert found.val == ["v", "val/im0", "val/im7"]
    assert {"im1", "train/im0", "train/im7"} < {*found.train} and "train/im7" not in found.masks
    assert np.asarray(found.mask("train/im0")).max() == 1 and np.asarray(found.mask("val/im0")).max() == 0
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("JPEGImages/val/im0.jpg\n")  # in any form
    assert open_data("custom", root).val == ["val/im0"]


@pytest.mark.parametrize("colours, own, expected", [
    ([(9, 9, 9), (200, 0, 0)], [(1, 0, 0), (0, 99, 0)], [(9, 9, 9), (200, 0, 0)]),
    (None, [(1, 0, 0), (0, 99, 0)], [(1, 0, 0), (0, 99, 0)]),
    ([(0, 0, 0), (1, 1, 1)], None, [(0, 0, 0), (230, 159, 0)]),  # too much alike
    (None, None, [(0, 0, 0), (230, 159, 0)])], ids=["label map", "masks", "greys", "none"])
def test_where_the_palette_comes_from(tmp_path, colours, own, expected):
    root = custom(tmp_path)
    labels = Image.fromarray(np.arange(12 * 16, dtype=np.uint8).reshape(12, 16) % 2)
    if colours:
        labels = Image.fromarray(np.array(colours, np.uint8)[np.asarray(labels)])
        (root / "labelmap.txt").write_text("".join(
            f"{name}:{r},{g},{b}::\n" for name, (r, g, b) in zip(("sky", "road"), colours)))
    elif own:
        labels.putpalette(np.array(own, np.uint8).tobytes())
    for path in (root / "SegmentationClass").iterdir():
        labels.save(path)
    assert open_data("custom", root).palette == expected


def test_the_fallback_palette_has_no_two_colours_alike():
    assert len({*data.distinct_palette(23)}) == 23 and len(data.distinct_palette(40)) == 40
    assert data.distinct_palette(8)[:3] == [(0, 0, 0), (230, 159, 0), (86, 180, 233)]


def test_custom_labels_every_image_with_a_mask(tmp_path):
    found = open_data("custom", custom(tmp_path))
    labelled, unlabelled = split_ids(found, "custom", None)
    assert labelled == ["im0", "im1", "im2", "im3"]
    assert unlabelled == ["im6", "im7", "im8", "im9"] and found.val == ["im4", "im5"]
    assert split_ids(found, "custom", "1_2") == (["im0", "im2"], ["im1", "im3", *unlabelled])
    assert problems(found, labelled, unlabelled) == []


def test_custom_train_list_and_plain_folders(tmp_path):
    root = custom(tmp_path)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("im0\nim7\n")
    assert open_data("custom", root).train == ["im0", "im7"]
    (root / "JPEGImages").rename(root / "images")
    (root / "SegmentationClass").rename(root / "masks")
    assert open_data("custom", root).labelled == ["im0"]


def test_custom_older_labelme_trees(tmp_path):
    root = custom(tmp_path)
    (root / "SegmentationClass").rename(root / "SegmentationClassPNG")
    (root / "SegmentationClass").mkdir()
    (root / "SegmentationClass" / "im0.npy").touch()
    assert open_data("custom", root).labelled == ["im0", "im1", "im2", "im3"]


def test_custom_without_val_list_keeps_a_tenth_that_stays_when_masks_come_and_go(tmp_path):
    root = custom(tmp_path, images=120, masks=80, val=0)
    found = open_data("custom", root)
    assert 4 <= len(found.val) <= 12 and f"takes {len(found.val)} of the 80 labelled" in found.notes[0]
    assert not set(found.val) & set(found.train) and len(found.val + found.train) == 120
    for i in range(80, 120):
        save(root / f"SegmentationClass/im{i}.png", np.zeros((12, 16)))
    (root / f"SegmentationClass/{found.labelled[0]}.png").unlink()
    more = open_data("custom", root)
    assert not set(found.labelled) & set(more.val) and not set(found.val) & set(more.labelled)
    assert len(more.val) > len(found.val)


@pytest.mark.parametrize("masks, val", [(1, 1), (2, 1), (10, 1), (20, 4)])
def test_of_few_masks_validation_takes_one_and_at_most_a_fifth(tmp_path, masks, val):
    # Of im0 to im19 five draw less than a tenth.
    assert len(open_data("custom", custom(tmp_path, images=21, masks=masks, val=0)).val) == val


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"])
def test_photographs_of_every_mode_load_as_rgb(tmp_path, mode):
    root = custom(tmp_path)
    (root / "JPEGImages" / "im7.jpg").unlink()
    suffix = ".jpg" if mode in ("RGB", "L", "CMYK") else ".png"
    Image.fromarray(photograph()).convert(mode).save(root / "JPEGImages" / f"im7{suffix}")
    found = open_data("custom", root)
    draws = TrainingDraws(found, ["im0"], ["im7"], 2, 16, seed=0)
    assert draws[0, 0]["weak"].shape == (3, 16, 16)


def test_photographs_are_turned_upright_as_their_exif_says(tmp_path):
    root = custom(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph(height=16, width=12)).save(root / "JPEGImages" / "im0.jpg", exif=exif)
    found = open_data("custom", root)
    assert found.image("im0").size == (16, 12) and problems(found, found.labelled, []) == []
    labels = np.arange(16 * 12, dtype=np.uint8).reshape(12, 16) % 2  # and a mask, as viewers show it
    Image.fromarray(np.rot90(labels)).save(root / "SegmentationClass" / "im0.png", exif=exif)
    assert np.array_equal(found.labels("im0")[0], labels) and problems(found, found.labelled, []) == []
    Image.fromarray(photograph()).save(root / "JPEGImages" / "im0.jpg", exif=exif)
    assert "upright, as its EXIF says" in problems(found, found.labelled, [])[0]


def test_an_exif_behind_the_pixels_of_a_png_counts(tmp_path):  # where ImageMagick writes it
    exif, upright = Image.Exif(), photograph()
    exif[0x0112] = 6
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    save(tmp_path / "phone.png", np.rot90(upright))
    content = (tmp_path / "phone.png").read_bytes()
    (tmp_path / "phone.png").write_bytes(content[:-12] + chunk + content[-12:])
    assert np.array_equal(data.open_photograph(tmp_path / "phone.png"), upright)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_turned_tiff_is_not_scrambled(tmp_path, mode):
    grey = Image.fromarray(photograph()[..., 0])
    turned = grey.transpose(Image.Transpose.ROTATE_90).convert(mode)
    turned.save(tmp_path / "scan.tif", tiffinfo={0x112: 6})
    assert np.array_equal(data.open_photograph(tmp_path / "scan.tif").convert("L"), grey)


def test_a_mask_in_colour_may_be_an_array(tmp_path):
    root = custom(tmp_path)
    (root / "SegmentationClass" / "im0.png").unlink()
    (root / "labelmap.txt").write_text("sky:0,0,0\nroad:9,0,200\n")
    labels = np.eye(12, 16, dtype=np.uint8)
    np.save(root / "SegmentationClass" / "im0.npy", labels[..., None] * np.uint8([9, 0, 200]))
    assert np.array_equal(open_data("custom", root).labels("im0")[0], labels)
    np.save(root / "SegmentationClass" / "im0.npy", labels[None])
    with pytest.raises(InputError, match=r"where there is no class, but uint8 of shape \(1, 12, 16\)\)"):
        open_data("custom", root).labels("im0")


def test_the_blended_voc_partitions_are_a_rule():
    # Every 16th, 8th, 4th, 2nd of 10,582 sorted ids, from the first: the numbers of Table 1.
    ids = [f"{i:05d}" for i in range(10582)]
    blended = data.SegmentationData([], [], {}, {}, ids, [], ids)
    for split, count in zip(SPLITS, (662, 1323, 2646, 5291)):
        labelled, unlabelled = split_ids(blended, "voc", split)
        assert len(labelled) == count and labelled[:2] == [ids[0], ids[SPLITS[split]]]
        assert sorted(labelled + unlabelled) == ids


@pytest.mark.parametrize("dataset", DRAWN_SPLITS)
def test_drawn_splits_are_the_start_of_one_permutation(dataset):
    total = data.TRAINING_SETS[dataset]
    for split, size in zip(SPLITS, DRAWN_SPLITS[dataset]):
        positions = read_list(HERE / "splits" / dataset / f"{split}.txt")
        assert positions == [str(p) for p in np.random.default_rng(0).permutation(total)[:size]]


@pytest.mark.parametrize("text, ids", [
    ("im1\nim2\n", ["im1", "im2"]),
    ("JPEGImages/im1.jpg SegmentationClass/im1.png\r\nJPEGImages/im2.jpg SegmentationClass/im2.png  \r\n",
     ["im1", "im2"]),
    ("leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png\n", ["ulm_000000_000019"]),
    ("leftImg8bit/train/ulm/ulm_0_1_leftImg8bit.png gtFine/train/ulm/ulm_0_1_gtFine_labelTrainIds.png",
     ["ulm_0_1"]),
    ("\ufeffIMG 1\n\n  IMG 2 \n", ["IMG 1", "IMG 2"]),
    ("images\\im.3.JPG masks\\im.3.png\n# a comment\n", ["im.3"]),
    ("../../etc/passwd\n", ["passwd"])])
def test_lists_in_every_form_in_use(tmp_path, text, ids):
    (tmp_path / "list.txt").write_bytes(text.encode())
    assert read_list(tmp_path / "list.txt") == ids


def test_a_published_list_is_taken_for_the_labelled_ids(tmp_path):
    found = open_data("cityscapes", cityscapes(tmp_path / "data"))
    (tmp_path / "list.txt").write_text(
        "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png gtFine/train/ulm/x.png\r\n")
    labelled, unlabelled = split_ids(found, "cityscapes", str(tmp_path / "list.txt"))
    assert labelled == ["ulm_000001_000019"] and len(unlabelled) == 3


def test_shapes_are_the_same_every_time_and_differ_from_each_other():
    shapes = Shapes()
    assert len(shapes.train) == 256 and len(shapes.val) == 128
    first = np.array(shapes.image("train_007"))
    draw_shapes.cache_clear()
    assert (first == np.array(shapes.image("train_007"))).all()
    assert len({shapes.image(name).tobytes() for name in shapes.train + shapes.val}) == 384
    labels = np.concatenate([np.unique(shapes.mask(name)) for name in shapes.train])
    counts = np.bincount(labels)
    assert len(counts) == len(shapes.classes) >= 5 and counts.min() > 40


def test_photographs_of_voc_that_are_missing_are_counted(tmp_path):
    root = voc(tmp_path)
    for i in (2, 3, 7):
        (root / f"VOCdevkit/VOC2012/JPEGImages/2007_{i:06d}.jpg").unlink()
    found = open_data("voc", root)
    assert problems(found, found.train, [])[0].startswith("listed images are missing (3): 2007_000002, 20")


def test_a_folder_below_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(root):  # as Path.exists does
        raise PermissionError(13, "Permission denied", str(root / "ImageSets/Segmentation/train.txt"))

    monkeypatch.setattr(data, "open_voc", refuse)
    with pytest.raises(InputError) as error:
        open_data("voc", voc(tmp_path))
    assert str(error.value) == (f"{tmp_path}/ImageSets/Segmentation/train.txt: cannot be read (Permission "
                                f"denied); allow it: chmod -R u+rwX {tmp_path}/ImageSets/Segmentation")


@pytest.mark.parametrize("place", ["", "JPEGImages", "class_names.txt"])
def test_what_may_not_be_read_is_said_with_the_command_that_allows_it(tmp_path, monkeypatch, place):
    root, scandir, read = custom(tmp_path / "my data"), os.scandir, Path.read_text

    def refuse(path):  # the tests may run as root, who may read anything
        if Path(path) == root / place:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or scandir(path))
    monkeypatch.setattr(Path, "iterdir", lambda path: refuse(path) or map(path.joinpath, os.listdir(path)))
    monkeypatch.setattr(Path, "read_text", lambda path, *rest: refuse(path) or read(path, *rest))
    with pytest.raises(InputError, match="Permission denied") as error:
        open_data("custom", root)
    command = str(error.value).partition("allow it: ")[2]
    folder = root / place if place in ("", "JPEGImages") else root
    assert shlex.split(command) == ["chmod", "-R", "u+rwX", str(folder)]
    subprocess.run(shlex.split(command), check=True)


def test_photographs_that_may_not_be_read_are_a_problem(tmp_path, monkeypatch):
    data, opened = open_data("custom", custom(tmp_path)), open
    files = [data.images[name] for name in data.val]

    def refuse(path, *rest, **options):
        if Path(path) in files:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **options)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: path not in files)
    problem, = check_data(data, data.labelled, data.images.keys() - data.masks.keys()).problems
    assert f"(Permission denied) (and 1 more); allow it: chmod -R u+rwX {files[0].parent}" in problem


def test_the_report_of_a_good_and_a_bad_folder(tmp_path, capsys):
    root = custom(tmp_path)
    arguments = ["--dataset", "custom", "--data-root", str(root)]
    prepare.main(arguments)
    good = capsys.readouterr().out
    assert "10 images, 6 masks" in good and "road" in good and "50.00%" in good and "--split" not in good
    save(root / "SegmentationClass" / "im1.png", photograph())
    save(root / "SegmentationClass" / "im2.png", np.zeros((5, 5)))
    with pytest.raises(SystemExit) as end:
        prepare.main(arguments)
    bad = capsys.readouterr().err
    assert end.value.code == 2 and "im1.png: in colour" in bad and "im2.png: 5 x 5 pixels" in bad


def test_a_supervised_run_needs_no_unlabelled_image_that_its_list_names(tmp_path):
    root = custom(tmp_path)
    (root / "ImageSets/Segmentation/train.txt").write_text("im0\nim1\nim7\ngone\n")
    found = open_data("custom", root)
    assert problems(found, found.labelled, []) == []
    assert "listed images are missing (1): gone" in problems(found, found.labelled, ["gone", "im7"])[0]


def test_twins_are_equal_in_every_byte(tmp_path):
    root, pixels = custom(tmp_path), np.zeros((64, 64, 3))
    for first, expected in ((1, False), (0, True)):
        for name, value in (("im0", 0), ("im4", first)):  # im4 is for validation
            (root / f"JPEGImages/{name}.jpg").unlink(missing_ok=True)
            pixels[0] = value  # far from the middle of the file
            save(root / f"JPEGImages/{name}.bmp", pixels)
        found = open_data("custom", root)
        notes = check_data(found, found.labelled, [*{*found.train} - {*found.labelled}]).notes
        assert any("im4.bmp: a validation image" in note for note in notes) == expected
    found.val = found.train  # the same image in both lists is no twin
    assert "another name" not in str(check_data(found, found.labelled, []))


@pytest.mark.skipif(not CAMVID.exists(), reason="the CamVid folder is not beside this checkout")
def test_camvid_is_such_a_folder():
    found = open_data("custom", CAMVID)
    labelled, unlabelled = split_ids(found, "custom", "1_8")
    assert (len(labelled), len(unlabelled), len(found.val)) == (46, 321, 101)
    assert problems(found, labelled, unlabelled) == []
