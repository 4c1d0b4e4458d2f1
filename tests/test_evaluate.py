"""Mean IoU, sliding windows, pictures."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import ranks
from batches import normalize, picture_to_tensor
from data import InputError, SegmentationData, Shapes, open_data
from evaluate import (colourize, confidence_map, confusion_matrix, load_checkpoint, load_model, mean_iou,
                      panel, predict, sliding_window, window_starts)
from model import DeepLabV3Plus
from test_data import custom, save
from test_train import launch

STATE = {"settings": {"window": None, "image_size": None, "amp": False, "tau": 0.6,
                      "ignore_background": False, "backbone": "resnet18", "output_stride": 16,
                      "channels": 16, "aux": False},
         "classes": ["dark", "bright"], "palette": [(0, 0, 0), (255, 0, 0)]}


def test_mean_iou_of_a_2x2_image():
    # Truth 0 0 / 1 255, prediction 0 1 / 1 1: class 0 has 1 of 2 pixels, class 1 has 1 of 2, class 2
    # occurs nowhere, and the ignored pixel counts nowhere.
    truth, prediction = torch.tensor([[0, 0], [1, 255]]), torch.tensor([[0, 1], [1, 1]])
    confusion = confusion_matrix(prediction, truth, 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert confusion.dtype == torch.int64
    mean, iou = mean_iou(confusion)
    assert mean == 0.5 and iou[:2].tolist() == [0.5, 0.5] and iou[2].isnan()


def test_a_class_that_is_only_predicted_counts_as_zero():
    confusion = confusion_matrix(torch.tensor([0, 2]), torch.tensor([0, 0]), 3)
    assert mean_iou(confusion)[0] == pytest.approx((0.5 + 0) / 2)


def test_confusion_matrix_against_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 7, (50, 60), generator=generator, dtype=torch.uint8)
    truth[truth == 6] = 255
    prediction = torch.randint(0, 6, (50, 60), generator=generator, dtype=torch.uint8)
    expected = [[0] * 6 for _ in range(6)]
    for t, p in zip(truth.flatten().tolist(), prediction.flatten().tolist()):
        if t != 255:
            expected[t][p] += 1
    assert confusion_matrix(prediction, truth, 6).tolist() == expected


def test_a_confusion_matrix_counts_beyond_float32():
    confusion = torch.full((2, 2), 2 ** 24, dtype=torch.int64)
    confusion += confusion_matrix(torch.tensor([0]), torch.tensor([0]), 2)
    assert confusion[0, 0] == 2 ** 24 + 1


class Brightness(torch.nn.Module):
    """A pixel is of class 1 if its red is above the mean: exact, whatever the window."""
    def forward(self, images):
        return torch.stack([-images[:, 0], images[:, 0]], dim=1)


class Corner(torch.nn.Module):
    """Scores that depend on where in its window a pixel stands, so that overlaps matter."""
    def forward(self, images):
        B, _, H, W = images.shape
        ramp = torch.linspace(-2, 2, H)[:, None] + torch.linspace(-1, 1, W)
        return torch.stack([images[:, 0], images[:, 1] + ramp, images[:, 2] - ramp], dim=1)


@pytest.mark.parametrize("length, starts", [
    (1024, [0, 255]), (2048, [0, 513, 1026, 1279]), (769, [0]), (500, [0]), (770, [0, 1])])
def test_windows_of_769_at_two_thirds_stride(length, starts):
    assert window_starts(length, 769) == starts


@pytest.mark.parametrize("height, width", [(30, 47), (9, 40), (40, 9), (64, 64)])
def test_sliding_windows_against_a_slow_version(height, width):
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    scores = torch.zeros(3, height, width)
    counts = torch.zeros(height, width)
    for top in window_starts(height, 16):
        for left in window_starts(width, 16):
            place = slice(top, top + 16), slice(left, left + 16)
            scores[(..., *place)] += Corner()(image[(..., *place)])[0].softmax(0)
            counts[place] += 1
    assert counts.min() >= 1
    expected, classes = (scores / counts).max(0)
    confidence, labels = sliding_window(Corner(), image, 16)
    assert labels.equal(classes.to(torch.uint8)) and torch.allclose(confidence, expected)


def test_predict_gives_the_images_own_size():
    image = (torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    expected = (image[0] / 255 > 0.485).to(torch.uint8)
    assert predict(Brightness(), image).equal(expected)
    assert predict(Brightness(), image, window=32).equal(expected)
    assert predict(Brightness(), image, max_side=35).shape == (50, 70)
    assert predict(Brightness(), image, window=16, max_side=35).shape == (50, 70)


def test_a_large_image_goes_through_windows_by_itself(monkeypatch):
    sizes = []
    class Spy(Brightness):
        def forward(self, images):
            sizes.append(images.shape[-2:])
            return super().forward(images)
    image = torch.zeros(3, 1500, 1600, dtype=torch.uint8)
    assert predict(Spy(), image).shape == (1500, 1600)
    assert max(sizes) <= (769, 769)


def test_predict_takes_a_network_in_half_precision():
    torch.manual_seed(0)
    network = DeepLabV3Plus(3, "resnet18", channels=16).eval()
    image = (torch.rand(3, 64, 64) * 255).to(torch.uint8)
    with torch.inference_mode():
        expected = predict(network, image)
        assert (predict(network.half(), image) == expected).float().mean() > 0.99


def test_confidence_map_at_the_size_that_the_network_sees():
    image = (torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    confidence, labels = confidence_map(Brightness(), image)
    expected, classes = Brightness()(normalize(image[None])).softmax(1)[0].max(0)
    assert confidence.equal(expected) and labels.equal(classes.to(torch.uint8))
    for window in (None, 16):
        confidence, labels = confidence_map(Brightness(), image, window, max_side=35)
        assert confidence.shape == labels.shape == (25, 35)
        assert confidence.min() >= 0.5 and confidence.max() <= 1


class Truth(torch.nn.Module):
    """Predicts by the brightness that `tiny_data` gave each class."""
    def forward(self, images):
        red = images[:, :1] * 0.229 + 0.485
        return -(red - torch.tensor([0.0, 0.5, 1.0])[:, None, None]).abs()


def tiny_data(tmp_path, count=5):
    names, rng = [f"im{i}" for i in range(count)], np.random.default_rng(0)
    for i, name in enumerate(names):
        labels = rng.integers(0, 3, (8 + i, 10)).astype(np.uint8)
        Image.fromarray(np.repeat((labels * 127.5)[..., None], 3, 2).astype(np.uint8)).save(
            tmp_path / f"{name}.bmp")
        Image.fromarray(labels).save(tmp_path / f"{name}.png")
    return SegmentationData(["a", "b", "c"], [(0, 0, 0), (255, 0, 0), (0, 255, 0)],
                            {n: tmp_path / f"{n}.bmp" for n in names},
                            {n: tmp_path / f"{n}.png" for n in names}, [], names, [])


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluate_counts_every_pixel_once_and_keeps_the_networks_mode(tmp_path, workers):
    data, network = tiny_data(tmp_path), Truth().train()
    confusion, = evaluate.evaluate([network], data, torch.device("cpu"), workers=workers)
    assert confusion.sum() == sum(10 * (8 + i) for i in range(5))
    assert mean_iou(confusion)[0] == 1 and network.training


def test_evaluation_asks_before_each_image_whether_to_go_on(tmp_path):
    asked = []

    def check():
        asked.append(True)
        if len(asked) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate.evaluate([Truth()], tiny_data(tmp_path), torch.device("cpu"), check=check)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_image_counts_once_on_any_number_of_ranks(tmp_path, monkeypatch, world):
    # Five images on 2, 3 or 4 ranks: the ranks' own matrices must add up to the whole.
    data = tiny_data(tmp_path)
    whole, = evaluate.evaluate([Truth()], data, torch.device("cpu"))
    monkeypatch.setattr(evaluate, "world_size", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(evaluate, "rank", lambda rank=rank: rank)
        parts += evaluate.evaluate([Truth()], data, torch.device("cpu"))
    assert sum(parts).equal(whole)


def test_evaluation_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    ticks = itertools.count(0, 3)  # seconds, at each look at the clock
    monkeypatch.setattr(ranks.time, "monotonic", lambda: next(ticks))
    evaluate.evaluate([Truth()], tiny_data(tmp_path), torch.device("cpu"))
    # The clock is looked at before the first image, at 0 s, and then before each: after the first at 6 s.
    assert capsys.readouterr().out == ("1 of 5 images evaluated, 0:00:24 left\n"
                                       "3 of 5 images evaluated, 0:00:08 left\n")
    monkeypatch.setattr(evaluate, "world_size", lambda: 2)  # the other rank takes the other images
    evaluate.evaluate([Truth()], tiny_data(tmp_path), torch.device("cpu"))
    assert capsys.readouterr().out.splitlines() == ["2 of 5 images evaluated, 0:00:09 left"]


def test_colourize_keeps_the_ids_and_makes_255_white():
    labels = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    picture = colourize(labels, [(1, 2, 3), (4, 5, 6), (7, 8, 9)])
    assert np.array(picture).tolist() == labels.tolist()  # still an index image
    assert np.array(picture.convert("RGB"))[1].tolist() == [[7, 8, 9], [255, 255, 255]]


COLOURS = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]


def test_a_panel_shows_its_maps_between_headings_and_a_legend():
    image = torch.full((3, 40, 60), 90, dtype=torch.uint8)
    truth, prediction = torch.zeros(40, 60, dtype=torch.uint8), torch.full((40, 60), 2, dtype=torch.uint8)
    truth[:, 30:] = 255
    picture = panel([(image, truth, prediction)] * 2, ["image", "ground truth", "prediction"],
                    ["behind", "never", "object"], COLOURS)
    # Each is enlarged 3 times, to 180 x 120; gaps of 4; headings and the legend are lines of 20.
    assert picture.size == (3 * 180 + 2 * 4, 20 + 4 + 120 + 120 + 4 + 20 + 4)
    for top in (24, 24 + 124):
        for left, colour in ((0, (90, 90, 90)), (184, (0, 0, 0)), (184 + 90, (255, 255, 255)),
                             (368, (0, 255, 0))):
            box = np.array(picture.crop((left, top, left + 90, top + 120)))
            assert (box == colour).all()
    headings, legend = np.array(picture)[:20], np.array(picture)[-20:]
    for left in (0, 184, 368):
        assert headings[:, left:left + 60].min() == 0 and (headings[:, left + 120:left + 180] == 255).all()
    squares = [tuple(legend[10, left]) for left in legend_squares(legend)]
    assert squares == [(0, 0, 0), (0, 255, 0), (255, 255, 255)]  # "never" does not occur, 255 does


def legend_squares(legend):
    """Where the insides of the framed squares of a legend begin: black above and below, 15 pixels wide."""
    frame = (legend[3] == 0).all(1) & (legend[17] == 0).all(1)
    return [x + 1 for x in range(len(frame) - 14) if frame[x:x + 15].all() and not frame[x - 1:x].any()]


@pytest.mark.parametrize("height, width", [(3000, 4000), (4000, 30)])
def test_no_side_of_a_photograph_in_a_panel_is_longer_than_512(height, width):
    image, labels = torch.zeros(3, height, width, dtype=torch.uint8), torch.ones(height, width)
    picture = panel([(image, labels.byte())], ["image", "ground truth"], ["a", "b", "c"], COLOURS)
    assert picture.width <= 2 * 512 + 4 and picture.height <= 512 + 2 * 24
    assert max(picture.size) > 512  # but not much smaller
    assert (np.array(picture) == COLOURS[1]).all(2).sum() >= min(512 * 384, 4 * 512)


def test_a_long_legend_goes_on_in_the_next_line_and_other_letters_become_ids():
    classes = ["stra\u00dfe", *(f"a rather long name {c}" for c in range(1, 12))]
    labels = torch.arange(12, dtype=torch.uint8).view(3, 4)
    picture = panel([(torch.zeros(3, 3, 4, dtype=torch.uint8), labels)], ["image", "ground truth"], classes,
                    [(10 * c, 0, 90) for c in range(12)])
    entries = [evaluate.caption(text, "red").width for text in ("class 0", *classes[1:])]
    assert picture.width == 2 * 192 + 4 and max(entries) + entries[1] < picture.width < sum(entries[:3])
    bottom = np.array(picture)[24 + 144:]
    assert len(bottom) == 6 * 24  # two of the twelve in each line
    found = [bottom[4 + 24 * line:24 * (line + 1)] for line in range(6)]
    colours = [tuple(line[10, x]) for line in found for x in legend_squares(line)]
    assert colours == [(10 * c, 0, 90) for c in range(12)]
    assert (found[0][:, :entries[0]] == np.array(evaluate.caption("class 0", (0, 0, 90)))).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_validation_image_is_named(tmp_path, workers):
    data = tiny_data(tmp_path)
    path = tmp_path / "im2.bmp"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"^\S*im2.bmp: cannot be read \(.*$") as error:
        evaluate.evaluate([Brightness()], data, torch.device("cpu"), workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_list_of_other_images_is_evaluated(tmp_path, capsys, monkeypatch, processes):
    # Six masked images, of which im4 and im5 are for validation; im8 is a test image of its own.
    root, path = custom(tmp_path / "data"), checkpoint(tmp_path / "best.pth", ["sky", "road"],
                                                       dataset="custom", data_root=str(tmp_path / "data"))
    for name in ("im8", "im9"):
        save(root / "SegmentationClass" / f"{name}.png", np.zeros((12, 16)))
    (tmp_path / "test.txt").write_text("# a comment\nJPEGImages/im8.jpg SegmentationClass/im8.png\nim9\n")
    arguments = [path, "--list", tmp_path / "test.txt", "--pictures", tmp_path / "pictures"]
    if processes:
        result = launch(*arguments, ranks=processes, script="evaluate.py")
        assert result.returncode == 0, result.stderr
        table = result.stdout
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        evaluate.main([str(argument) for argument in arguments])
        table = capsys.readouterr().out
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {"im8.png", "im9.png"}
    # The masks are all sky: its IoU is the share of sky in the predictions.
    network, _ = load_model(path)
    images = [picture_to_tensor(Image.open(root / f"JPEGImages/{name}.jpg")) for name in ("im8", "im9")]
    with torch.inference_mode():
        sky = torch.stack([predict(network, image) == 0 for image in images]).float().mean().item()
    assert re.search(r"sky +(\S+)", table)[1] == f"{100 * sky:.2f}"


@pytest.mark.parametrize("text, message", [
    ("im0\nim9\nx\n", "list.txt: no image or no mask under --data-root (2): im9, x; take them off"),
    ("# none\n", "list.txt: is empty; write one id per line"), (None, "list.txt: no such file"),
    ("im0\nim0\n", "list.txt: ids listed twice: im0")])
def test_a_list_that_cannot_be_evaluated_gets_one_line(tmp_path, capsys, text, message):
    root = custom(tmp_path / "data")
    path = checkpoint(tmp_path / "best.pth", ["sky", "road"], dataset="custom", data_root=str(root))
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(path), "--list", str(tmp_path / "list.txt")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_images_that_training_had_the_masks_of_are_said(tmp_path, capsys):
    root = custom(tmp_path / "data")
    path = checkpoint(tmp_path / "best.pth", ["sky", "road"], dataset="custom", data_root=str(root))
    add_lists(path, labelled=["im0", "im1"], val=["im4"])
    (tmp_path / "list.txt").write_text("im1\nim4\n")
    evaluate.main([str(path), "--list", str(tmp_path / "list.txt")])
    said = capsys.readouterr().out
    assert "2 images of " in said and "list.txt\nlabelled in training, of these: 1 (im1)\n" in said


def add_lists(path, **lists):
    torch.save(torch.load(path, weights_only=True) | {"lists": lists}, path)


def test_which_images_are_evaluated(tmp_path, capsys):
    """The run's own validation set, whatever has got a mask since; of other data all that have one."""
    root = custom(tmp_path / "data", val=0)  # im0 to im5 have masks
    path = checkpoint(tmp_path / "best.pth", ["sky", "road"], dataset="custom", data_root=str(root))
    add_lists(path, labelled=["im0", "im1"], val=["im3", "im4"])

    def said(*flags):
        evaluate.main([str(path), *map(str, flags)])
        return capsys.readouterr().out

    assert said().startswith("2 images of the run's validation set\n  ")
    moved = root.rename(tmp_path / "moved")
    assert said("--data-root", moved).startswith("2 images of the run's validation set, in ")
    (moved / "SegmentationClass/im3.png").unlink()
    moved.rename(root)
    assert said().startswith("1 images of the run's validation set\n  ")
    other = custom(tmp_path / "other", images=4, masks=3, val=0)
    assert f"3 images with a mask in {other}\nlabelled in training, of these: 2 (im0, im1)\n" in (
        said("--data-root", other))
    (other / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
    (other / "ImageSets/Segmentation/val.txt").write_text("im2\n")
    assert said("--data-root", other).startswith(f"1 images of the validation set in {other}\n  ")
    (root / "SegmentationClass/im4.png").unlink()
    with pytest.raises(SystemExit):
        said()
    assert "its validation images are gone; give a --list of others" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("im5\n")
    assert said("--list", tmp_path / "list.txt").startswith("1 images of ")


def test_images_in_test_are_for_a_list(tmp_path, capsys):
    root = custom(tmp_path / "data")
    path = checkpoint(tmp_path / "best.pth", ["sky", "road"], dataset="custom", data_root=str(root))
    for folder in (root / "JPEGImages", root / "SegmentationClass"):
        folder.rename(tmp_path / "train")
        folder.mkdir()
        (tmp_path / "train").rename(folder / "train")
    for name in ("im0", "t0"):  # another im0 than the one in train/
        save(root / "JPEGImages/test" / f"{name}.jpg", np.zeros((12, 16, 3)))
        save(root / "SegmentationClass/test" / f"{name}.png", np.ones((12, 16)))
    data = open_data("custom", root)
    assert data.test == ["t0", "test/im0"] and "t0" not in data.train + data.val and len(data.train) == 8
    assert np.array(data.mask("im0")).min() == 0 and np.array(data.mask("t0")).min() == 1
    assert np.array(data.mask("test/im0")).min() == 1
    (tmp_path / "list.txt").write_text("t0\n")
    evaluate.main([str(path), "--list", str(tmp_path / "list.txt")])
    assert "1 images of " in capsys.readouterr().out
    (root / "ImageSets/Segmentation/val.txt").unlink(missing_ok=True)
    for folder in (root / "JPEGImages", root / "SegmentationClass"):
        (folder / "train").rename(tmp_path / folder.name)
    evaluate.main([str(path), "--data-root", str(root)])  # a test set in a folder of its own
    assert "2 images with a mask in " in capsys.readouterr().out


def test_panels_never_overwrite_the_data_set(tmp_path, capsys):
    root = custom(tmp_path / "data")
    path = checkpoint(tmp_path / "best.pth", ["sky", "road"], dataset="custom", data_root=str(root))
    for folder in (root, root / "SegmentationClass", root / "new"):
        with pytest.raises(SystemExit) as end:
            evaluate.main([str(path), "--pictures", str(folder)])
        assert end.value.code == 2 and "give a folder elsewhere" in capsys.readouterr().err
    evaluate.main([str(path), "--pictures", str(tmp_path / "panels")])
    assert {file.name for file in (tmp_path / "panels").iterdir()} == {"im4.png", "im5.png"}


def test_a_negative_number_of_workers_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["last.pth", "--workers", "-1"])
    assert end.value.code == 2 and "evaluate.py: --workers -1: at least 0" in capsys.readouterr().err


