"""Real archives from a server on this machine, and masks in colour as CVAT exports them."""

import contextlib
import errno
import functools
import hashlib
import http.server
import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

import check
import data
import prepare
import settings
import test_cases
import train
from test_cases import TINY, coloured, grey, indexed, left_and_right
from test_data import cityscapes, custom

TRAIN, VAL = ["both", "voc_only"], ["val_voc", "val_both"]
SBD = {"train": ["both", "sbd_1", "val_both"], "val": ["sbd_2"]}
BLENDED = ["both", "sbd_1", "sbd_2", "voc_only"]


def labels_of(name, source):
    """A (12, 16) map of VOC's classes, another for each id and source; VOC's has void in it."""
    seed = int.from_bytes(f"{source} {name}".encode(), "big")
    labels = np.random.default_rng(seed).integers(0, 21, (12, 16), dtype=np.uint8)
    labels[0] = 255 if source == "voc" else 0
    return labels


def index_png(labels, path):
    picture = Image.fromarray(labels)
    picture.putpalette(np.array(data.voc_palette(256), np.uint8).tobytes())
    picture.save(path)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """VOC's .tar and SBD's .tgz: the published layout, with six photographs."""
    scipy_io = pytest.importorskip("scipy.io", reason="SBD's masks are .mat files")
    tree = tmp_path_factory.mktemp("tree")
    voc, sbd = tree / "VOCdevkit" / "VOC2012", tree / "benchmark_RELEASE" / "dataset"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for folder in ("img", "cls"):
        (sbd / folder).mkdir(parents=True)
    for name in {*TRAIN, *VAL, *SBD["train"], *SBD["val"]}:
        Image.new("RGB", (16, 12), (90, 120, 30)).save(voc / "JPEGImages" / f"{name}.jpg")
    for name in TRAIN + VAL:
        index_png(labels_of(name, "voc"), voc / "SegmentationClass" / f"{name}.png")
    for part, names in {"train": TRAIN, "val": VAL, "trainval": TRAIN + VAL}.items():
        (voc / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
    for part, names in SBD.items():
        (sbd / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            shutil.copy(voc / "JPEGImages" / f"{name}.jpg", sbd / "img")
            scipy_io.savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {
                "Segmentation": labels_of(name, "sbd"), "Boundaries": np.zeros((20, 1), object),
                "CategoriesPresent": np.array([[1], [2]])}})
    packed = tmp_path_factory.mktemp("packed")
    with tarfile.open(packed / "voc.tar", "w") as tar:
        tar.add(tree / "VOCdevkit", "VOCdevkit")
    with tarfile.open(packed / "sbd.tgz", "w:gz") as tar:
        tar.add(tree / "benchmark_RELEASE", "benchmark_RELEASE")
    return packed


@pytest.fixture
def server(archives, tmp_path, monkeypatch):
    """Serves copies of the archives in `folder`; `requests` lists the paths it was asked for."""
    folder, requests = tmp_path / "served", []
    shutil.copytree(archives, folder)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as httpd:
        httpd.handle_error = lambda *args: None  # torchvision hangs up on its first request
        httpd.folder, httpd.requests = folder, requests
        httpd.address = f"http://127.0.0.1:{httpd.server_port}"
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        publish(folder, httpd.address, monkeypatch)
        monkeypatch.setitem(data.TRAINING_SETS, "voc", len(BLENDED))
        monkeypatch.setenv("no_proxy", "*")
        yield httpd
        httpd.shutdown()


def publish(folder, address, monkeypatch):
    """Let torchvision name `address`, and the checksums of what is in `folder` now."""
    def published(name):
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        return {"url": f"{address}/{name}", "filename": name, "md5": md5}
    monkeypatch.setitem(DATASET_YEAR_DICT, "2012", DATASET_YEAR_DICT["2012"] | published("voc.tar"))
    for key, value in published("sbd.tgz").items():
        monkeypatch.setattr(SBDataset, key, value)


def refused(root, *words):
    """download_voc(root) must raise one line of InputError with all of the words in it."""
    with pytest.raises(data.InputError) as caught:
        prepare.download_voc(root)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def check_prepared(root):
    """What every path must end in: the four masks, VOC's own first, and no unfinished thing."""
    voc = data.open_data("voc", root)
    assert voc.train == voc.labelled == BLENDED and voc.val == VAL
    made = data.stems(root / "VOCdevkit" / "VOC2012" / "SegmentationClassAug")
    assert sorted(made) == BLENDED
    for name, path in made.items():
        expected = labels_of(name, "voc" if name in TRAIN else "sbd")
        with Image.open(path) as picture:
            assert picture.mode == "P" and np.array_equal(picture, expected), name
            assert picture.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    assert check.check_data(voc, voc.train, [], supervised=True).problems == []
    assert data.open_data("voc_classic", root).labelled == TRAIN
    assert not list(root.rglob("*.part"))


