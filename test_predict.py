"""Prediction of any photographs."""

import numpy as np
import torch
from PIL import Image

from predict import predict_files
from test_evaluate import Brightness


def test_predict_files_writes_maps_at_the_photographs_own_upright_size(tmp_path, capsys):
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    tall = Image.new("RGB", (20, 30), "white")
    tall.paste("black", (0, 0, 20, 15))
    tall.transpose(Image.Transpose.ROTATE_90).save(inputs / "phone.jpg", exif=orientation(6), quality=95)
    tall.save(inputs / "plain.png")
    (inputs / "broken.jpg").write_bytes((inputs / "phone.jpg").read_bytes()[:300])
    (inputs / "notes.txt").write_text("not a photograph")
    state = {"settings": {"window": None, "image_size": None}, "classes": ["dark", "bright"],
             "palette": [(0, 0, 0), (255, 0, 0)]}
    assert predict_files(Brightness(), state, [inputs], out, torch.device("cpu")) == 1
    captured = capsys.readouterr()
    assert "broken.jpg" in captured.err and "3/3 photographs, 1 skipped" in captured.out
    for name in ("phone", "plain"):
        labels = Image.open(out / f"{name}.png")
        assert labels.mode == "P" and labels.size == (20, 30)
        assert np.array(labels)[:14].max() == 0 and np.array(labels)[17:].min() == 1
        assert Image.open(out / f"{name}_overlay.png").height > 30  # the legend is below


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_predict_files_never_overwrites_a_photograph_or_another_result(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.png")
    before = (tmp_path / "x.png").read_bytes()
    state = {"settings": {"window": None, "image_size": None}, "classes": ["dark", "bright"],
             "palette": [(0, 0, 0), (255, 0, 0)]}
    device = torch.device("cpu")
    assert predict_files(Brightness(), state, [tmp_path / "x.png"], tmp_path, device) == 1
    assert (tmp_path / "x.png").read_bytes() == before
    both = [tmp_path / "x.png", tmp_path / "a" / "x.png"]
    assert predict_files(Brightness(), state, both, tmp_path / "out", device) == 1
    assert "give another --out" in capsys.readouterr().err