def test_a_baseline_that_sees_images_at_another_size_is_refused(tmp_path, capsys):
    one, two = (checkpoint(tmp_path / f"{size}.pth", image_size=size, dataset="shapes", data_root="")
                for size in (24, 16))
    with pytest.raises(SystemExit):
        evaluate.main([str(one), "--beside", str(two), "--pictures", str(tmp_path)])
    assert ("16.pth: needs --pictures DIR, and another checkpoint of the same classes and "
            "--image-size") in capsys.readouterr().err


def test_pictures_that_cannot_be_written_name_the_flag(tmp_path, capsys):
    path = checkpoint(tmp_path / "best.pth", ["sky", "road"], dataset="custom",
                      data_root=str(custom(tmp_path / "data")))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(path), "--pictures", str(tmp_path / "file")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.splitlines()) == 1
    assert f"--pictures {tmp_path}/file: cannot be written (File exists); give another --pictures" in error
    evaluate.main([str(path), "--pictures", str(tmp_path / "another")])
    assert (tmp_path / "another" / "im4.png").exists()


def checkpoint(path, classes=("dark", "bright"), **settings):
    """A checkpoint of two networks that differ, as train.py writes it."""
    torch.manual_seed(0)
    student = DeepLabV3Plus(len(classes), "resnet18", channels=16).state_dict()
    student["decoder.2.bias"][0] += 0.2  # so that both classes occur
    teacher = student | {"decoder.2.weight": student["decoder.2.weight"] * 1.2}
    torch.save(STATE | {"student": student, "teacher": teacher, "classes": list(classes),
                        "settings": STATE["settings"] | settings}, path)
    return path


