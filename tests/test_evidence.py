"""The tables by one command: every cell of the paper's, and runs on a made-up tree of the real layout."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evidence
from settings import parse_arguments
from test_data import custom
from test_train import HIDDEN

ROOT = Path(__file__).resolve().parent.parent


TINY = ["--backbone", "resnet18", "--channels", "8", "--crop-size", "33", "--batch-size", "2",
        "--weights", "none", "--iters", "2"]


@pytest.fixture
def tables(monkeypatch, capfd):
    """Runs evidence.py in this process, and its runs in theirs: -> (exit code, stdout, stderr)."""
    for name, value in {"OMP_NUM_THREADS": "1", **HIDDEN}.items():
        monkeypatch.setenv(name, value)

    def run(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            evidence.main([*map(str, arguments)])
            sys.exit(0)  # --dry-run returns
        return ended.value.code, *capfd.readouterr()
    return run


def voc(root):
    """VOC's layout and its numbers: 10,582 training images, 1,464 of them VOC's own, and 2 for validation.
    All photographs are one file, and all masks another, hard-linked."""
    first = root / "first"
    for name in ("photograph.jpg", "mask.png"):
        first.mkdir(parents=True, exist_ok=True)
        pixels = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16) % 21
        Image.fromarray(pixels).convert("RGB" if name[0] == "p" else "L").save(first / name)
    ids = [f"2007_{i:06d}" for i in range(10584)]
    for folder, suffix, source in (("JPEGImages", ".jpg", "photograph.jpg"),
                                   ("SegmentationClassAug", ".png", "mask.png")):
        (root / folder).mkdir()
        for name in ids:
            os.link(first / source, root / folder / f"{name}{suffix}")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in ids[:2]))
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in ids[2:1466]))
    return root


def own(root):
    """Flags that train on 40 photographs, which all have masks, in place of the embedded data set."""
    return "--dataset", "custom", "--data-root", str(custom(root, images=42, masks=42))


def test_every_cell_of_the_papers_tables_is_a_command_of_its_protocol(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    evidence.main(["--rows", "table1", "table2", "table3", "voc_table4", "--ranks", "8", "--dry-run",
                   "--data-root", "some where", "--out", str(tmp_path / "runs")])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 6 * 3 + 3 * 5 + 3 * 4 + 9 == len({command[-3] for command in commands})
    assert not list(tmp_path.iterdir())
    cells = set()
    for launcher, ranks, script, *flags in commands:
        assert (launcher, ranks, script) == ("torchrun", "--nproc_per_node=8", "train.py")
        settings = parse_arguments(flags)
        assert settings.data_root == "some where" and settings.batch_size == 16
        assert settings.crop_size == (769 if settings.dataset == "cityscapes" else 513)
        cells.add((settings.dataset, settings.backbone, settings.output_stride, settings.split,
                   settings.supervised, settings.loss, settings.intensity, settings.cutmix))
    hagseg = ("hardness",) * 3
    assert ("voc", "resnet50", 8, "1_4", False, *hagseg) in cells             # Table 1: 77.1
    assert ("voc_classic", "resnet101", 16, "full", True, *hagseg) in cells   # Table 2: 72.9
    assert ("cityscapes", "resnet50", 8, "1_2", False, *hagseg) in cells      # Table 3: 80.2
    assert ("voc", "resnet101", 16, "1_8", False, "standard", "hardness", "none") in cells  # Table 4: 76.5


def test_the_papers_numbers_lie_beside_their_cells():
    for cell, number in (("table1 HagSeg resnet50 1_8", "76.5"),
                         ("table1 supervised resnet101 1_4", "74.7"),
                         ("table1 HagSeg stride 8 resnet101 1_16", "77.2"),
                         ("table2 HagSeg resnet101 1_2", "79.5"), ("table3 HagSeg resnet50 1_16", "74.3"),
                         ("voc_table4 standard CutMix", "76.1")):
        assert evidence.PAPER[cell] == number


@pytest.mark.parametrize("flags, ranks, memory, expected", [
    ("", 1, float("inf"), 1),                                       # no GPU
    ("", 1, 24, 1),                                                 # 17 GiB for 16 + 16
    ("", 1, 11, 2),
    ("", 4, 11, 1),                                                 # 4 + 4 on each
    ("--no-amp", 1, 16, 4), ("--no-amp", 1, 32, 2),                 # 31 GiB in float32
    ("--backbone resnet101 --output-stride 8", 1, 24, 4),           # 49 GiB
    ("--backbone resnet101 --output-stride 8 --supervised", 1, 24, 1),
    ("--crop-size 769", 1, 24, 2),                                  # 2.25 times as many pixels
    ("", 1, 0.1, 16)])                                              # at most an image at a time
def test_accumulation_follows_from_the_memory(flags, ranks, memory, expected):
    settings = parse_arguments(["--dataset", "voc", *flags.split()])
    assert evidence.accumulation(settings, ranks, memory) == expected


@pytest.mark.slow
def test_a_table_on_the_real_layout_runs_stops_and_resumes(tmp_path, monkeypatch, tables):
    monkeypatch.chdir(tmp_path)
    cell = "table1 HagSeg resnet50 1_8"
    call = ("--rows", "table1", "--only", cell, "--data-root", voc(tmp_path / "voc"), "--out", "runs",
            "--classes", "aeroplane", "--", *TINY)
    code, table, said = tables(*call)
    assert code == 0, said
    header, _, row = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert header[:3] == ["row", "the paper's", "seeds"] and row[:3] == [cell, "76.5", "1"]
    run = tmp_path / "runs" / "table1_HagSeg_resnet50_1_8-1"
    assert len((run / "labelled.txt").read_text().splitlines()) == 1323
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found = dict(zip(header, row))
    assert found["teacher mIoU"] == f"{100 * last['miou_teacher']:.1f}"
    assert float(found["aeroplane"]) < 100
    assert found["teacher's best"] == f"{100 * last['miou_teacher']:.1f} (1 of 1)"

    # What is finished is not run again; what was stopped before it was recorded, is.
    record, before = run / "evidence.json", (run / "last.pth").stat().st_mtime_ns
    recorded = record.stat().st_mtime_ns
    assert tables(*call)[:2] == (0, table) and record.stat().st_mtime_ns == recorded
    record.unlink()
    code, _, said = tables(*call)
    assert code == 0 and record.exists() and (run / "last.pth").stat().st_mtime_ns == before, said

    # A printed command, pasted, finds the run finished.
    printed, = tables("--dry-run", *call)[1].splitlines()
    pasted = subprocess.run(shlex.split(printed), cwd=tmp_path, text=True, capture_output=True,
                            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert pasted.returncode == 0 and "mean IoU" in pasted.stdout, pasted.stderr


@pytest.mark.slow
def test_a_failed_cell_is_named_and_the_others_go_on(tmp_path, tables):
    call = ("--rows", "lambda", "--only", "lambda_u 1", "lambda_u 5", "--out", tmp_path / "runs", "--", *TINY,
            *own(tmp_path / "mine"), "--split", "1_2")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "lambda_u_1-1").write_text("in the way")
    code, table, said = tables(*call)
    assert code == 1 and "lambda_u 1, seed 1" in said and "--out" in said and "Traceback" not in said
    assert "| lambda_u 5 |  | 1 |" in table


def test_a_checkpoint_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evidence.main(["--named", str(tmp_path / "last.pth")])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"evidence.py: {tmp_path}/last.pth: no such checkpoint\n"


def test_the_tables_hold_means_spreads_and_each_seed(tmp_path, capsys):
    for seed, miou in ((3, 0.5), (4, 0.6)):  # two finished runs, whose folders hold what is read
        run = tmp_path / f"tau_0.5-{seed}"
        run.mkdir()
        (run / "evidence.json").write_text('{"seconds": 10}')
        trained = {"L": 1, "gamma": 0.25, "confident": 0.5, "cutmix_fired": 1}
        validated = {"miou_teacher": miou, "miou_student": 0.1}
        (run / "metrics.jsonl").write_text(f"{json.dumps(trained)}\n{json.dumps(validated)}\n")
        (run / "result.txt").write_text(f"          teacher   student\nrings{10 * seed:12.2f}      1.00\n")
    with pytest.raises(SystemExit) as ended:
        evidence.main(["--rows", "tau", "--only", "tau 0.5", "--seeds", "2", "--first-seed", "3", "--classes",
                       "rings", "--out", str(tmp_path)])
    assert not ended.value.code
    header, rule, row, *by_seed = capsys.readouterr().out.splitlines()
    found = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (header, row))))
    # The spread is that of a sample: 5 and 5 around the mean, divided by 2 - 1 = 1.
    assert found["seeds"] == "2" and found["teacher mIoU"] == "55.0 ± 7.1" and found["rings"] == "35.0 ± 7.1"
    assert found["gamma"] == "0.25" and found["s a run"] == "10"
    assert by_seed == ["", "| teacher mIoU, by seed | 3 | 4 |", "|---|---|---|", "| tau 0.5 | 50.0 | 60.0 |",
                       "", "| rings, by seed | 3 | 4 |", "|---|---|---|", "| tau 0.5 | 30.0 | 40.0 |"]


@pytest.mark.slow
def test_ctrl_c_stops_the_run_and_those_behind_it(tmp_path):
    command = [sys.executable, ROOT / "tools" / "evidence.py", "--rows", "tau", "--out", tmp_path,
               "--", *TINY[:-1], "2000", *own(tmp_path / "mine"), "--split", "1_2"]
    stopped = subprocess.Popen(command, start_new_session=True, text=True, stderr=subprocess.PIPE)
    while not (tmp_path / "tau_0.5-1" / "metrics.jsonl").exists():
        assert stopped.poll() is None
        time.sleep(0.1)
    os.killpg(stopped.pid, signal.SIGINT)
    assert "the same command resumes" in stopped.communicate()[1] and stopped.returncode == 1
    assert (tmp_path / "tau_0.5-1" / "last.pth").exists() and not (tmp_path / "tau_0.7-1").exists()


@pytest.mark.parametrize("arguments, told", [
    (["--only", "tau 2"], "'tau 0.5'"), (["--", "--tauu", "1"], "--tauu"), (["--", "--tau", "2"], "--tau 2")])
def test_unknown_rows_and_bad_flags_are_refused_before_anything_runs(arguments, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        evidence.main(["--rows", "tau", "--out", str(tmp_path / "runs"), *arguments])
    assert stopped.value.code == 2 and told in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_it_is_counted_how_pseudo_labels_name_each_class(tmp_path, monkeypatch):
    def network(images):  # sure of sky on the left, of road in the middle, and of nothing on the right
        logits = torch.zeros(1, 2, 12, 16)
        logits[:, 0, :, :4] = logits[:, 1, :, 4:8] = 9
        return logits

    root = custom(tmp_path / "mine")  # sky and road take turns, column by column
    checkpoint = {"settings": {"dataset": "custom", "data_root": str(root), "image_size": None, "tau": 0.9},
                  "lists": {"labelled": ["im0"]}, "iteration": 7}
    monkeypatch.setattr(evidence, "load_model", lambda path: (network, checkpoint))
    # Of 8 columns a class, 2 are named rightly and 2 as the other; the rest is below tau.
    table = evidence.named_table("last.pth").splitlines()
    assert table[0] == "last.pth, iteration 7, tau 0.9, 3 images"
    assert table[-2:] == [f"| {name} | 50.0% | 25.0% | 25.0% | 50.0% |" for name in ("sky", "road")]
    assert evidence.named_table("last.pth", 1).endswith("| road | 50.0% | 0.0% | 0.0% |  |")


@pytest.mark.slow
def test_labels_are_chosen_by_the_hardness_of_predict(tmp_path, tables):
    code, _, said = tables("--rows", "camvid_labels", "--only", "CamVid HagSeg, hardest added",
                           "--out", tmp_path, "--", *TINY, *own(tmp_path / "mine"))
    assert code == 0, said
    base = tmp_path / "CamVid_HagSeg-1"
    lists = {name: (base / f"{name}.txt").read_text().splitlines()
             for name in ("labelled", "unlabelled", "hardest", "random", "easiest")}
    with open(base / "predictions" / "hardness.csv", newline="") as file:
        gamma = {Path(row["file"]).stem: float(row["gamma (1 = hardest)"]) for row in csv.DictReader(file)}
    assert set(gamma) == set(lists["unlabelled"])
    added = {which: set(lists[which]) - set(lists["labelled"]) for which in ("hardest", "random", "easiest")}
    assert all(len(names) == 5 and set(lists["labelled"]) <= set(lists[which])
               for which, names in added.items())
    assert min(gamma[name] for name in added["hardest"]) >= max(
        gamma[name] for name in set(gamma) - added["hardest"])
    assert max(gamma[name] for name in added["easiest"]) <= min(
        gamma[name] for name in set(gamma) - added["easiest"])
    run = tmp_path / "CamVid_HagSeg_hardest_added-1"
    assert (run / "labelled.txt").read_text().splitlines() == lists["hardest"]
