"""A run's folder: the real command whole, killed, stopped, resumed, refused."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import train
from run import METRICS
from test_data import custom, save
from test_train import HERE, TINY, launch, lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the real command, 6 iterations, on one process."""
    out = tmp_path_factory.mktemp("run") / "out"
    result = launch(*TINY, "--iters", 6, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result


def test_the_command_trains_validates_and_leaves_its_results(finished):
    out, result = finished
    assert {p.name for p in out.iterdir() if p.is_file()} == {
        "best.pth", "hardness.csv", "labelled.txt", "last.pth", "lock", "metrics.jsonl",
        "predictions.png", "result.txt", "settings.json", "unlabelled.txt"}
    records = lines(out)
    assert [r["iteration"] for r in records] == [2, 4, 6, 6]
    assert set(METRICS) <= records[0].keys() and {"miou_teacher", "miou_student"} <= records[-1].keys()
    assert "background" in result.stdout and "The result is the last iteration's" in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines() if str(out) not in line)
    hardness = [line.split(",") for line in (out / "hardness.csv").read_text().splitlines()]
    assert len(hardness) == 6 * 4 and all(0 <= float(gamma) <= 1 for *_, gamma in hardness)
    labelled = (out / "labelled.txt").read_text().split()
    unlabelled = (out / "unlabelled.txt").read_text().split()
    assert len(labelled) == 16 and not set(labelled) & set(unlabelled)
    assert {name for _, name, _ in hardness} <= set(unlabelled)
    assert json.loads((out / "settings.json").read_text())["tau"] == 0.3


def test_evaluate_repeats_the_result_from_the_checkpoint_alone(finished, tmp_path):
    out, result = finished
    moved = shutil.copy(out / "last.pth", tmp_path / "given-away.pth")
    mean = lambda text: re.search(r"mean IoU +(.*)", text)[1].split()
    cases = (["--pictures", tmp_path / "pictures"], None, 0), (["--student"], None, 1), ([], 2, 0)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda case: launch(moved, *case[0], ranks=case[1], script="evaluate.py"), cases)
        for again, (_, _, column) in zip(found, cases):
            assert again.returncode == 0, again.stderr
            assert mean(again.stdout)[0] == mean(result.stdout)[column]
    assert len(list((tmp_path / "pictures").glob("val_*.png"))) == 128


def test_the_same_command_again_reports_the_finished_run(finished):
    out, result = finished
    before = (out / "last.pth").stat().st_mtime_ns
    again = launch(*TINY, "--iters", 6, "--out", out)
    assert again.returncode == 0 and again.stdout.splitlines()[-5:] == result.stdout.splitlines()[-5:]
    assert (out / "last.pth").stat().st_mtime_ns == before


def run_main(argv):
    # Loader processes are forked; a forkserver of this process's own would import torch once more.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    os.setpgrp()
    train.main(argv)