def test_checkpoints_that_are_none(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"student": 1}, tmp_path / "other.pth")
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"settings": Code()}, tmp_path / "code.pth")
    for name, message in (("absent.pth", "no such checkpoint"), ("text.pth", "weights_only"),
                          ("other.pth", "not a checkpoint"), ("code.pth", "weights_only")):
        with pytest.raises(InputError, match=message):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_panels_of_the_embedded_data_set_show_its_truth():
    data = Shapes()
    truth = data.mask("val_000")
    data.val, rows = ["val_000"], []
    colours = colourize(np.array(truth), data.palette).convert("RGB")
    evaluate.evaluate([Classes()], data, torch.device("cpu"),
                      look=lambda name, image, labels, maps: rows.append((image, labels, *maps)))
    row, = rows
    assert row[1].equal(picture_to_tensor(truth)) and row[2].shape == (32, 32)
    picture = panel([row], ["image", "ground truth", "prediction"], data.classes, data.palette)
    assert (np.array(picture)[24:24 + 192:6, 196:196 + 192:6] == np.array(colours)).all()  # 6 times as large


class Classes(torch.nn.Module):
    """Class 0 everywhere."""
    def forward(self, images):
        return torch.stack([torch.ones_like(images[:, 0])] + [torch.zeros_like(images[:, 0])] * 4, 1)


