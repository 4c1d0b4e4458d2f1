"""Prediction of any photographs."""

import csv
import itertools
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import ranks
from batches import normalize
from data import InputError
from hardness import instance_hardness
from predict import overlay, photograph_hardness, predict_files
from test_evaluate import STATE, Brightness, Corner, add_lists, checkpoint


def test_predict_files_writes_maps_at_the_photographs_own_upright_size(tmp_path, capsys):
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    tall = Image.new("RGB", (20, 30), "white")
    tall.paste("black", (0, 0, 20, 15))
    tall.transpose(Image.Transpose.ROTATE_90).save(inputs / "phone.jpg", exif=orientation(6), quality=95)
    tall.save(inputs / "plain.png")
    (inputs / "broken.jpg").write_bytes((inputs / "phone.jpg").read_bytes()[:300])
    (inputs / "notes.txt").write_text("not a photograph")
    (inputs / "._plain.png").write_bytes(b"a hidden file")
    (inputs / "new.HEIC").write_bytes(b"\0\0\0\x24ftypheic" + bytes(300))
    assert predict_files(Brightness(), STATE, [inputs], out, torch.device("cpu")) == 2
    captured = capsys.readouterr()
    assert "broken.jpg" in captured.err
    assert f"photographs predicted: 2, skipped: 2; written to {out}:\n  STEM.png " in captured.out
    assert "new.HEIC: cannot be read (HEIC or AVIF); convert it to JPEG" in captured.err
    for name in ("phone", "plain"):
        labels = Image.open(out / f"{name}.png")
        assert labels.mode == "P" and labels.size == (20, 30)
        assert np.array(labels)[:14].max() == 0 and np.array(labels)[17:].min() == 1
        overlaid = np.array(Image.open(out / f"{name}_overlay.png"))
        assert overlaid.shape == (6 * 30 + 2 * 24, 6 * 20, 3)  # a legend of two lines is below
        # Class 0 is black, and so has no tint; class 1 is red.
        assert overlaid[6 * 5, 60].max() < 15
        assert abs(overlaid[6 * 25, 60] - np.array([255.0, 127, 127])).max() < 15
    assert {file.name for file in out.iterdir()} == {
        "phone.png", "phone_overlay.png", "plain.png", "plain_overlay.png", "areas.csv"}
    for name in ("STEM.png", "STEM_overlay.png", "areas.csv"):
        assert f"\n  {name} " in captured.out
    assert "hardness.csv" not in captured.out