def start(argv):
    """train.main in a process of its own, forked from one that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    process = context.Process(target=run_main, args=([str(a) for a in argv],))
    process.start()
    return process


def state_of(out):
    state = torch.load(out / "last.pth", weights_only=True)
    tensors = {f"{part}.{name}": t for part in ("student", "teacher") for name, t in state[part].items()}
    tensors |= {f"momentum.{i}": s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}
    return tensors | {"best": torch.tensor(state["best"]["miou"])}


@pytest.mark.parametrize("flags", [[], ["--supervised"], ["--workers", "2"],
                                   ["--supervised", "--workers", "2"]])
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path, flags):
    # Every other iteration is saved, so about half of the kills hit a checkpoint being written.
    arguments = [*TINY, "--iters", 20, "--checkpoint-every", 2, "--log-every", 3, *flags]
    whole = start([*arguments, "--out", tmp_path / "whole"])
    rng, kills = random.Random(str(flags)), 0
    out = tmp_path / "killed"
    while kills < 10:
        process = start([*arguments, "--out", out])
        process.join(rng.uniform(0.5, 1.6))
        if process.exitcode == 0:  # finished too early: begin again
            shutil.rmtree(out)
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    process = start([*arguments, "--out", out])
    for finishing in (whole, process):
        finishing.join(120)
        assert finishing.exitcode == 0
    expected, found = state_of(tmp_path / "whole"), state_of(out)
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    assert lines(out) == lines(tmp_path / "whole")
    if not any("supervised" in flag for flag in flags):
        assert (out / "hardness.csv").read_text() == (tmp_path / "whole" / "hardness.csv").read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ranks", [None, 2])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, signum, ranks):
    # The whole process group gets it, as with Ctrl-C: torchrun, the ranks and their loaders.
    out = tmp_path / "out"
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if ranks else []
    process = subprocess.Popen([sys.executable, *starter, str(HERE / "train.py"), *TINY, "--iters",
                                "500", "--workers", "1", "--out", str(out)], stderr=subprocess.PIPE,
                               text=True, cwd=HERE, stdout=subprocess.DEVNULL, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and "the same command resumes it" in said[0] and "leaked" not in errors
    iteration = torch.load(out / "last.pth", weights_only=True)["iteration"]
    assert f"saved iteration {iteration}" in said[0]


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_checkpoint(tmp_path):
    out = tmp_path / "out"
    assert launch(*TINY, "--iters", 4, "--checkpoint-every", 2, "--out", out).returncode == 0
    state = torch.load(out / "last.pth", weights_only=True)
    before = (out / "last.pth").read_bytes()
    (out / "settings.json").write_text((out / "settings.json").read_text().replace(
        '"iters": 4', '"iters": 8'))
    # /dev/full refuses every byte, as a full disk does.
    (out / "last.pth.tmp").symlink_to("/dev/full")
    result = launch(*TINY, "--iters", 8, "--checkpoint-every", 2, "--out", out)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "No space left on device" in result.stderr and "last.pth" in result.stderr
    assert (out / "last.pth").read_bytes() == before and state["iteration"] == 4


def test_two_live_runs_cannot_share_a_folder(tmp_path):
    out = tmp_path / "out"
    process = start([*TINY, "--iters", 500, "--out", out])
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.1)
        assert process.is_alive()
    second = launch(*TINY, "--iters", 500, "--out", out)
    assert second.returncode == 2 and "another live run" in second.stderr
    process.kill()
    process.join()


def test_a_folder_of_other_settings_is_refused_and_they_are_named(finished, capsys):
    out, _ = finished
    before = (out / "last.pth").read_bytes()
    with pytest.raises(SystemExit) as end:
        train.main([*TINY, "--iters", "6", "--out", str(out), "--tau", "0.4", "--seed", "1"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "tau 0.3 -> 0.4" in error and "seed 0 -> 1" in error
    assert (out / "last.pth").read_bytes() == before


@pytest.mark.parametrize("change", [{"classes": ["a"] * 5}, {"optimizer": None}, {"student": {}}])
def test_another_runs_checkpoint_is_refused_and_the_logs_are_kept(finished, tmp_path, capsys, change):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    torch.save(torch.load(out / "last.pth", weights_only=True) | change, out / "last.pth")
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit) as end:
        train.main([*TINY, "--iters", "6", "--out", str(out)])
    assert end.value.code == 2 and "last.pth: not the last checkpoint of this run" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_data_set_is_refused(finished, tmp_path):
    out, _ = finished
    state = torch.load(out / "last.pth", weights_only=True)
    torch.save(state | {"classes": ["a", "b"]}, tmp_path / "other.pth")
    result = launch(tmp_path / "other.pth", script="evaluate.py")
    assert result.returncode == 2 and "other.pth: does not fit its own settings" in result.stderr
    result = launch(out / "last.pth", "--data-root", tmp_path, script="evaluate.py")
    assert result.returncode == 0  # the embedded data set has no root
    torch.save(state | {"settings": state["settings"] | {"dataset": "custom"}}, tmp_path / "custom.pth")
    result = launch(tmp_path / "custom.pth", "--data-root", custom(tmp_path / "data"), script="evaluate.py")
    assert result.returncode == 2 and "trained on the classes background, rings" in result.stderr
    assert "Traceback" not in result.stderr


def spoilt_run(tmp_path, *flags, spoil=lambda root: None, **options):
    root = custom(tmp_path / "data", images=12)
    spoil(root)
    return launch("--dataset", "custom", "--data-root", root, *TINY, "--iters", 40, "--checkpoint-every",
                  1, "--out", tmp_path / "out", *flags, **options)


def truncate(root, name="im9"):
    big = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    path = root / "JPEGImages" / f"{name}.jpg"
    save(path, big)
    path.write_bytes(path.read_bytes()[:20000])


@pytest.mark.parametrize("flags, ranks", [([], None), (["--workers", "2"], None), ([], 2)])
def test_a_truncated_photograph_is_named(tmp_path, flags, ranks):
    result = spoilt_run(tmp_path, *flags, spoil=truncate, ranks=ranks)
    said = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert result.returncode == 1 and len(said) == 1
    assert "im9.jpg: cannot be read (" in said[0] and "saved iteration" in said[0]
    if ranks is None:
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("ranks", [None, 2])
def test_evaluate_names_a_truncated_photograph(tmp_path, ranks):
    assert spoilt_run(tmp_path, "--iters", 1).returncode == 0
    truncate(tmp_path / "data", "im5")  # the second of the validation images: rank 1's
    save(tmp_path / "data/SegmentationClass/im5.png", np.zeros((300, 300)))
    result = launch(tmp_path / "out" / "last.pth", "--workers", 1, ranks=ranks, script="evaluate.py")
    said = [line for line in result.stderr.splitlines() if line.startswith("evaluate.py: ")]
    assert result.returncode == (1 if ranks else 2) and len(said) == 1
    assert "im5.jpg: cannot be read (" in said[0]


def test_a_loss_that_is_not_finite_is_named_and_saves_nothing(tmp_path):
    result = spoilt_run(tmp_path, "--lr", "1e30", "--checkpoint-every", "100")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert re.search(r"L_(x|u).* is not finite in iteration \d+, with the labelled images im\d",
                     result.stderr) or "the weights are not finite" in result.stderr
    assert not (tmp_path / "out" / "last.pth").exists()


def test_a_loader_process_that_dies_is_named(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), *TINY, "--iters", "500", "--workers",
                                "2", "--out", str(out)], stderr=subprocess.PIPE, text=True, cwd=HERE,
                               stdout=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.1)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                              text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and len(errors.splitlines()) == 1 and "a loader process died" in errors
