"""A run's folder: the real command whole, killed, stopped, resumed, refused."""

import ast
import errno
import io
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import compare
import data
import evaluate
import run_folder as run_module
import train
from run_folder import METRICS
from test_data import custom, save
from test_train import HERE, HIDDEN, TINY, launch, lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the real command, 6 iterations, on one process."""
    out = tmp_path_factory.mktemp("run") / "out"
    result = launch(*TINY, "--iters", 6, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result


@pytest.mark.slow
def test_the_command_trains_validates_and_leaves_its_results(finished):
    out, result = finished
    assert {p.name for p in out.iterdir() if p.is_file()} == {
        "best.pth", "hardness.csv", "labelled.txt", "last.pth", "lock", "metrics.jsonl",
        "predictions.png", "result.txt", "settings.json", "unlabelled.txt", "val.txt"}
    records = lines(out)
    assert [r["iteration"] for r in records] == [2, 4, 6, 6]
    assert set(METRICS) <= records[0].keys() and {"miou_teacher", "miou_student"} <= records[-1].keys()
    assert "background" in result.stdout and "The result is the last iteration's" in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines() if str(out) not in line)
    header, *hardness = [line.split(",") for line in (out / "hardness.csv").read_text().splitlines()]
    assert header == ["iteration", "id", "gamma (1 = hardest)"]
    assert len(hardness) == 6 * 4 and all(0 <= float(gamma) <= 1 for *_, gamma in hardness)
    labelled = (out / "labelled.txt").read_text().split()
    unlabelled = (out / "unlabelled.txt").read_text().split()
    assert len(labelled) == 16 and not set(labelled) & set(unlabelled)
    assert {name for _, name, _ in hardness} <= set(unlabelled)
    assert json.loads((out / "settings.json").read_text())["tau"] == 0.3


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_same_command_again_reports_the_finished_run(finished, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out, result = finished
    before = (out / "last.pth").stat().st_mtime_ns
    code, said, _ = run(*TINY, "--iters", 6, "--out", out)
    assert code == 0 and said.splitlines()[-5:] == result.stdout.splitlines()[-5:]
    assert (out / "last.pth").stat().st_mtime_ns == before


class Small(nn.Module):
    """Two convolutions and a BatchNorm in place of DeepLabV3+, whose checkpoints have 130 megabytes."""
    def __init__(self, num_classes, *_, **__):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, images):
        return F.interpolate(self.head(self.encoder(images)), images.shape[-2:], mode="bilinear")

    def encoder_parameters(self):
        return self.encoder.parameters()


def shrink(patch):
    """No GPU, a small network, and the embedded data set with an epoch of 6 iterations and 5 validation
    images."""
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(train, "DeepLabV3Plus", Small)
    patch.setattr(data.Shapes, "TRAIN", 24)
    patch.setattr(data.Shapes, "VAL", 5)


def rank_main(argv, moment):
    """train.main as one rank. At the moment (what, count, signal) it sends itself the signal: in a step
    of that iteration, or while it predicts that many images for a validation; or it works in that folder."""
    torch.set_num_threads(1)
    os.setpgrp()
    shrink(pytest.MonkeyPatch())
    what, count, signum = moment or ("", 0, 0)
    seen = iter(range(1, 10 ** 6))
    if what == "ignored":
        signal.signal(signum, signal.SIG_IGN)
    if what == "folder":
        os.chdir(count)
    step, predict = train.train_step, evaluate.predict

    def watched_step(*args):
        if (what, count) in (("step", args[4]), ("ignored", args[4])):
            os.kill(os.getpid(), signum)
        return step(*args)

    def watched_predict(*args):
        if what == "image" and next(seen) == count:
            os.kill(os.getpid(), signum)
        time.sleep(0.01)  # so that a validation takes a good part of the run
        return predict(*args)

    train.train_step, evaluate.predict = watched_step, watched_predict
    train.main(argv)


def start(argv, ranks=1, moments=(), log=None, method="forkserver"):
    """Ranks of train.main, forked from a process that has imported torch already. moments: rank -> moment;
    log: a file for what they write to stderr."""
    context = multiprocessing.get_context(method)
    multiprocessing.set_forkserver_preload(["train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in range(ranks):
        environment = address | {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        processes.append(context.Process(target=with_environment, args=(
            environment, [str(a) for a in argv], dict(moments).get(rank), log)))
        processes[-1].start()
    return processes


def with_environment(environment, argv, moment, log):
    os.environ |= environment
    if log:
        os.dup2(os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
    rank_main(argv, moment)


def exit_codes(processes, timeout=600):
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def contents(out):
    """What two equal runs have in common: name -> tensor or plain value."""
    state = torch.load(out / "last.pth", weights_only=True)
    found = {f"{part}.{name}": t for part in ("student", "teacher") for name, t in state[part].items()}
    found |= {f"momentum.{i}": s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}
    best = torch.load(out / "best.pth", weights_only=True)
    found |= {f"best.{name}": t for name, t in best["teacher"].items()} | {"best": state["best"]}
    for log in ("hardness.csv", "result.txt"):
        found[log] = (out / log).read_text() if (out / log).exists() else None
    found["metrics"] = [{k: v for k, v in json.loads(line).items() if k != "images_per_second"}
                        for line in (out / "metrics.jsonl").read_text().splitlines()]
    return found | {"tensorboard": scalars(out)}


def scalars(out):
    """What TensorBoard reads: name -> [(step, value), ...]."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return {}
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
            if tag != "images_per_second"}


def assert_same_run(one, other):
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.equal(other[name]) if torch.is_tensor(value) else value == other[name], name


