"""The real commands on a GPU: killed and resumed, evaluated and predicted there and on the CPU."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import predict
import run_folder
import train
from batches import normalize, picture_to_tensor
from data import Shapes, open_data

HERE = Path(__file__).resolve().parents[2]
TINY = ("--backbone resnet18 --channels 16 --crop-size 32 --batch-size 4 --tau 0.3 --log-every 2 --lr 0.001 "
        "--weights none --no-amp").split()


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(Shapes, "VAL", 8)


def trained(out, *flags):
    train.main([*TINY, "--iters", "4", "--out", str(out), *flags])
    return out


def gammas(out):
    """[(iteration, id)], [gamma] of hardness.csv."""
    _, *rows = (line.rsplit(",", 1) for line in (out / "hardness.csv").read_text().splitlines())
    return [place for place, _ in rows], [float(gamma) for _, gamma in rows]


def metrics(out):
    """The numbers of metrics.jsonl, but for the clock's, one dict a line."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "images_per_second"}
            for line in lines]


@pytest.mark.slow
def test_a_run_killed_and_resumed_is_the_run_within_rounding(device, tmp_path):
    flags = [*TINY, "--iters", "16", "--checkpoint-every", "4", "--eval-every", "99"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    killed = tmp_path / "killed"
    run = subprocess.Popen([sys.executable, "train.py", *flags, "--out", killed], cwd=HERE,
                           env={"OMP_NUM_THREADS": "1", **os.environ})
    deadline = time.time() + 120
    while not (killed / "last.pth").exists() and time.time() < deadline:
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -9 and not (killed / "result.txt").exists()
    train.main([*flags, "--out", str(killed)])
    assert gammas(killed)[0] == gammas(tmp_path / "whole")[0]
    np.testing.assert_allclose(gammas(killed)[1], gammas(tmp_path / "whole")[1], atol=0.02)
    for ours, theirs in zip(metrics(killed), metrics(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=0.02, abs=0.02)


def test_workers_use_pinned_memory_on_a_gpu(device, tmp_path, monkeypatch):
    pinned, real = [], run_folder.training_batches

    def watched(*args):
        for batch in real(*args):
            pinned.extend(tensor.is_pinned() for tensor in batch.values())
            yield batch
    monkeypatch.setattr(run_folder, "training_batches", watched)
    trained(tmp_path / "run", "--workers", "1")
    assert len(pinned) == 4 * 5 and set(pinned) == {device.type == "cuda"}


def mean_iou_of(capsys, checkpoint):
    capsys.readouterr()
    evaluate.main([str(checkpoint)])
    return float(re.search(r"mean IoU +([\d.]+)", capsys.readouterr().out)[1])


@pytest.mark.slow
def test_a_run_of_either_device_is_evaluated_on_the_other(device, tmp_path, capsys, hide_gpu):
    there = trained(tmp_path / "there") / "last.pth"
    there_there = mean_iou_of(capsys, there)
    settings = torch.load(there, weights_only=True)["settings"]
    assert settings["cuda"] == (device.type == "cuda")
    hide_gpu()
    here = trained(tmp_path / "here") / "last.pth"
    here_here, there_here = mean_iou_of(capsys, here), mean_iou_of(capsys, there)
    torch.cuda.is_available = lambda: device.type == "cuda"  # hide_gpu's monkeypatch undoes it
    here_there = mean_iou_of(capsys, here)
    assert there_here == pytest.approx(there_there, abs=0.2)
    assert here_there == pytest.approx(here_here, abs=0.2)


def test_evaluation_is_the_cpus_but_for_undecided_pixels(device):
    data = open_data("shapes", "")
    torch.manual_seed(0)
    network = train.DeepLabV3Plus(len(data.classes), "resnet18", channels=16).eval()
    undecided = 0
    for name in data.val:
        image = picture_to_tensor(data.image(name).convert("RGB"))
        with torch.no_grad():
            best = network(normalize(image[None])).softmax(1).topk(2, dim=1).values
        undecided += (best[:, 0] - best[:, 1] < 1e-3).sum().item()
    expected, = evaluate.evaluate([network], data, torch.device("cpu"))
    found, = evaluate.evaluate([network.to(device, memory_format=torch.channels_last)], data, device)
    assert found.sum() == expected.sum() and undecided < found.sum() / 2
    assert (found.cpu() - expected).abs().sum() <= 2 * undecided


def predicted(checkpoint, photographs, out):
    """Class maps, and gamma by photograph, of predict.py --hardness."""
    with pytest.raises(SystemExit) as end:
        predict.main([str(checkpoint), str(photographs), "--hardness", "--out", str(out)])
    assert end.value.code == 0
    with open(out / "hardness.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    maps = {path.name: np.asarray(Image.open(path)) for path in out.glob("*.png") if "_" not in path.stem}
    return maps, {Path(row["file"]).stem: float(row[predict.GAMMA]) for row in rows}


def test_predictions_and_hardness_are_the_cpus(device, tmp_path, hide_gpu):
    run, photographs, data = trained(tmp_path / "run"), tmp_path / "photographs", open_data("shapes", "")
    photographs.mkdir()
    for n, name in enumerate(data.val[:3]):
        data.image(name).convert("RGB").resize((96, 64)).save(photographs / f"p{n}.png")
    maps, gamma = predicted(run / "last.pth", photographs, tmp_path / "there")
    hide_gpu()
    its_maps, its_gamma = predicted(run / "last.pth", photographs, tmp_path / "here")
    assert maps.keys() == its_maps.keys() and len(maps) == 3
    for name in maps:
        assert (maps[name] != its_maps[name]).mean() < 0.02
    assert gamma == pytest.approx(its_gamma, abs=0.02) and len(gamma) == 3