def test_download_makes_the_blended_set(server, tmp_path, capsys):
    root = tmp_path / "data" / "voc"
    prepare.download_voc(root)
    check_prepared(root)
    assert "4 training ids" in capsys.readouterr().out
    assert set(server.requests) == {"/voc.tar", "/sbd.tgz"}


def test_a_second_run_fetches_and_writes_nothing(server, tmp_path):
    prepare.download_voc(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    server.requests.clear()
    prepare.download_voc(tmp_path)
    assert server.requests == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_archives_brought_by_hand_are_used(server, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(server.folder, root)
    prepare.download_voc(root)
    check_prepared(root)
    assert server.requests == []


@pytest.mark.parametrize("name", ["voc.tar", "voc.tar.part", "sbd.tgz", "sbd.tgz.part"])
def test_half_an_archive_is_fetched_again(server, tmp_path, name):
    whole = (server.folder / name.removesuffix(".part")).read_bytes()
    root = tmp_path / "data"
    root.mkdir()
    (root / name).write_bytes(whole[:len(whole) // 2])
    prepare.download_voc(root)
    check_prepared(root)


def stop_after(monkeypatch, owner, name, calls):
    """Let owner.name be interrupted in its call number `calls` + 1, as by Ctrl-C."""
    original, count = getattr(owner, name), iter(range(calls))

    def interrupted(*args, **kwargs):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return original(*args, **kwargs)
    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("calls", [0, 1, 5, 17])
def test_stopped_while_unpacking_it_goes_on(server, tmp_path, calls):
    root = tmp_path / "data"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, tarfile.TarFile, "makefile", calls)
        prepare.download_voc(root)
    with pytest.raises(data.InputError):
        data.open_data("voc", root)
    arrived = list(root.glob("*.t*"))
    server.requests.clear()
    prepare.download_voc(root)
    check_prepared(root)
    assert not {f"/{path.name}" for path in arrived} & set(server.requests)


@pytest.mark.parametrize("calls", range(len(BLENDED)))
def test_stopped_while_writing_a_mask_it_goes_on(server, tmp_path, calls):
    """Half of the PNG's bytes are on the disk when the interruption comes."""
    root = tmp_path / "data"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        save, count = Image.Image.save, iter(range(calls))

        def half_saved(picture, path, *args):
            save(picture, path, *args)
            if next(count, None) is None:
                path.write_bytes(path.read_bytes()[:80])
                raise KeyboardInterrupt
        patch.setattr(Image.Image, "save", half_saved)
        prepare.download_voc(root)
    with pytest.raises(data.InputError, match="SegmentationClassAug"):
        data.open_data("voc", root)
    written = {path: path.stat().st_mtime_ns
               for path in (root / "VOCdevkit/VOC2012/SegmentationClassAug.part").glob("*.png")}
    assert len(written) == calls
    server.requests.clear()
    prepare.download_voc(root)
    check_prepared(root)
    assert server.requests == []
    for path, before in written.items():
        assert (path.parents[1] / "SegmentationClassAug" / path.name).stat().st_mtime_ns == before


def test_the_users_own_voc_is_used_and_kept(server, tmp_path):
    """Nothing but SBD is fetched, and every file of the VOC 2012 that was there is as it was."""
    root = tmp_path / "data"
    with tarfile.open(server.folder / "voc.tar") as tar:
        tar.extractall(root)
    (root / "VOCdevkit" / "VOC2012" / "mine.txt").write_text("notes")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    prepare.download_voc(root / "VOCdevkit")
    check_prepared(root)
    assert set(server.requests) == {"/sbd.tgz"}
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("lost", ["ImageSets/Segmentation/val.txt", "SegmentationClass/both.png",
                                  "JPEGImages/sbd_1.jpg"])
def test_an_incomplete_voc_is_named_and_left_alone(server, tmp_path, lost):
    with tarfile.open(server.folder / "voc.tar") as tar:
        tar.extractall(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012" / lost).unlink()
    refused(tmp_path, "VOC2012: incomplete", lost, "run the same command again")
    assert (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/voc_only.png").exists()


def test_an_incomplete_set_of_masks_is_named_and_left_alone(server, tmp_path):
    prepare.download_voc(tmp_path)
    masks = tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug"
    (masks / "sbd_1.png").unlink()
    refused(tmp_path, masks, "3 training ids", "has 4")
    assert len(data.stems(masks)) == 3


def test_an_incomplete_set_as_unimatch_has_it_is_named(server, tmp_path):
    prepare.download_voc(tmp_path)
    masks = tmp_path / "VOCdevkit/VOC2012/SegmentationClass"
    for path in (masks.with_name("SegmentationClassAug")).iterdir():
        path.replace(masks / path.name)
    masks.with_name("SegmentationClassAug").rmdir()
    (masks / "sbd_1.png").unlink()
    refused(tmp_path, f"{masks.parent}: gives 3 training ids", "move that folder away")
    masks.parent.rename(tmp_path / "away")
    prepare.download_voc(tmp_path)
    check_prepared(tmp_path)


def test_another_count_is_refused_before_masks_are_made(server, tmp_path, monkeypatch):
    monkeypatch.setitem(data.TRAINING_SETS, "voc", 10582)
    refused(tmp_path, "benchmark_RELEASE", "4 training ids", "10582")
    assert not list(tmp_path.rglob("SegmentationClassAug*"))


def test_the_protocols_count():
    assert data.TRAINING_SETS == {"voc": 10582, "voc_classic": 1464, "cityscapes": 2975}


@pytest.mark.parametrize("name", ["voc.tar", "sbd.tgz"])
@pytest.mark.parametrize("damage", ["other bytes", "truncated there", "truncated on the way"])
def test_what_fails_its_checksum_is_not_used(server, tmp_path, name, damage, monkeypatch):
    file, root = server.folder / name, tmp_path / "data"
    whole = file.read_bytes()
    if damage == "other bytes":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "truncated there":
        file.write_bytes(whole[:len(whole) // 2])
    else:
        monkeypatch.setattr(
            http.server.SimpleHTTPRequestHandler, "copyfile", lambda self, source, out:
            out.write(source.read()[:len(whole) // 2 if self.path[1:] == name else None]))
    refused(root, root / name, f"{server.address}/{name}", "run the same command again", "md5")
    assert not (root / name).exists()
    with pytest.raises(data.InputError):
        data.open_data("voc", root)
    monkeypatch.undo()
    file.write_bytes(whole)
    publish(server.folder, server.address, monkeypatch)
    monkeypatch.setitem(data.TRAINING_SETS, "voc", len(BLENDED))
    prepare.download_voc(root)
    check_prepared(root)


@pytest.mark.parametrize("name", ["voc.tar", "sbd.tgz"])
def test_a_truncated_archive_that_its_checksum_lets_pass(server, tmp_path, monkeypatch, name):
    file = server.folder / name
    file.write_bytes(file.read_bytes()[:-5000 if name == "voc.tar" else -500])
    if name == "voc.tar":  # cut inside the last member that has a body
        with tarfile.open(file) as tar:
            last = [entry for entry in tar if entry.size][-1]
        file.write_bytes(file.read_bytes()[:last.offset_data + 1])
    publish(server.folder, server.address, monkeypatch)
    root = tmp_path / "data"
    refused(root, root / name, "cannot be unpacked", "run the same command again")
    with pytest.raises(data.InputError):
        data.open_data("voc", root)


@pytest.mark.parametrize("name", ["voc.tar", "sbd.tgz"])
def test_a_file_that_the_server_has_not(server, tmp_path, name):
    (server.folder / name).unlink()
    refused(tmp_path / "data", f"{server.address}/{name}: cannot be fetched", "404",
            f"copy the file from elsewhere to {tmp_path / 'data' / name}")


def test_no_network(server, tmp_path, monkeypatch):
    with socket.socket() as closed:  # bound, and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        publish(server.folder, address, monkeypatch)
        refused(tmp_path / "data", f"{address}/voc.tar: cannot be fetched", "refused")


def test_a_full_disk_is_said(server, tmp_path):
    (tmp_path / "voc.tar.part").symlink_to("/dev/full")
    code, _, err = report("--dataset", "voc", "--data-root", tmp_path, "--download")
    assert code == 2 and "No space left on device; make room, or allow it, and run the same command" in err
    (tmp_path / "voc.tar.part").unlink()
    assert report("--dataset", "voc", "--data-root", tmp_path, "--download")[0] == 0


def test_a_server_that_says_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        publish(server.folder, address, monkeypatch)
        hang_up = threading.Timer(2, silent.shutdown, [socket.SHUT_RDWR])  # should nobody time out
        hang_up.start()
        refused(tmp_path / "data", f"{address}/voc.tar: cannot be fetched", "timed out")
        hang_up.cancel()
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("lost", ["ImageSets/Segmentation/val.txt", "SegmentationClass/both.png",
                                  "SegmentationClassAug/sbd_1.png", "cls/sbd_1.mat", "dataset/train.txt"])
def test_what_is_incomplete_is_moved_away_and_the_same_command_works(server, tmp_path, lost):
    root = tmp_path / "data"
    command = ["--dataset", "voc", "--data-root", root, "--download"]
    assert report(*command)[0] == 0
    if "Aug" not in lost:
        shutil.rmtree(root / "VOCdevkit/VOC2012/SegmentationClassAug")
    next(root.rglob(lost)).unlink()
    code, _, err = report(*command)
    assert code == 2 and re.search("move (it|that folder) away, and run the same command again$", err.strip())
    Path(re.search("prepare.py: (.*?): ", err)[1]).rename(tmp_path / "away")
    code, _, err = report(*command)
    assert code == 0, err
    check_prepared(root)


@pytest.mark.parametrize("dataset", ["voc", "voc_classic"])
@pytest.mark.parametrize("there", ["nothing", "an empty folder", "VOC alone"])
def test_a_download_that_a_line_proposes_is_pasted(server, tmp_path, dataset, there):
    root = tmp_path / "my data"
    if there != "nothing":
        root.mkdir()
    if there == "VOC alone":
        with tarfile.open(server.folder / "voc.tar") as tar:
            tar.extractall(root)
    with pytest.raises(data.InputError) as error:
        data.open_data(dataset, root)
    command = shlex.split(re.search("python .*$", str(error.value))[0])
    assert command[:2] == ["python", "prepare.py"] and report(*command[2:])[0] == 0
    check_prepared(root)


def test_an_archive_is_copied_or_removed_as_the_line_says(server, tmp_path, monkeypatch):
    served, whole = server.folder / "sbd.tgz", (server.folder / "sbd.tgz").read_bytes()
    served.unlink()
    refused(tmp_path / "a", f"copy the file from elsewhere to {tmp_path / 'a/sbd.tgz'}")
    (tmp_path / "a/sbd.tgz").write_bytes(whole)
    prepare.download_voc(tmp_path / "a")
    check_prepared(tmp_path / "a")
    served.write_bytes(whole[:-500])
    publish(server.folder, server.address, monkeypatch)
    refused(tmp_path / "b", tmp_path / "b/sbd.tgz", "or remove it if damaged, and run the same command again")
    served.write_bytes(whole)
    publish(server.folder, server.address, monkeypatch)
    (tmp_path / "b/sbd.tgz").unlink()
    prepare.download_voc(tmp_path / "b")
    check_prepared(tmp_path / "b")


def test_without_scipy_nothing_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    refused(tmp_path / "data", "--download", "pip install scipy")
    assert server.requests == [] and not (tmp_path / "data").exists()


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this tarfile has no filters")
@pytest.mark.parametrize("path", ["../../../outside.txt", "VOCdevkit/../../../../outside.txt",
                                  "link/outside.txt"])
def test_an_archive_cannot_write_outside_its_folder(server, tmp_path, monkeypatch, path):
    with tarfile.open(server.folder / "voc.tar", "a") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        for entry in [link, tarfile.TarInfo(path)][path[0] != "l":]:
            tar.addfile(entry, io.BytesIO())
    publish(server.folder, server.address, monkeypatch)
    refused(tmp_path / "data", "cannot be unpacked (", "link" if "link" in path else "outside")
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_mat_file_that_holds_something_else(server, tmp_path):
    with tarfile.open(server.folder / "sbd.tgz") as tar:
        tar.extractall(tmp_path)
    mat = tmp_path / "benchmark_RELEASE/dataset/cls/sbd_1.mat"
    sys.modules["scipy.io"].savemat(mat, {"GTcls": {"Segmentation": np.full((2, 2), 77, np.uint8)}})
    refused(tmp_path, mat, "21 classes")
    mat.write_bytes(b"no mat file")
    refused(tmp_path, mat, "cannot be read")
    mat.unlink()
    refused(tmp_path, "cls/sbd_1.mat", "incomplete")


# -- CVAT --

LABEL_MAP = """# label:color_rgb:parts:actions
background:0,0,0::
road: main:128,64,128::
car:0,0,142:wheel,door:drive
"""
COLOURS = np.array([(0, 0, 0), (128, 64, 128), (0, 0, 142)], np.uint8)
IDS = np.array([[0, 1, 2, 2], [1, 0, 0, 1]], np.uint8)


def cvat_export(root, label_map=LABEL_MAP, colours=COLOURS):
    """Masks a: RGB, b: RGBA, c: a palette in another order; and a photograph d without a mask."""
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (root / folder).mkdir(parents=True)
    (root / "labelmap.txt").write_text(label_map)
    rgb = Image.fromarray(colours[IDS])
    palette = Image.fromarray(len(colours) - 1 - IDS)
    palette.putpalette(colours[::-1].tobytes())
    for name, mask in {"a": rgb, "b": rgb.convert("RGBA"), "c": palette}.items():
        mask.save(root / "SegmentationClass" / f"{name}.png")
    for name in "abcd":
        Image.new("RGB", (4, 2)).save(root / "JPEGImages" / f"{name}.jpg")
    return root


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def refused_label_map(root, *words):
    """Writing or reading the label map must raise one line of InputError with all of the words in it."""
    with pytest.raises(data.InputError) as caught:
        prepare.write_label_map(root)
        data.open_data("custom", root)
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value)


def labels(root, name="a"):
    return np.array(data.open_data("custom", root).mask(name))


def test_colours_are_read_as_ids(tmp_path):
    root = cvat_export(tmp_path / "cvat")
    before = contents(root)
    prepare.write_label_map(root)  # which is there
    custom = data.open_data("custom", root)
    assert custom.classes == ["background", "road: main", "car"]
    assert custom.palette == [tuple(colour) for colour in COLOURS.tolist()]
    assert sorted(custom.labelled + custom.val) == ["a", "b", "c"] and "d" in custom.train
    assert all(np.array_equal(custom.mask(name), IDS) for name in "abc")
    assert check.check_data(custom, custom.labelled, ["d"]).problems == []
    (root / "class_names.txt").write_bytes(b"car\r\nroad: main\r\nbackground")  # whose order counts
    assert np.array_equal(labels(root), 2 - IDS) and contents(root).keys() - before.keys() == {
        root / "class_names.txt"}


@pytest.mark.parametrize("label_map, black", [
    ("car:0,0,142\nroad:128,64,128\n", 255),  # no background: black is nothing
    ("car:0,0,142::\nbackground:0,0,0::\nroad:128,64,128::\n", 1),
    ("car:0,0,142::\nroad:128,64,128::\nasphalt:0,0,0::\n", 2)])
def test_what_black_is(tmp_path, label_map, black):
    found = labels(cvat_export(tmp_path, label_map))
    assert (found[IDS == 0] == black).all() and (found[IDS == 2] == 0).all()


def test_colours_that_the_label_map_lacks_are_named(tmp_path):
    root = cvat_export(tmp_path)
    pixels = COLOURS[IDS]
    pixels[1, 1], pixels[0, 0] = (1, 2, 3), (255, 254, 253)
    Image.fromarray(pixels).save(root / "SegmentationClass" / "b.png")
    custom = data.open_data("custom", root)
    problem, = check.check_data(custom, custom.labelled, ["d"]).problems
    assert problem.startswith(f"{root}/SegmentationClass/b.png: holds colours that labelmap.txt lacks: ")
    assert "(1,2,3), (255,254,253); add a line for each there" in problem
    (root / "labelmap.txt").write_text("background:9,9,9::\nroad:128,64,128::\ncar:0,0,142::\n")
    custom = data.open_data("custom", root)
    assert "lacks: (0,0,0)" in check.check_data(custom, custom.labelled, ["d"]).problems[0]


@pytest.mark.parametrize("label_map", [
    "", "# label:color_rgb:parts:actions\n", "car;0,0,142\n", "car:::\n", "car:0,0,256::\n",
    "car:0,0,1::\nroad:0,0,1::\n", "".join(f"c{i}:0,1,{i}::\n" for i in range(256))])
def test_a_label_map_that_cannot_be_used(tmp_path, label_map):
    refused_label_map(cvat_export(tmp_path, label_map), tmp_path / "labelmap.txt", "not 1 to 255 lines of")


def test_class_names_and_label_map_must_agree(tmp_path):
    root = cvat_export(tmp_path)
    (root / "class_names.txt").write_text("car\nroad: main\n")
    refused_label_map(root, root / "class_names.txt", "lacks background, which", "labelmap.txt")
    (root / "class_names.txt").unlink()  # as it says
    assert np.array_equal(labels(root), IDS)


def test_what_is_no_export(tmp_path):
    refused_label_map(tmp_path, tmp_path, "no masks in SegmentationClassPNG/, SegmentationClass/, ")
    root = cvat_export(tmp_path / "cvat")
    (root / "labelmap.txt").unlink()
    (root / "SegmentationClass" / "a.png").write_bytes(b"no image")
    refused_label_map(root, root / "SegmentationClass" / "a.png", "cannot be read")


def proposal(root, mask, names, more=lambda root: None):
    """{colour: label} of the label map that is written for such masks, and all that is said."""
    test_cases.folder(mask, names="".join(f"{name}\n" for name in names))(root)
    more(root)
    _, out, err = report("--dataset", "custom", "--data-root", root, "--colours")
    lines = [line.split(":") for line in (root / "labelmap.txt").read_text().splitlines() if line[0] != "#"]
    return {colour: label for label, colour, *_ in lines}, out + err


LAST_IS_VOID = {f"{k},{k},{k}": name for k, name in enumerate("abcde")} | {"5,5,5": "ignore"}


@pytest.mark.parametrize("mask, names, expected", [
    (lambda labels: labels * 0 + np.arange(48, dtype=np.uint8) // 8, "abcde", LAST_IS_VOID),
    (lambda labels: labels * 0 + np.array([0, 1, 2, 3, 4, 255], np.uint8)[np.arange(48) // 8], "abcde",
     {name: label for name, label in LAST_IS_VOID.items() if label != "ignore"} | {"255,255,255": "ignore"}),
    (lambda labels: labels * 0 + 1 + np.arange(48, dtype=np.uint8) // 12, "abcd",  # 1 to 4: of which names?
     dict.fromkeys(["1,1,1", "2,2,2", "3,3,3", "4,4,4"], "?")),
    (left_and_right, "abc", {"0,0,0": "a", "128,128,128": "?", "255,255,255": "?"}),
    (coloured((0, 0, 0), (128, 0, 0)), "ab", {"0,0,0": "?", "128,0,0": "?"}),
    (coloured((0, 0, 0), (1, 1, 1)), "ab", {"0,0,0": "a", "1,1,1": "b"}),
    (indexed((9, 0, 0), (0, 0, 9)), "ab", {"9,0,0": "a", "0,0,9": "b"}),
    (indexed((9, 0, 0), (0, 0, 0)), "ab", {"9,0,0": "?", "0,0,0": "?"}),  # in an order of a program's
    (grey(0, 7), "ab", {"0,0,0": "a", "7,7,7": "?"}),
    (lambda labels: np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8) * 3, "ab", None)])
def test_what_is_not_known_of_a_colour_is_asked(tmp_path, mask, names, expected):
    proposed, said = proposal(tmp_path, mask, names)
    if expected is None:  # shades without end: the two most frequent are asked for
        assert sorted(proposed.values()) == ["?"] * 2 + ["ignore"] * (len(proposed) - 2)
        assert f"colours of {tmp_path}/masks, {len(proposed) - 2} of them as ignore; put the name" in said
    else:
        assert proposed == expected
    again = report("--dataset", "custom", "--data-root", tmp_path, "--colours")[2]
    assert ("still has ? for a name" in again) == ("?" in proposed.values()) == ("in place of each ?" in said)


def test_an_id_of_two_colours_says_of_neither_which_class_it_is(tmp_path):
    mask, other = (indexed((0, 0, 0), colour) for colour in ((9, 0, 0), (0, 9, 0)))
    proposed, _ = proposal(tmp_path, mask, "ab", test_cases.folder(other, masked=3, names="a\nb\n"))
    assert proposed == {"0,0,0": "a", "9,0,0": "?", "0,9,0": "?"}


@pytest.mark.parametrize("last, said", [(65535, "ignore:255,255,255"), (300, "not a whole number"),
                                        (257 * 300, "not a whole number")])
def test_grey_values_of_more_than_8_bits(tmp_path, last, said):
    test_cases.folder(masked=0)(tmp_path)
    (tmp_path / "masks").mkdir()
    for i in range(6):
        labels = np.where(np.arange(48) < 9, last, test_cases.scene(i)[1].astype(int))
        np.save(tmp_path / f"masks/p0{i}.npy", labels)
    _, out, err = report("--dataset", "custom", "--data-root", tmp_path, "--colours")
    map_file = tmp_path / "labelmap.txt"
    assert said in out + err + (map_file.read_text() if map_file.exists() else "")


def both_orders(root):
    for i in range(3):
        Image.fromarray(np.uint8(1 - test_cases.scene(i)[1])).convert("P").save(root / f"masks/p0{i}.png")
        picture = Image.open(root / f"masks/p0{i}.png")
        picture.putpalette([255] * 3 + [0] * 3)
        picture.save(root / f"masks/p0{i}.png")


@pytest.mark.parametrize("mask, black, more", [
    (grey(0, 255), "ab", None), (test_cases.one_bit, "ab", None),
    (coloured((0, 0, 0), (255, 255, 255)), "ab", None), (grey(255, 0), "ab", None),
    (indexed((255, 255, 255), (0, 0, 0)), "ba", None),
    (indexed((0, 0, 0), (255, 255, 255)), "ab", both_orders)],
    ids=["grey", "one bit", "RGB", "black is the smaller", "black has the index 1", "both orders"])
def test_black_and_white_are_said_with_how_to_swap_them(tmp_path, mask, black, more):
    proposed, said = proposal(tmp_path, mask, "ab", more or (lambda root: None))
    assert proposed == {"0,0,0": black[0], "255,255,255": black[1]}
    assert f"(0,0,0)       is {black[0]}, " in said and f"(255,255,255) is {black[1]}, " in said
    assert f"if it is the other way round, swap the two names in {tmp_path / 'labelmap.txt'}" in said
    assert "nothing wrong; next: " in said
    before = labels(tmp_path, "p04")
    text = (tmp_path / "labelmap.txt").read_text()
    swapped = re.sub("^[ab]:", lambda name: {"a:": "b:", "b:": "a:"}[name[0]], text, flags=re.MULTILINE)
    (tmp_path / "labelmap.txt").write_text(swapped)
    assert np.array_equal(labels(tmp_path, "p04"), 1 - before)


def test_a_data_root_that_cannot_be_written(tmp_path, monkeypatch):
    """The label map is written into a folder of links, by the command that is said."""
    root, here = tmp_path / "my data", tmp_path / "here"
    test_cases.folder(grey(0, 255))(root)
    here.mkdir()
    write, before = prepare.Path.write_text, contents(root)

    def read_only(path, *rest):
        if path.parent == root:
            raise OSError(errno.EROFS, "Read-only file system")
        return write(path, *rest)

    monkeypatch.setattr(prepare.Path, "write_text", read_only)
    monkeypatch.chdir(here)
    code, _, err = report("--dataset", "custom", "--data-root", root, "--colours")
    assert code == 2 and f"{root / 'labelmap.txt'}: cannot be written (Read-only file system)" in err
    links, python = err.split("work in a folder of links: ")[1].split(" && python ")
    subprocess.run(links, shell=True, check=True)
    code, out, _ = report(*shlex.split(python)[1:])
    assert code == 0 and "nothing wrong" in out and contents(root) == before
    assert np.array_equal(labels(here / "my data-links", "p04"), test_cases.scene(4)[1])


def test_masks_in_test_are_read_by_their_colours_too(tmp_path):
    for part, name in (("train", "p{:02d}"), ("test", "t{:02d}")):
        test_cases.folder(coloured((0, 0, 0), (200, 0, 0)), images=f"images/{part}", masks=f"masks/{part}",
                          image=f"{name}.jpg", name=f"{name}.png")(tmp_path)
    (tmp_path / "labelmap.txt").write_text("thing:200,0,0\nbackground:0,0,0\n")
    assert np.array_equal(labels(tmp_path, "t01"), test_cases.scene(1)[1])
    said = report("--dataset", "custom", "--data-root", tmp_path)[1]
    assert "(one of 12): a photograph in test/ or on test.txt, which is not trained on" in said


def test_masks_that_an_earlier_version_made(tmp_path):
    root = cvat_export(tmp_path)
    for name in "abc":
        data_mask = Image.fromarray(IDS)
        (root / "SegmentationClassIds").mkdir(exist_ok=True)
        data_mask.save(root / "SegmentationClassIds" / f"{name}.png")
    said = report("--dataset", "custom", "--data-root", root)[1]
    assert "(one of 3): not read, as " in said
    (root / "labelmap.txt").unlink()
    (root / "class_names.txt").write_text("background\nroad\ncar\n")
    assert data.open_data("custom", root).folders[1].name == "SegmentationClassIds"
    Image.fromarray(COLOURS[IDS]).save(root / "SegmentationClass" / "d.png")
    said = report("--dataset", "custom", "--data-root", root)[1]
    assert "d.png: not read; if they are masks, move them into" in said
    (root / "SegmentationClass/d.png").rename(root / "SegmentationClassIds/d.png")  # as it says
    assert "d.png: in colour" in report("--dataset", "custom", "--data-root", root)[2]


# -- The check, of every data set --

def report(*arguments):
    """(exit code, what prepare.py prints, and prints as errors)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            prepare.main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def test_a_folder_without_a_data_set_is_refused(tmp_path, capsys):
    code, _, err = report("--data-root", tmp_path)
    assert code == 2 and "shapes is drawn, not read; give --dataset custom" in err
    with pytest.raises(SystemExit):
        train.main(["--data-root", str(tmp_path), "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err.removeprefix("train.py") == err.removeprefix("prepare.py")


@pytest.mark.parametrize("dataset, split", [("shapes", None), ("shapes", "full"), ("cityscapes", None)])
def test_the_check_takes_trains_split_and_refuses_what_train_refuses(tmp_path, capsys, dataset, split):
    options = ["--dataset", dataset]
    if dataset == "cityscapes":  # whose default split is a part of all 2,975 images
        options += ["--data-root", str(cityscapes(tmp_path / "data"))]
    options += ["--split", split] if split else []
    code, out, err = report(*options)
    if dataset == "shapes" and not split:
        assert code == 0 and "as given          16 labelled    240 unlabelled" in out
        return
    assert code == 2
    with pytest.raises(SystemExit):
        train.main([*options, "--small", "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err.removeprefix("train.py: ") == err.removeprefix("prepare.py: ")


def test_a_flat_cityscapes_folder_is_read(tmp_path):
    root = cityscapes(tmp_path)
    for path in [*root.glob("*/*/*/*.png")]:
        path.rename(path.parents[1] / path.name)
    found = data.open_data("cityscapes", root)
    assert len(found.train) == 4 and len(found.masks) == 6
    assert check.check_data(found, found.train, [], supervised=True).problems == []
    found.val = []
    assert "complete the data set, with leftImg8bit/" in check.check_data(found, found.train, []).problems[0]


@pytest.mark.parametrize("mask, said", [
    (np.full((12, 16), 300, np.uint16), "holds the ids 300, but there are 19 classes"),
    (np.ones((12, 16), bool), "of one bit")])
def test_cityscapes_masks_of_other_depths_get_a_line(tmp_path, mask, said):
    root = cityscapes(tmp_path)
    spoiled = next(root.glob("gtFine/train/ulm/*.png"))
    Image.fromarray(mask).save(spoiled)
    found = data.open_data("cityscapes", root)
    line, = check.check_data(found, found.train, [], supervised=True).problems
    assert line.startswith(f"{spoiled}: {said}") and line.endswith("; replace the mask")


def test_large_photographs_are_shrunk_by_the_command_that_is_proposed(tmp_path, monkeypatch):
    root = custom(tmp_path / "a b")
    monkeypatch.setitem(settings.PROTOCOLS, "custom", {"crop_size": 5})
    monkeypatch.setattr(prepare.torch.cuda, "is_available", lambda: True)
    assert report("--dataset", "custom", "--data-root", root, "--split", "1_2")[1].endswith(
        f"next: python train.py --dataset custom --data-root '{root}' --split 1_2 --image-size 10\n")
    monkeypatch.setitem(settings.PROTOCOLS, "custom", {"crop_size": 6})
    assert "--image-size" not in report("--dataset", "custom", "--data-root", root)[1]


def test_a_class_that_no_mask_holds_is_said_as_training_starts(tmp_path, capsys):
    root = custom(tmp_path, classes="sky\nroad\nunicorn\n")
    train.main(["--dataset", "custom", "--data-root", str(root), *TINY, "--out", str(tmp_path / "run")])
    assert "no labelled mask holds unicorn, which will not be learnt\n" in capsys.readouterr().out


@pytest.mark.parametrize("mask, name, said", [
    (lambda labels: np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8), "p{:02d}.png",
     "p00.png: more than 256 colours, .*; export the masks again without that, and run the same command"),
    (grey(0, 255), "p{:02d}.jpg", "no masks in .*PNGs")], ids=["noise", "JPEG"])
def test_masks_of_which_no_label_map_can_be_made_are_exported_again(tmp_path, mask, name, said):
    command = ["--dataset", "custom", "--data-root", tmp_path, "--colours"]
    test_cases.folder(mask, name=name)(tmp_path)
    code, _, err = report(*command)
    assert code == 2 and re.search(said, err), err
    test_cases.export_again(tmp_path, err)
    code, out, err = report(*command)
    assert code == 0 and "nothing wrong; next: " in out, err


def test_cityscapes_is_completed_as_the_lines_say(tmp_path):
    whole, root = cityscapes(tmp_path / "whole"), tmp_path / "data"
    (tmp_path / "list.txt").write_text("ulm_000000_000019\nulm_000001_000019\n")
    flags = ["--dataset", "cityscapes", "--data-root", root]
    for part, said in (("leftImg8bit/train", "no folder gtFine/ in it; unpack gtFine_trainvaltest.zip there"),
                       ("gtFine/train", "with leftImg8bit/val/ and gtFine/val/"),
                       ("leftImg8bit/val", "have no mask (2): bonn_000000_000019, bonn_000001_000019; add"),
                       ("gtFine/val", "nothing wrong; next: ")):
        shutil.copytree(whole / part, root / part)
        assert said in "".join(report(*flags, "--split", tmp_path / "list.txt")[1:])
    code, _, err = report(*flags)
    assert code == 2 and err.endswith("but 4 are here; complete them, or give a list of ids\n")