SHORT = [*TINY, "--iters", 12, "--eval-every", 1, "--log-every", 4]  # validations after 6 and 12


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_stopped_anywhere_also_while_it_validates_ends_in_the_same_bits(tmp_path, ranks):
    whole, out, last = start([*SHORT, "--out", tmp_path / "whole"], ranks), tmp_path / "out", ranks - 1
    # With two ranks, rank 0 has 3 images to validate on, and rank 1 two.
    images = -(-5 // ranks)
    for rank, moment, saved, due in [
            (0, ("step", 3, signal.SIGTERM), 4, False),
            (last, ("image", 1, signal.SIGUSR1), 6, True),
            (0, ("image", 2, signal.SIGHUP), 6, True),  # the validation that is made up
            (0, ("image", images + 2, signal.SIGINT), 12, True)]:  # the last one, of two networks
        assert exit_codes(start([*SHORT, "--out", out], ranks, {rank: moment})) == [1] * ranks
        state = torch.load(out / "last.pth", weights_only=True)
        assert (state["iteration"], state["validation_due"]) == (saved, due)
    assert exit_codes(start([*SHORT, "--out", out], ranks)) == [0] * ranks
    assert exit_codes(whole) == [0] * ranks
    assert_same_run(tmp_path / "whole", out)
    assert [r["iteration"] for r in lines(out)] == [4, 6, 8, 12, 12]


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_ignored(tmp_path):  # as under nohup
    moments = {0: ("ignored", 1, signal.SIGHUP)}
    assert exit_codes(start([*TINY, "--iters", 2, "--out", tmp_path / "out"], moments=moments)) == [0]


def kill_randomly(processes, rng):
    """-9 for all ranks, or for one, or a signal to one; the others must end. Returns False where the run had
    ended before."""
    if all(process.exitcode == 0 for process in processes):
        return False
    chosen = rng.choice(processes)
    for process in processes if rng.random() < 0.3 else [chosen]:
        process.join(0)
        if process.exitcode is None:
            os.kill(process.pid, rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1]))
    # A rank that waits for one that never joined is told by torchrun; here that is done for it.
    deadline = time.monotonic() + 60
    while all(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.terminate()
    assert None not in exit_codes(processes, 60)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("ranks, flags, times", [
    (1, "", 10), (1, "--workers 2", 10), (2, "", 5), (2, "--workers 2", 2),
    (1, "--supervised --workers 2", 3)])
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path, ranks, flags, times):
    # Every other iteration is saved, and every sixth validated, so the kills hit either at work.
    arguments = [*SHORT, "--iters", 30, "--checkpoint-every", 2, *flags.split()]
    began = time.monotonic()
    assert exit_codes(start([*arguments, "--out", tmp_path / "whole"], ranks)) == [0] * ranks
    seconds = time.monotonic() - began
    rng, kills, out = random.Random(f"{ranks} {flags}"), 0, tmp_path / "killed"
    while kills < times:
        processes = start([*arguments, "--out", out], ranks)
        time.sleep(rng.uniform(0.1, 1) * seconds)
        if kill_randomly(processes, rng):
            kills += 1
        else:
            assert_same_run(tmp_path / "whole", out)
            shutil.rmtree(out)  # finished: begin again, and kill sooner
            seconds *= 0.7
    assert exit_codes(start([*arguments, "--out", out], ranks)) == [0] * ranks
    assert_same_run(tmp_path / "whole", out)


def started(out, *flags, ranks=None):
    """The real command, in a process group of its own, once it trains."""
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    process = subprocess.Popen([sys.executable, *starter, str(HERE / "train.py"), *map(str, flags), "--out",
                                str(out)], stderr=subprocess.PIPE, text=True, cwd=HERE,
                               stdout=subprocess.DEVNULL, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"} | HIDDEN)
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.1)
        assert process.poll() is None
    return process