def test_each_image_is_predicted_once_for_its_panel_and_the_table(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate, "predict", lambda *a: (calls.append(a[0]), predict(*a))[1])
    root = custom(tmp_path / "data")
    settings = {"dataset": "custom", "data_root": str(root)}
    for run in ("plain", "hagseg"):
        (tmp_path / run).mkdir()
        checkpoint(tmp_path / run / "last.pth", ["sky", "road"], **settings)
    ours, theirs = (str(tmp_path / run / "last.pth") for run in ("hagseg", "plain"))
    state = torch.load(theirs, weights_only=True)
    state["teacher"]["decoder.2.bias"][1] += 100  # road everywhere
    torch.save(state, theirs)
    evaluate.main([ours, "--pictures", str(tmp_path / "panels")])
    assert len(calls) == 2  # im4 and im5
    said = capsys.readouterr().out
    assert f"\npanels: {tmp_path}/panels/ID.png\n" in said
    data = open_data("custom", root)
    truth = np.array(colourize(data.mask("im4"), data.palette).convert("RGB"))
    columns = columns_of(tmp_path / "panels" / "im4.png", 3)
    assert (columns[1][24:168:12, ::12] == truth).all() and (columns[2][24:168:12, ::12] != truth).any()
    assert_headings(columns, ["image", "ground truth", "prediction"])

    evaluate.main([ours, "--beside", theirs, "--pictures", str(tmp_path / "panels")])
    assert len(calls) == 2 + 4
    header, *rows = capsys.readouterr().out.splitlines()[1:-1]
    assert header.split() == ["plain", "hagseg"]  # the other one left of ours
    assert [row.split()[-1] for row in rows] == [row.split()[-1] for row in said.splitlines()[2:-1]]
    columns, before = columns_of(tmp_path / "panels" / "im4.png", 4), columns
    assert (columns[2][24:168] == data.palette[1]).all() and (columns[3][24:168] == before[2][24:168]).all()
    assert_headings(columns, ["image", "ground truth", "plain", "hagseg"])