def test_areas_are_the_shares_of_the_classes(tmp_path):
    for name, white in (("a, b", 0), ("half", 6), ("quarter", 3)):
        image = Image.new("RGB", (12, 10))
        image.paste("white", (0, 0, white, 10))
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    predict_files(Brightness(), STATE, [tmp_path], tmp_path / "out", torch.device("cpu"))
    with open(tmp_path / "out" / "areas.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "dark", "bright"]
    assert rows == [[str(tmp_path / "a, b.png"), "1.000000", "0.000000"],
                    [str(tmp_path / "half.png"), "0.500000", "0.500000"],
                    [str(tmp_path / "quarter.png"), "0.750000", "0.250000"]]


@pytest.mark.parametrize("name, colour, tinted", [
    ("background", (9, 9, 200), False), ("_background_", (9, 9, 200), False), ("sky", (0, 0, 0), False),
    ("sky", (9, 9, 200), True)])
def test_what_lies_behind_the_objects_has_no_tint(name, colour, tinted):
    image = torch.full((3, 300, 400), 101, dtype=torch.uint8)
    labels = torch.zeros(300, 400, dtype=torch.uint8)
    labels[:, 200:] = 1
    picture = np.array(overlay(image, labels, [0.5, 0.5, 0.0], [name, "dog", "absent" * 50],
                               [colour, (255, 0, 0), (0, 255, 0)]))
    assert picture.shape == (300 + 24, 400, 3)
    assert (picture[:300, 200:] == [178, 50, 50]).all()
    assert (picture[:300, :200] == ([55, 55, 150] if tinted else [101] * 3)).all()
    assert picture[-10, 1].tolist() == (list(colour) if tinted else [255] * 3)  # the legend's square


def test_a_large_photograph_has_a_mask_of_its_size_and_a_picture_to_look_at(tmp_path):
    Image.new("RGB", (2600, 1300), "white").save(tmp_path / "large.png")
    predict_files(Brightness(), STATE, [tmp_path / "large.png"], tmp_path / "out", torch.device("cpu"))
    assert Image.open(tmp_path / "out" / "large.png").size == (2600, 1300)
    assert Image.open(tmp_path / "out" / "large_overlay.png").size == (1024, 512 + 24)


def test_the_prediction_of_photographs_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    ticks = itertools.count(0, 3)  # seconds, at each look at the clock
    monkeypatch.setattr(ranks.time, "monotonic", lambda: next(ticks))
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    predict_files(Brightness(), STATE, [tmp_path], tmp_path / "out", torch.device("cpu"))
    assert capsys.readouterr().out.startswith("1 of 3 photographs, 0:00:12 left\nphotographs predicted: 3")


def test_the_help_names_the_files_that_are_written(capsys):
    with pytest.raises(SystemExit):
        predict.main(["--help"])
    said = capsys.readouterr().out
    for name in ("STEM.png", "STEM_overlay.png", "areas.csv", "hardness.csv"):
        assert f"\n  {name} " in said
    assert max(map(len, said.splitlines())) <= 110


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_predict_files_never_overwrites_a_photograph_or_another_result(tmp_path, capsys):
    device = torch.device("cpu")
    (tmp_path / "a").mkdir()
    one, two = tmp_path / "x.png", tmp_path / "a" / "x.png"
    Image.new("RGB", (8, 8)).save(one)
    Image.new("RGB", (8, 8), "white").save(two)
    before = one.read_bytes()
    assert predict_files(Brightness(), STATE, [one], tmp_path, device) == 1
    assert one.read_bytes() == before
    remedy = "x_overlay.png; predict it, or its folder, by itself, with another --out"
    assert re.search(f"x.png: its results would overwrite .*{remedy}", capsys.readouterr().err)
    assert predict_files(Brightness(), STATE, [one], tmp_path / "alone", device) == 0
    assert predict_files(Brightness(), STATE, [one, two], tmp_path / "out", device) == 1
    assert f"{two}: its results would overwrite {tmp_path / 'out' / 'x.png'} or " in capsys.readouterr().err
    assert predict_files(Brightness(), STATE, [two], tmp_path / "other", device) == 0
    for folder, label in (("out", 0), ("other", 1)):
        assert (np.array(Image.open(tmp_path / folder / "x.png")) == label).all()
    # An earlier result may be written again; what somebody drew by hand is no result.
    assert predict_files(Brightness(), STATE, [one], tmp_path / "out", device) == 0
    with pytest.raises(InputError, match=f"has results of other photographs, {one}, which would be"):
        predict_files(Brightness(), STATE, [two], tmp_path / "out", device)
    (tmp_path / "out" / "areas.csv").unlink()
    (tmp_path / "out" / "x_overlay.png").unlink()
    before = (tmp_path / "out" / "x.png").read_bytes()
    assert predict_files(Brightness(), STATE, [two], tmp_path / "out", device) == 1
    assert (tmp_path / "out" / "x.png").read_bytes() == before
    assert f"would overwrite {tmp_path / 'out' / 'x.png'} or " in capsys.readouterr().err


def test_hidden_files_and_folders_are_left_out_and_no_file_is_taken_twice(tmp_path, capsys):
    (tmp_path / ".thumbnails.jpg").mkdir()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "._x.jpg").write_bytes(b"as macOS leaves it on other disks")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.JPG")
    paths = [tmp_path, tmp_path / "x.JPG"]
    assert predict_files(Brightness(), STATE, paths, tmp_path / "out", torch.device("cpu")) == 0
    assert "photographs predicted: 1, skipped: 0" in capsys.readouterr().out