def alive(out):
    """The processes that write to a folder."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(out).encode() in line.read_bytes():
                found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks, group, signum", [
    (None, True, signal.SIGINT), (2, True, signal.SIGINT), (2, False, signal.SIGTERM),
    (2, False, signal.SIGKILL)])
def test_a_signal_ends_all_processes_and_the_run_is_saved(tmp_path, ranks, group, signum):
    # Ctrl-C reaches the whole process group: torchrun and the ranks. A scheduler may signal torchrun alone,
    # which passes SIGTERM on.
    out, began = tmp_path / "out", time.monotonic()
    process = started(out, *TINY, "--iters", 500, "--workers", 1, ranks=ranks)
    began, limit = time.monotonic(), soon(began)
    (os.killpg if group else os.kill)(process.pid, signum)
    _, errors = process.communicate(timeout=100)
    while alive(out):
        time.sleep(0.1)
    assert time.monotonic() - began < limit and process.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("train.py: ")]
    iteration = torch.load(out / "last.pth", weights_only=True)["iteration"]
    assert len(said) == 1 and f"; saved iteration {iteration}: the same command resumes it" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_process_that_is_killed_ends_all_others(tmp_path, ranks, workers):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = [*TINY, "--iters", 500, "--workers", workers, "--checkpoint-every", 1, "--out", out]
    for victim in ("rank", "torchrun"):
        file = out / ("metrics.jsonl" if victim == "rank" else "last.pth")
        before = file.stat().st_mtime_ns if file.exists() else 0
        torchrun = multiprocessing.get_context("forkserver").Process(target=agent, args=(flags, ranks, log))
        began = time.monotonic()
        torchrun.start()
        while not file.exists() or file.stat().st_mtime_ns == before:
            time.sleep(0.05)
        processes = children(torchrun.pid)
        assert len(processes) == ranks
        began, limit = time.monotonic(), soon(began)
        os.kill(processes[-1] if victim == "rank" else torchrun.pid, signal.SIGKILL)
        while any(living(pid) for pid in (torchrun.pid, *processes)):
            assert time.monotonic() - began < limit
            time.sleep(0.05)
    iteration = torch.load(out / "last.pth", weights_only=True)["iteration"]
    assert f"torchrun is gone; saved iteration {iteration}: the same command resumes it" in log.read_text()


def agent(flags, ranks, log):
    """Stands in for torchrun, which takes many seconds to start."""
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    start(flags, ranks, log=log, method="fork")


def living(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # that of a process that is not waited for
    except OSError:
        return False


def soon(began):
    """Ten seconds; on a busy machine, what the start has taken since `began`."""
    return max(10, time.monotonic() - began)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_signal_ends_a_run_that_waits_for_another_rank(tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    waiting, stopped = processes = start([*TINY, "--iters", 500, "--out", out], 2, log=log)
    limit = wait_for(out / "metrics.jsonl", processes)
    os.kill(stopped.pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(waiting.pid, signal.SIGTERM)
    assert exit_codes([waiting], limit) == [1]
    assert "stopped by a signal while it waited for a disk, a device or another rank" in log.read_text()
    os.kill(stopped.pid, signal.SIGCONT)
    os.kill(stopped.pid, signal.SIGTERM)  # as torchrun does; gloo may not say that the other is gone
    assert exit_codes([stopped], limit) == [1]


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_may_take_its_time_to_save(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(run_module.StopWatch, "PATIENCE", 1.2)
    with run_module.StopWatch() as watch:
        watch.ask("stopped by a test")
        for _ in range(5):
            time.sleep(0.5)
            watch.advance()  # as it writes
        until = time.process_time() + 2.5
        while time.process_time() < until:  # and computes
            pass
        assert not ended
        time.sleep(3.5)
        assert ended
    assert not watch.thread.is_alive()


def wait_for(file, processes):
    began = time.monotonic()
    while not file.exists():
        time.sleep(0.1)
        assert all(process.is_alive() for process in processes)
    return soon(began)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_a_run_that_waits_for_a_disk(tmp_path, workers):
    root, out, log = custom(tmp_path / "data"), tmp_path / "out", tmp_path / "log"
    process, = start(["--dataset", "custom", "--data-root", root, *TINY, "--iters", 500, "--workers", workers,
                      "--out", out], log=log)
    limit = wait_for(out / "metrics.jsonl", [process])
    for image in (root / "JPEGImages").iterdir():
        image.unlink()
        os.mkfifo(image)  # who reads it waits for ever
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    assert exit_codes([process], limit) == [1]
    told = "saved iteration" if workers else "while it waited for a disk"
    assert told in log.read_text() and (out / "last.pth").exists() == bool(workers)


@pytest.mark.slow
def test_ranks_whose_copies_of_the_data_differ_learn_it_at_the_start(tmp_path):
    log = tmp_path / "log"
    for copy in "AB":
        custom(tmp_path / copy / "data")
    (tmp_path / "B/data/JPEGImages/im9.jpg").unlink()
    flags = ["--dataset", "custom", "--data-root", "data", *TINY, "--epochs", 2, "--out", tmp_path / "out"]
    folders = {0: ("folder", tmp_path / "A", 0), 1: ("folder", tmp_path / "B", 0)}
    assert exit_codes(start(flags, 2, folders, log), 60) == [2, 2]
    assert re.fullmatch(r"train.py: rank 1 \(\S+\) has 3 unlabelled images, rank 0 \(\S+\) 4; rank 1 lacks "
                        r"im9; make their copies of the data equal\n", log.read_text())
    shutil.copytree(tmp_path / "A", tmp_path / "B", dirs_exist_ok=True)
    assert exit_codes(start(flags, 2, folders), 60) == [0, 0]


def stop_handlers():
    return [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)]


def test_signals_are_handled_as_before_once_main_returns_or_raises(tmp_path, small, monkeypatch):
    before, during = stop_handlers(), []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: (during.append(stop_handlers()), step(*a))[1])
    flags = [*TINY, "--iters", "1", "--workers", "1", "--out"]
    train.main([*flags, str(tmp_path / "out")])
    assert stop_handlers() == before and during[0] != before
    with pytest.raises(SystemExit):
        train.main([*flags, str(tmp_path / "other"), "--lr", "1e30", "--iters", "3"])
    assert stop_handlers() == before


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch)


def test_loading_takes_no_process_no_shared_memory_and_no_socket(tmp_path, small, monkeypatch):
    # A small /dev/shm is no trouble then, nor is a TMPDIR that is too long for sockets.
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch_of_a_job" / ("long" * 30)))
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", None)
    assert run(*TINY, "--iters", 2, "--workers", 2, "--out", tmp_path / "out")[0] == 0


def run(*flags):
    """train.main in this process: (exit code, stdout, stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            train.main([str(flag) for flag in flags])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def run_until(iteration, *flags):
    """The same, stopped by a signal in that iteration."""
    step = train.train_step

    def watched(*args):
        if args[4] == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", watched)
        code, _, err = run(*flags)
    assert code == 1 and f"stopped by a signal; saved iteration {iteration + 1}" in err, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 8 iterations that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert run(*EIGHT, "--out", out)[0] == 0
    return out


EIGHT = [*TINY, "--iters", 8, "--eval-every", 1]


@pytest.mark.parametrize("name", ["last.pth.tmp", "best.pth.tmp", "result.txt.tmp", "predictions.png",
                                  "metrics.jsonl", "hardness.csv", "tensorboard/events.out.tfevents.0"])
def test_a_full_disk_ends_the_run_with_one_line_and_leaves_all_as_it_was(tmp_path, small, name):
    if "tensorboard" in name:
        pytest.importorskip("tensorboard")
    out, file = tmp_path / "out", tmp_path / "out" / name
    run_until(3, *EIGHT, "--out", out)
    before = (out / "last.pth").read_bytes()
    if file.exists():
        file.rename(tmp_path / "kept")
    file.symlink_to("/dev/full")  # which refuses every byte, as a full disk does
    code, _, err = run(*EIGHT, "--out", out)
    assert code == 1 and len(err.splitlines()) == 1 and "No space left on device" in err
    assert "make room, and the same command resumes" in err and str(out) in err
    assert (out / "last.pth").read_bytes() == before and not list(out.glob("*.tmp"))
    file.unlink(missing_ok=True)
    if (tmp_path / "kept").exists():
        (tmp_path / "kept").rename(file)
    assert run(*EIGHT, "--out", out)[0] == 0
    assert run(*EIGHT, "--out", tmp_path / "whole")[0] == 0
    assert_same_run(tmp_path / "whole", out)


def test_a_disk_that_is_full_at_the_start_is_said(tmp_path, small):
    (tmp_path / "settings.json.tmp").symlink_to("/dev/full")
    code, _, err = run(*EIGHT, "--out", tmp_path)
    assert code == 2 and len(err.splitlines()) == 1 and "No space left on device); make room" in err
    assert run(*TINY, "--iters", 1, "--out", tmp_path)[0] == 0


@pytest.mark.slow
def test_two_live_runs_cannot_share_a_folder(tmp_path):
    out = tmp_path / "out"
    process, = start([*TINY, "--iters", 500, "--out", out])
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.1)
        assert process.is_alive()
    code, _, err = run(*TINY, "--iters", 500, "--out", out)
    assert code == 2 and "another live run" in err
    process.kill()
    process.join()