def columns_of(path, count):
    """The columns of a panel of a photograph of 16 x 12 pixels, which is shown 12 times as large."""
    picture = np.array(Image.open(path))
    assert picture.shape == (20 + 4 + 144 + 4 + 20, 192 * count + 4 * (count - 1), 3)
    return [picture[:, left:left + 192] for left in range(0, 196 * count, 196)]


def assert_headings(columns, headings):
    for column, heading in zip(columns, headings):
        caption = np.array(evaluate.caption(heading))
        assert (column[:20, :caption.shape[1]] == caption).all()


@pytest.mark.parametrize("one, other, names", [
    ("/runs/supervised/last.pth", "/runs/hagseg/last.pth", ("supervised", "hagseg")),
    ("/a/run/last.pth", "/b/run/last.pth", ("a", "b")),
    ("/a/best.pth", "/a/last.pth", ("best.pth", "last.pth")),
    ("/run/last.pth", "/a/run/last.pth", ("/", "a")), ("/a/last.pth", "/a/last.pth", None)])
def test_checkpoints_beside_each_other_have_names_that_differ(one, other, names):
    assert evaluate.short_names(Path(one), Path(other)) == names


def test_a_table_of_long_names_lines_up():
    table = evaluate.iou_table(["a", "b"], {"x": torch.eye(2), "a-name-of-twenty-two-c": torch.eye(2)})
    assert table.splitlines() == ["                 x  a-name-of-twenty-two-c",
                                  "a           100.00                  100.00",
                                  "b           100.00                  100.00",
                                  "mean IoU    100.00                  100.00"]