def test_photographs_in_subfolders_are_found_as_training_finds_them(tmp_path, capsys):
    for name in ("train/x.jpg", "test/more/y.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    assert predict_files(Brightness(), STATE, [tmp_path / "in"], tmp_path / "out", torch.device("cpu")) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "x.png", "x_overlay.png", "y.png", "y_overlay.png", "areas.csv"}


@pytest.mark.parametrize("paths, out, message", [
    (["x.png"], "x.png/sub", "sub: cannot be written (Not a directory); give another --out"),
    (["x.png", "empty"], "out", "empty: no photograph in it; what is read is .bmp .j"),
    (["x.png", "absent"], "out", "absent: no such file or folder")])
def test_what_cannot_be_predicted_gets_one_line(tmp_path, capsys, paths, out, message):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    argv = [checkpoint(tmp_path / "best.pth"), *(tmp_path / path for path in paths), "--out", tmp_path / out]
    with pytest.raises(SystemExit) as end:
        predict.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_not_the_photographs_fault(tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x_overlay.png").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end:
        predict.main([str(a) for a in (checkpoint(tmp_path / "best.pth"), tmp_path / "x.jpg", "--out",
                                       tmp_path / "out")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "(No space left on device); give another --out" in error
    assert "x.jpg" not in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("ignore_background", [False, True])
def test_the_hardness_of_a_photograph_is_eq_7(ignore_background):
    image = (torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    state = STATE | {"classes": ["a", "b", "c"]}
    state["settings"] = STATE["settings"] | {"ignore_background": ignore_background}
    student, teacher = Corner(), lambda images: 0.8 * Corner()(images).flip(1)
    teacher.parameters = lambda: iter(())
    gamma, rho_s, rho_t = photograph_hardness(student, teacher, image, state)
    prob_s, prob_t = (network(normalize(image[None])).softmax(1) for network in (student, teacher))
    expected = instance_hardness(prob_t, prob_s, 0.6, ignore_class=0 if ignore_background else None)
    assert gamma == pytest.approx(expected.item()) and 0 < gamma < 1
    assert rho_s == pytest.approx((prob_s.amax(1) >= 0.6).float().mean().item())
    assert rho_t == pytest.approx((prob_t.amax(1) >= 0.6).float().mean().item()) and rho_t < rho_s
    # In windows and shrunk, as --image-size has it: teacher and student alike are certain and agree.
    state["settings"] |= {"window": 8, "image_size": 20, "tau": 0.0, "ignore_background": False}
    assert photograph_hardness(student, student, image, state) == (0, 1, 1)


def test_the_hardest_photographs_are_named_and_names_with_commas_survive(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    names = [f'a, "{i}" \u00e9.png' for i in range(12)]
    names[5] = unicodedata.normalize("NFD", names[5])  # as macOS writes it; ids are NFC
    names.append(b"latin\xe9.png".decode(errors="surrogateescape"))  # a file name that is not UTF-8
    for i, name in enumerate(names):
        Image.fromarray((rng.random((40, 40, 3)) * 20 * i).astype(np.uint8)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"x")
    argv = [checkpoint(tmp_path / "best.pth", tau=0.5), tmp_path / "in", "--hardness", "--out",
            tmp_path / "out"]
    masked = names[3][:-4], names[5][:-4]
    add_lists(argv[0], labelled=masked[:1], val=[unicodedata.normalize("NFC", masked[1])])
    with pytest.raises(SystemExit) as end:
        predict.main([str(a) for a in argv])
    assert end.value.code == 1  # broken.png was skipped
    with open(tmp_path / "out" / "hardness.csv", newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {str(tmp_path / "in" / name) for name in names}
    gammas = [float(row["gamma (1 = hardest)"]) for row in rows]
    assert gammas == sorted(gammas, reverse=True) and 0 <= gammas[-1] < gammas[0] <= 1
    assert rows[0].keys() == {"file", "gamma (1 = hardest)", "rho_student", "rho_teacher"}
    said = capsys.readouterr().out
    assert len(re.findall(r"^ [01]\.\d\d  ", said, re.MULTILINE)) == 10
    assert "The hardest of the 11 without a mask in training, to label next:\ngamma (1 = hardest)\n " in said
    assert "\n  hardness.csv " in said and not list((tmp_path / "out").glob("*.tmp"))
    with open(tmp_path / "out" / "areas.csv", newline="", errors="surrogateescape") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {row["file"] for row in rows}
    for path in [row["file"] for row in rows if Path(row["file"]).stem not in masked][:10]:
        assert path.encode(errors="backslashreplace").decode() in said
    assert all((tmp_path / "out" / name).exists() for name in names)  # the masks as usual


def test_the_hardness_log_of_a_run_is_never_overwritten(tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.jpg")
    (tmp_path / "hardness.csv").write_text("0,im1,0.5\n")
    argv = [checkpoint(tmp_path / "last.pth"), tmp_path / "x.jpg", "--hardness", "--out", tmp_path]
    with pytest.raises(SystemExit) as end:
        predict.main([str(a) for a in argv])
    assert end.value.code == 2
    assert "its hardness.csv is not predict.py's; give another --out" in capsys.readouterr().err
    assert (tmp_path / "hardness.csv").read_text() == "0,im1,0.5\n" and not (tmp_path / "x.png").exists()


def test_results_are_never_written_among_the_data(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    arguments = Brightness(), STATE, [tmp_path / "x.jpg"]
    for name in ("class_names.txt", "labelmap.txt"):
        (tmp_path / name[:5] / "images").mkdir(parents=True)
        (tmp_path / name[:5] / name).write_text("")
        for folder in (name[:5], f"{name[:5]}/masks"):
            with pytest.raises(InputError, match=f"the data set .*{name[:5]}, .*; give a folder elsewhere$"):
                predict_files(*arguments, tmp_path / folder, torch.device("cpu"))
    assert predict_files(*arguments, tmp_path / "elsewhere", torch.device("cpu")) == 0


def test_a_table_of_somebody_else_is_never_overwritten(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    (tmp_path / "areas.csv").write_text("field,hectares\n")
    arguments = Brightness(), STATE, [tmp_path / "x.jpg"]
    with pytest.raises(InputError, match=r"its areas.csv is not predict.py's; give another --out$"):
        predict_files(*arguments, tmp_path, torch.device("cpu"))
    assert (tmp_path / "areas.csv").read_text() == "field,hectares\n" and not (tmp_path / "x.png").exists()
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "hardness.csv").write_text("mine")  # not written without --hardness
    for _ in range(2):  # the remedy; an earlier table of its own is written again
        assert predict_files(*arguments, tmp_path / "another", torch.device("cpu")) == 0
    assert (tmp_path / "another" / "areas.csv").read_text().startswith("file,dark,bright\n")