def test_what_cannot_change_a_results_meaning_may_differ_on_resuming(tmp_path, small):
    out, lists = tmp_path / "out", tmp_path / "list.txt"
    run_until(2, *EIGHT, "--out", out)
    lists.write_text((out / "labelled.txt").read_text())
    code, said, err = run(*EIGHT, "--out", out, "--accumulate", 2, "--log-every", 3, "--eval-every", 2,
                          "--workers", 1, "--checkpoint-every", 1, "--split", lists)
    assert code == 0 and "resumes at iteration 3 of 8" in said and "holds a run" not in err
    assert [r["iteration"] for r in lines(out)] == [2, 6, 8, 8]
    with pytest.MonkeyPatch.context() as patch:  # each line holds the mean since the line before
        patch.setattr(train, "train_step", constant_step)
        run_until(2, *EIGHT, "--out", tmp_path / "other")
        assert run(*EIGHT, "--log-every", 3, "--out", tmp_path / "other")[0] == 0
    losses = {r["iteration"]: r["L"] for r in lines(tmp_path / "other") if "L" in r}
    assert losses == {2: 0.5, 6: 3.5, 8: 6.5}


def constant_step(student, teacher, optimizer, batch, iteration, args):
    """A step that measures its own iteration."""
    return torch.full((len(METRICS),), float(iteration)), torch.zeros(args.batch_size)


@pytest.mark.parametrize("flags, change", [
    ("--tau 0.4 --seed 1", "tau 0.3 -> 0.4, seed 0 -> 1"), ("--iters 9", "iters 8 -> 9"),
    ("--amp", "amp False -> True"), ("--split 1_8", "more labelled images"),
    ("--supervised", "supervised False -> True")])
def test_a_folder_of_other_settings_is_refused_and_they_are_named(whole, small, flags, change):
    before = {file: file.read_bytes() for file in whole.iterdir() if file.is_file()}
    code, _, err = run(*EIGHT, "--out", whole, *flags.split())
    assert code == 2 and change in err and len(err.splitlines()) == 1
    assert before == {file: file.read_bytes() for file in before}
    assert ("give another --out" in err) == (flags != "--iters 9")


@pytest.mark.slow
@pytest.mark.parametrize("length", [("--iters", 2), ("--epochs", 2)])
def test_more_epochs_than_a_finished_run_had_start_from_its_weights(tmp_path, monkeypatch, length):
    monkeypatch.setattr(data.Shapes, "VAL", 5)
    monkeypatch.setattr(data.Shapes, "TRAIN", 24)
    out, fewer = tmp_path / "out", (length[0], 1)
    assert run(*TINY, *fewer, "--out", out)[0] == 0
    code, _, err = run(*TINY, *length, "--out", out)
    remedy = re.search(r"it is finished; to train on from its weights, add (--weights \S+ --out \S+)$", err)
    assert code == 2 and remedy, err
    code, said, err = run(*TINY, *length, "--out", out, *remedy[1].split())
    assert code == 0 and Path(f"{out}-2/result.txt").exists(), err


def test_amps_default_may_differ_on_another_device(tmp_path, small, monkeypatch):
    flags = [flag for flag in EIGHT if flag != "--no-amp"]
    parse = train.parse_arguments

    def on_a_gpu(argv):
        args = parse(argv)
        args.amp = args.amp or args.default_amp
        return args

    monkeypatch.setattr(train, "parse_arguments", on_a_gpu)
    run_until(2, *flags, "--out", tmp_path / "out")
    monkeypatch.setattr(train, "parse_arguments", parse)
    code, said, _ = run(*flags, "--out", tmp_path / "out")
    assert code == 0 and "resumes without bf16 autocast, the default here" in said
    code, _, err = run(*flags, "--out", tmp_path / "out", "--amp")
    assert code == 2 and "amp False -> True" in err