@pytest.mark.parametrize("flags, said, remedy", [
    ("--list {0}/both.txt", "no image or no mask .*take them off the list, or give", "--list {0}/one.txt"),
    ("--list {0}/both.txt", "or give their --data-root", "--list {0}/both.txt --data-root {0}/other"),
    ("--beside {0}/b.pth", "needs --pictures DIR", "--beside {0}/b.pth --pictures {0}/panels"),
    ("--data-root {0}/three", "holds sky, road, sea; give its own data", "--data-root {0}/other"),
    ("--data-root {0}/absent", "no such folder; give the folder of custom", "--data-root {0}/other")])
def test_what_cannot_be_evaluated_is_with_the_flags_that_are_said(tmp_path, capsys, flags, said, remedy):
    root = custom(tmp_path / "data")
    custom(tmp_path / "other", masks=10)
    custom(tmp_path / "three", classes="sky\nroad\nsea\n")
    for name in ("a", "b"):
        checkpoint(tmp_path / f"{name}.pth", ["sky", "road"], dataset="custom", data_root=str(root))
    (tmp_path / "one.txt").write_text("im0\n")
    (tmp_path / "both.txt").write_text("im0\nim9\n")
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "a.pth"), *flags.format(tmp_path).split()])
    assert re.search(said, capsys.readouterr().err)
    evaluate.main([str(tmp_path / "a.pth"), *remedy.format(tmp_path).split()])
    assert "mean IoU" in capsys.readouterr().out
