"""The real command at its smallest, and the slow versions that it measures against."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import augment
import batches
import bench
import data
from hardness import instance_hardness
from test_train import HIDDEN

HERE = Path(bench.__file__).parent.parent


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    bench.make_up_photographs(folder, count=9)
    return folder


def run(*flags):
    return subprocess.run([sys.executable, "tools/bench.py", *map(str, flags)], cwd=HERE,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | HIDDEN, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_prints_every_section_and_ends_with_the_ratio():
    done = run("--backbone", "resnet18", "--channels", 16, "--crop-size", 32, "--batch-size", 4,
               "--accumulate", 2, "--loader-crop", 64, "--repeats", 2, "--only", *bench.SECTIONS)
    assert done.returncode == 0, done.stderr
    assert "crop 32, 4 + 4 in 2, fp32" in done.stdout
    *lines, last = done.stdout.splitlines()
    assert float(re.fullmatch(r"step/network (\d+\.\d{3})", last)[1]) > 0
    names = [re.split(r"\s{2,}", line.strip())[0] for line in lines]
    for name in ("load wait", "copy to device", "no-gradient passes", "hardness", "augmentation",
                 "student forward", "loss", "backward", "optimizer", "teacher", "step",
                 "network (the floor)", "images", "network, counted", "peak memory of a step",
                 "loader, labelled", "loader, unlabelled", "NumPy / hardness", "max(1) / top_class",
                 "one / many", "evaluation", "around the network", "step at 2 + 2", "step at 16 + 16"):
        assert name in names
    assert max(map(len, lines)) <= 100


@pytest.mark.slow
def test_a_folder_of_ones_own_and_one_section(photographs):
    done = run("--only", "loader", "--data-root", photographs, "--loader-crop", 64, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    assert "loader, labelled" in done.stdout and "step" not in done.stdout.split("quartiles")[1]


@pytest.mark.parametrize("flags, message", [
    ("--data-root {}", "--data-root {}: neither JPEGImages/"), ("--crop-size 1", "--crop-size 1: too small"),
    ("--dataset cityscapes", "--data-root data/cityscapes: no such folder"),
    ("--dataset shapes", "not measured; leave them out"), ("--aux", "not measured; leave them out")])
def test_input_that_cannot_be_used_is_one_line(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(bench, "make_up_photographs", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        bench.main(["--only", "loader", *flags.format(tmp_path).split()])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message.format(tmp_path) in said[-1]
    assert len(said) == 1 or said[0].startswith("usage: ")


def test_the_loop_over_images_and_classes_is_eq_5_to_7():
    draw = torch.Generator().manual_seed(0)
    prob_t, prob_s = (torch.randn(3, 5, 8, 9, generator=draw).mul(2).softmax(1) for _ in "ts")
    valid = torch.rand(3, 8, 9, generator=draw) < 0.8
    expected = bench.hardness_by_loops(prob_t.numpy(), prob_s.numpy(), 0.5, valid.numpy())
    gamma = instance_hardness(prob_t, prob_s, 0.5, valid)
    np.testing.assert_allclose(gamma, expected, atol=1e-6)


def test_the_usual_way_makes_the_same_items(photographs, monkeypatch):
    opened = data.open_data("custom", photographs)
    labelled, unlabelled = data.split_ids(opened, "custom", None)
    ours = batches.TrainingDraws(opened, labelled, unlabelled, 8, 200, seed=0)
    usual = bench.UsualDraws(**vars(ours))
    nothing = dict.fromkeys(("one", "two"), lambda image, rng: image)
    monkeypatch.setattr(augment, "INTENSITY_OPERATIONS", nothing)
    for position in range(8):
        item, other = ours[0, position], usual[0, position]
        for name in ("x", "weak", "strong"):
            difference = batches.normalize(item[name][None])[0] - other[name]
            assert difference.abs().max() < 0.1, name  # Pillow rounds the box: a few grey values
        assert (item["y"] == other["y"]).float().mean() > 0.99