def test_a_loss_that_is_not_finite_saves_nothing_and_its_remedies_work(tmp_path, small):
    flags, out = [*EIGHT, "--lr", "1e30", "--out"], tmp_path / "out"
    code, _, err = run(*flags, out)
    assert code == 1 and len(err.splitlines()) == 1 and not (out / "last.pth").exists()
    assert re.search(r"L_x.* is not finite in iteration \d+, with the images train_\d+", err)
    assert "give a lower --lr and another --out" in err
    assert run(*flags, tmp_path / "another", "--lr", "0.01")[0] == 0
    # A folder without a checkpoint takes other settings, and nothing of the old ones stays.
    assert run(*flags, out, "--lr", "0.01")[0] == 0
    assert_same_run(tmp_path / "another", out)
    for name in ("settings.json", "labelled.txt", "unlabelled.txt", "val.txt"):
        old, new = ((folder / name).read_text() for folder in (tmp_path / "another", out))
        assert old.replace("another", "out") == new


def test_weights_that_are_not_finite_are_not_saved(tmp_path, small, monkeypatch):
    def step(student, *rest):
        next(student.parameters()).data.fill_(float("nan"))
        return constant_step(student, *rest)

    monkeypatch.setattr(train, "train_step", step)
    code, _, err = run(*TINY, "--iters", 1, "--out", tmp_path / "out")
    assert code == 1 and "not finite after iteration 1; best.pth is untouched" in err
    assert not list((tmp_path / "out").glob("*.pth*"))


def test_a_photograph_that_can_only_be_removed_does_not_cost_the_run(tmp_path, small):
    root, out = custom(tmp_path / "data", images=24, masks=8), tmp_path / "out"
    flags = ["--dataset", "custom", "--data-root", root, *TINY, "--epochs", 4, "--out", out]
    run_until(5, *flags)  # of 16 iterations
    for stem in ("im7", "im9", "im10", "im11", "im12", "im13"):
        (root / "JPEGImages" / f"{stem}.jpg").unlink()
    (root / "SegmentationClass" / "im7.png").unlink()
    (root / "ImageSets/Segmentation/val.txt").write_text("im6\n")
    code, said, err = run(*flags)
    assert code == 0, err
    assert ("unlabelled images are gone (5: im10, im11, im12 and 2 more): from iteration 6 on, the run "
            "uses the 11 that are left") in said
    assert "val images are gone (1: im7): from iteration 6 on, the run uses the 1 that are left" in said
    assert lines(out)[-1]["iteration"] == 16  # as long a run as before
    drawn = [row.split(",")[:2] for row in (out / "hardness.csv").read_text().splitlines()[1:]]
    kept = {f"im{i}" for i in (8, *range(14, 24))}
    assert {name for iteration, name in drawn if int(iteration) >= 6} == kept
    assert set((out / "unlabelled.txt").read_text().split()) == kept
    save(root / "JPEGImages" / "im30.jpg", np.zeros((12, 16, 3)))
    save(root / "JPEGImages" / "im31.jpg", np.zeros((12, 16, 3)))
    save(root / "SegmentationClass" / "im31.png", np.zeros((12, 16)))
    code, _, err = run(*flags)
    assert code == 2 and "more labelled images (1), more unlabelled images (1)" in err
    assert err.count("give another --out; where images were removed, keep the lists") == 1


@pytest.mark.parametrize("masks", [10, 20])
def test_a_labelled_image_is_removed_and_the_run_resumes(tmp_path, small, masks):
    root, out = custom(tmp_path / "data", images=masks + 4, masks=masks, val=0), tmp_path / "out"
    flags = ["--dataset", "custom", "--data-root", root, *TINY, "--iters", 4, "--out", out]
    run_until(1, *flags)
    (root / "JPEGImages" / "im1.jpg").unlink()
    (root / "SegmentationClass" / "im1.png").unlink()
    code, said, err = run(*flags)
    if masks == 20:  # of which validation has a fifth, and now one less
        assert code == 2 and "more labelled images (1)" in err and f"--split {out}/labelled.txt" in err
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        shutil.copy(out / "val.txt", root / "ImageSets/Segmentation/")
        labelled = (out / "labelled.txt").read_text()
        (out / "labelled.txt").write_text(labelled.replace("im1\n", ""))
        code, said, err = run(*flags, "--split", out / "labelled.txt")
    assert code == 0 and "labelled images are gone (1: im1): from iteration 2 on" in said, err


def test_another_data_root_is_said(tmp_path, small):
    root, out = custom(tmp_path / "data"), tmp_path / "out"
    flags = ["--dataset", "custom", *TINY, "--iters", 2, "--out", out, "--data-root"]
    assert run(*flags, root)[0] == 0
    moved = root.rename(tmp_path / "moved")
    assert f"--data-root was {root}, now {moved}; if it has other images, give another --out" in (
        run(*flags, moved)[1])


def test_a_hardness_log_without_a_header_as_runs_had_it_is_resumed(whole, small, tmp_path, monkeypatch,
                                                                   capsys):
    out, header = tmp_path / "out", "iteration,id,gamma (1 = hardest)\n"
    run_until(3, *EIGHT, "--out", out)
    text = (out / "hardness.csv").read_text()
    assert text.startswith(header)
    (out / "hardness.csv").write_text(text.removeprefix(header) + "4,what the checkpoint does not know,0\n")
    state = torch.load(out / "last.pth", weights_only=True)
    state["log_sizes"]["hardness.csv"] -= len(header)
    torch.save(state, out / "last.pth")
    assert run(*EIGHT, "--out", out)[0] == 0
    after = (whole / "hardness.csv").read_text()
    assert (out / "hardness.csv").read_text() == after.removeprefix(header)

    monkeypatch.setattr(sys, "argv", ["compare.py", str(whole), str(out)])
    for text, code, said in ((None, 0, "equal: "), (after[:-2] + "x\n", 1, "differs: hardness.csv\n")):
        if text:
            (out / "hardness.csv").write_text(text)
        with pytest.raises(SystemExit) as end:
            compare.main()  # the header is no difference
        assert end.value.code == code and capsys.readouterr().out.startswith(said)
    (out / "last.pth").unlink()
    with pytest.raises(SystemExit):
        compare.main()
    assert f"{out}: no last.pth in it; give the folder of a finished run" in capsys.readouterr().err


def test_best_pth_in_place_of_last_pth_gets_a_line_of_its_own(whole, small, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.copy(out / "best.pth", out / "last.pth")
    code, _, err = run(*EIGHT, "--out", out)
    assert code == 2 and len(err.splitlines()) == 1
    assert "last.pth: there is no checkpoint to resume from" in err
    assert f"start from the best with --weights {out / 'last.pth'} and another --out" in err
    shutil.copy(whole / "last.pth", out / "last.pth")
    assert run(*EIGHT, "--out", out)[0] == 0


def test_a_run_that_never_had_a_last_pth_begins_again(whole, small, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("last.pth", "result.txt"):
        (out / name).unlink()
    assert run(*EIGHT, "--out", out)[0] == 0
    assert_same_run(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_a_best_pth_starts_another_run(tmp_path, monkeypatch, there):
    monkeypatch.setattr(data.Shapes, "VAL", 5)
    out, flags = tmp_path / "out", [*TINY, "--iters", 1, "--out"]
    assert run(*flags, out)[0] == 0
    before = (out / "metrics.jsonl").read_bytes()
    if there:
        (out / "best.pth").rename(out / "last.pth")
    else:
        (out / "last.pth").unlink()
    code, _, err = run(*flags, out)
    assert code == 2 and (out / "metrics.jsonl").read_bytes() == before
    remedy = re.search(r"start from the best with (--weights \S+) and another --out", err)[1].split()
    code, said, err = run(*flags, tmp_path / "another", *remedy)
    assert code == 0, err


@pytest.mark.parametrize("change", [
    lambda state: state | {"student": {}}, lambda state: state | {"optimizer": {}},
    lambda state: {name: state[name] for name in ("settings", "classes", "student", "teacher")}])
def test_a_broken_checkpoint_is_refused_and_the_logs_are_kept(whole, small, tmp_path, change):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    torch.save(change(torch.load(out / "last.pth", weights_only=True)), out / "last.pth")
    before = (out / "metrics.jsonl").read_text()
    code, _, err = run(*EIGHT, "--out", out)
    assert code == 2 and "last.pth: not the last checkpoint of this run" in err
    assert (out / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_resumed_run_no_longer_needs_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(data.Shapes, "VAL", 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weights = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    flags = [*EIGHT, "--weights", weights, "--out", tmp_path / "out"]
    run_until(2, *flags)
    weights.unlink()
    assert run(*flags)[0] == 0


def test_a_class_that_occurs_nowhere_is_null_and_the_others_are_logged(tmp_path, small, monkeypatch):
    def no_third_class(network, image, *rest):
        return torch.zeros(image.shape[1:], dtype=torch.uint8)

    monkeypatch.setattr(evaluate, "predict", no_third_class)
    root = custom(tmp_path / "data", classes="sky\nroad\nsea\n")
    code, said, err = run("--dataset", "custom", "--data-root", root, *TINY, "--iters", 2, "--out",
                          tmp_path / "out")
    assert code == 0, err
    text = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1]
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["iou_teacher"] == record["iou_student"] == {"sky": 0.5, "road": 0.0, "sea": None}
    assert record["miou_teacher"] == 0.25
    logged = scalars(tmp_path / "out")
    if logged:
        assert logged["iou_teacher/sky"] == [(1, 0.5), (2, 0.5)] and "iou_teacher/sea" not in logged
        assert logged["miou_student"] == [(2, 0.25)] and logged["L"][0][0] == 2


NO_POSIX = """
import sys; sys.path.insert(0, {here!r})
import signal
sys.modules["fcntl"] = None  # an import of it fails
for name in ("SIGHUP", "SIGUSR1"):
    delattr(signal, name)
import data, train
data.Shapes.TRAIN, data.Shapes.VAL = 24, 5
if __name__ == "__main__":
    train.main()
"""


@pytest.mark.slow
def test_the_locks_and_signals_of_posix_are_left_out_where_there_are_none(tmp_path):
    script = tmp_path / "windows.py"
    script.write_text(NO_POSIX.format(here=str(HERE)))
    result = launch(*TINY, "--iters", 2, "--out", tmp_path / "out", script=script)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_a_file_system_without_locks_gets_a_line(tmp_path, small, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    code, said, _ = run(*TINY, "--iters", 1, "--out", tmp_path / "out")
    assert code == 0 and "its file system has no locks; let no other run write there" in said


@pytest.mark.parametrize("change, flags, told", [
    ({"classes": ["a", "b"]}, "", "changed.pth: does not fit its own settings"),
    ({}, "--data-root {}", "shapes, which are drawn; leave the flag out"),
    ({"dataset": "custom"}, "--data-root {}", "trained on the classes background, rings")])
def test_a_checkpoint_of_another_data_set_is_refused(whole, tmp_path, capsys, monkeypatch, change, flags,
                                                     told):
    monkeypatch.setattr(evaluate, "DeepLabV3Plus", Small)
    state = torch.load(whole / "last.pth", weights_only=True)
    if "dataset" in change:
        change = {"settings": state["settings"] | change}
    torch.save(state | change, tmp_path / "changed.pth")
    with pytest.raises(SystemExit) as ended:
        evaluate.main([str(tmp_path / "changed.pth"), *flags.format(custom(tmp_path / "data")).split()])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and told in said


def damage(root, name="im9"):
    """A photograph that is found to be broken only when all of it is read."""
    (root / "JPEGImages" / f"{name}.jpg").unlink()
    path = root / "JPEGImages" / f"{name}.png"
    save(path, np.random.default_rng(0).integers(0, 256, (300, 300, 3)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_photograph_that_turns_out_to_be_broken_is_named_and_can_be_removed(tmp_path, small, workers):
    root = custom(tmp_path / "data", images=12)
    flags = ["--dataset", "custom", "--data-root", root, *TINY, "--iters", 9, "--workers", workers, "--out",
             tmp_path / "out"]
    damage(root)
    code, _, err = run(*flags)
    assert code == 1 and len(err.splitlines()) == 1
    assert "im9.png: cannot be read (" in err and "replace or remove it; saved iteration" in err
    (root / "JPEGImages" / "im9.png").unlink()
    code, said, err = run(*flags)
    assert code == 0 and "unlabelled images are gone (1: im9)" in said, err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_validation_image_that_turns_out_to_be_broken_can_be_replaced(tmp_path, small, workers):
    root, out = custom(tmp_path / "data", images=12), tmp_path / "out"
    flags = ["--dataset", "custom", "--data-root", root, *TINY, "--iters", 2, "--workers", workers,
             "--eval-every", 9, "--out"]
    assert run(*flags, tmp_path / "whole")[0] == 0
    whole = (root / "JPEGImages" / "im5.jpg").read_bytes()
    damage(root, "im5")
    save(root / "SegmentationClass/im5.png", np.zeros((300, 300)))
    code, _, err = run(*flags, out)
    assert code == 1 and len(err.splitlines()) == 1 and "im5.png: cannot be read (" in err
    assert "saved iteration 2: the same command resumes it" in err
    (root / "JPEGImages" / "im5.png").unlink()
    (root / "JPEGImages" / "im5.jpg").write_bytes(whole)
    save(root / "SegmentationClass/im5.png", np.arange(12 * 16).reshape(12, 16) % 2)
    assert run(*flags, out)[0] == 0
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
def test_a_broken_photograph_is_named_once_on_two_ranks(tmp_path):
    root = custom(tmp_path / "data", images=12)
    damage(root)
    result = launch("--dataset", "custom", "--data-root", root, *TINY, "--iters", 40, "--out",
                    tmp_path / "out", ranks=2)
    said = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert result.returncode == 1 and len(said) == 1
    assert "im9.png: cannot be read (" in said[0] and "saved iteration" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_evaluate_names_a_broken_photograph(tmp_path, ranks):
    root, out = custom(tmp_path / "data", images=12), tmp_path / "out"
    assert run("--dataset", "custom", "--data-root", root, *TINY, "--iters", 1, "--out", out)[0] == 0
    damage(tmp_path / "data", "im5")  # the second of the validation images: rank 1's
    save(tmp_path / "data/SegmentationClass/im5.png", np.zeros((300, 300)))
    result = launch(tmp_path / "out" / "last.pth", "--workers", 1, ranks=ranks, script="evaluate.py")
    said = [line for line in result.stderr.splitlines() if line.startswith("evaluate.py: ")]
    assert result.returncode == (1 if ranks else 2) and len(said) == 1
    assert "im5.png: cannot be read (" in said[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to ...")])
def test_memory_that_runs_out_gets_one_line(tmp_path, small, monkeypatch, error):
    def failing(*args):
        raise error

    flags = [*EIGHT, "--out", tmp_path / "out"]
    run_until(2, *flags)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", failing)
        code, _, err = run(*flags)
    assert code == 1 and len(err.splitlines()) == 1 and "out of memory; raise --accumulate" in err
    code, said, _ = run(*flags, "--accumulate", 2)
    assert code == 0 and "resumes at iteration 3 of 8" in said


def test_the_search_for_fast_convolutions_waits_until_the_panels_are_drawn(tmp_path, small, monkeypatch):
    seen, drawn, step = [], run_module.panel, train.train_step

    def benchmarking_step(*args):
        torch.backends.cudnn.benchmark = True  # as on a GPU
        return step(*args)

    monkeypatch.setattr(train, "train_step", benchmarking_step)
    monkeypatch.setattr(run_module, "panel",
                        lambda *a: (seen.append(torch.backends.cudnn.benchmark), drawn(*a))[1])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert run(*TINY, "--iters", 1, "--out", tmp_path / "out")[0] == 0
    assert seen == [False] and torch.backends.cudnn.benchmark


OUT_OF_MEMORY = """
import sys; sys.path.insert(0, {here!r})
import data, torch, train
from ranks import rank
data.Shapes.VAL = 5
step = train.train_step

def failing(*args):
    if args[4] == 3 and rank() in {ranks}:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return step(*args)

train.train_step = failing
if __name__ == "__main__":
    train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[1], [0, 1]])
def test_memory_that_runs_out_on_one_rank_or_on_all_gets_one_line(tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(data.Shapes, "VAL", 5)
    script, out = tmp_path / "failing.py", tmp_path / "out"
    script.write_text(OUT_OF_MEMORY.format(here=str(HERE), ranks=ranks))
    flags = [*TINY, "--iters", 6, "--checkpoint-every", 2, "--out", out]
    result = launch(*flags, ranks=2, script=script)
    said = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert result.returncode == 1 and len(said) == 1 and "raise --accumulate" in said[0]
    assert "rank0]" not in result.stderr and "rank1]" not in result.stderr
    code, said, _ = run(*flags, "--accumulate", 2)
    assert code == 0 and "resumes at iteration 2 of 6" in said


OLD_PYTHON = """
import collections, sys, numpy, torch, torchvision, PIL.Image; sys.path[:0] = [{here!r}, {here!r} + "/tools"]
Version = collections.namedtuple("Version", "major minor")
sys.version_info = Version(3, 9)
for script in ("train", "evaluate", "predict", "prepare", "bench"):
    try:
        __import__(script)
    except SystemExit as end:
        print(end)
"""


@pytest.mark.slow
def test_an_old_python_gets_one_line_from_every_command():
    result = subprocess.run([sys.executable, "-c", OLD_PYTHON.format(here=str(HERE))], capture_output=True,
                            text=True)
    assert result.stdout == 5 * "HagSeg needs Python 3.10 or later; this is 3.9\n", result.stderr


def test_all_files_can_be_parsed_by_an_old_python_that_is_to_get_that_line():
    for path in HERE.glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 9))


def test_the_log_explains_its_columns_and_shows_iteration_1(tmp_path, small):
    code, out, _ = run(*TINY, "--iters", 2, "--log-every", 2, "--out", tmp_path)
    said = out.splitlines()
    start = next(i for i, line in enumerate(said) if line.startswith("L_x and L_u: losses"))
    headings, first, last = said[start + 2:start + 5]
    assert code == 0 and said[start - 1].startswith("2 iterations on 1 x cpu")
    assert said[start + 1].startswith("confident: share of pixels")
    assert headings.split() == "iteration L_x L_u gamma confident CutMix fired lr images/s time left".split()
    assert re.match(r" +1/2 +\d", first) and re.match(r" +2/2 +\d", last)
    assert len(headings) == len(first) == len(last) < 100
    record, *_ = lines(tmp_path)
    assert record["iteration"] == 2 and record.keys() >= {"L_x", "L_u", "gamma", "confident", "cutmix_fired"}
    _, out, _ = run(*TINY, "--iters", 1, "--supervised", "--out", tmp_path / "supervised")
    said = out.splitlines()
    start = next(i for i, line in enumerate(said) if line.startswith("L_x: loss on labelled images"))
    assert said[start + 1].split() == "iteration L_x lr images/s time left".split()


@pytest.mark.parametrize("tau, taught", [(0, True), (1, False)])
def test_a_run_that_its_unlabelled_images_taught_nothing_says_so(tmp_path, small, tau, taught):
    flags = [*TINY, "--tau", tau, "--iters", 6, "--out", tmp_path / "hagseg-hagseg"]
    _, out, _ = run(*flags)
    assert f"--beside {tmp_path}/hagseg-supervised/last.pth" in out
    *_, said, remedy = out.splitlines()
    assert said.startswith("The unlabelled images taught this run nothing: in its last third, 0.0%") != taught
    if not taught:
        assert remedy == "Lower --tau, now 1.0, and give another --out."
        assert run(*flags, "--tau", 0.3, "--out", tmp_path / "other")[0] == 0
    assert "taught" not in run(*flags, "--supervised", "--out", tmp_path / "supervised")[1]


@pytest.mark.parametrize("val, noisy", [(2, True), (10, False)])
def test_a_result_of_few_validation_images_is_called_noisy(tmp_path, small, val, noisy):
    root = custom(tmp_path / "data", images=18, masks=14, val=val)
    flags = ["--dataset", "custom", "--data-root", root, "--iters", 1, "--out", tmp_path / "out"]
    _, out, _ = run(*TINY, *flags)
    assert ("It is noisy: the number of validation images is 2.\n" in out) == noisy


def test_the_lists_of_a_run_are_kept_as_the_line_says(tmp_path, small):
    root, out = custom(tmp_path / "data", images=24, masks=20, val=0), tmp_path / "my run"
    flags = ["--dataset", "custom", "--data-root", root, *TINY, "--iters", 4, "--out", out]
    run_until(1, *flags)
    (root / "JPEGImages/im1.jpg").unlink()
    (root / "SegmentationClass/im1.png").unlink()
    code, _, err = run(*flags)
    remedy = re.search("keep the lists, and take those off them: (--split .*), and ", err)[1]
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    shutil.copy(out / "val.txt", root / "ImageSets/Segmentation")
    (out / "labelled.txt").write_text((out / "labelled.txt").read_text().replace("im1\n", ""))
    code, said, err = run(*flags, *shlex.split(remedy))
    assert code == 0 and "resumes at iteration 2 of 4" in said, err


@pytest.mark.slow
@pytest.mark.parametrize("name, gone", [("my run", ()), ("run", ("last.pth",))], ids=["a space", "best.pth"])
def test_the_flags_that_train_a_finished_run_on_are_pasted(tmp_path, monkeypatch, name, gone):
    monkeypatch.setattr(data.Shapes, "VAL", 5)
    out = tmp_path / name
    assert run(*TINY, "--iters", 1, "--out", out)[0] == 0
    for file in gone:
        (out / file).unlink()
    code, _, err = run(*TINY, "--iters", 2, "--out", out)
    assert code == 2 and "it is finished" in err
    code, _, err = run(*TINY, "--iters", 2, "--out", out, *shlex.split(err.strip().rpartition(", add ")[2]))
    assert code == 0 and (tmp_path / f"{name}-2/result.txt").exists(), err


@pytest.mark.parametrize("what", ["append", "truncate"])
def test_a_log_is_made_writable_and_the_same_command_resumes(tmp_path, small, monkeypatch, what):
    flags, opened = [*TINY, "--iters", 8, "--out", tmp_path / "out"], open
    run_until(2, *flags)
    with opened(tmp_path / "out/metrics.jsonl", "a") as log:
        log.write("what the checkpoint does not know\n")

    def refuse(path, mode="", *rest, **options):
        if Path(path).name == "metrics.jsonl" and (what == "truncate" or "a" in mode):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*(("builtins.open", refuse) if what == "append" else (os, "truncate", refuse)))
        code, _, err = run(*flags)
    assert code == 1 and "metrics.jsonl: cannot be written (Permission denied); make it writable" in err
    code, said, _ = run(*flags)
    assert code == 0 and "resumes at iteration 3 of 8" in said
