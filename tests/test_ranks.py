"""What the ranks do together, on two processes of gloo; and alone."""

import importlib
import io
import multiprocessing
import re
import sys
import time

import pytest
import torch
from torch import nn

import ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("half", [{}, {"RANK": "1"}, {"LOCAL_RANK": "3", "MASTER_PORT": "1"},
                                  {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": ""}])
def test_one_process_needs_no_variable_of_torchrun_and_heeds_no_half_of_them(monkeypatch, half):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in half.items():
        monkeypatch.setenv(name, value)
    assert ranks.join().type in ("cpu", "cuda")
    assert (ranks.rank(), ranks.world_size()) == (0, 1)


def test_several_processes_need_all_of_them(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ranks.StartError, match="4, without MASTER_ADDR and MASTER_PORT: start"):
        ranks.join()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # each process needs a GPU of its own
    with pytest.raises(ranks.StartError, match="MASTER_ADDR and MASTER_PORT and LOCAL_RANK: start"):
        ranks.join()
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ranks.StartError, match="more processes than GPUs; give at most 2"):
        ranks.join()
    monkeypatch.delenv("WORLD_SIZE")  # the remedy
    ranks.join()


def test_alone_each_function_is_the_plain_thing():
    whole = torch.arange(6).view(3, 2)
    assert ranks.gather(whole).equal(whole) and ranks.own(whole).equal(whole)
    assert ranks.sum_over_ranks(whole).equal(whole)
    assert ranks.together(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        ranks.together(divmod, 7, 0)


def fail_on(rank):
    if ranks.rank() == rank:
        raise ValueError(f"of rank {rank}")
    return ranks.rank()


def one_of_two(rank, results, meeting):
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    found = {"rank": ranks.rank(), "world": ranks.world_size(), "together": ranks.together(fail_on, None)}
    for failing in (0, 1):
        try:
            ranks.together(fail_on, failing)
        except ValueError as error:
            found[f"error {failing}"] = str(error)
    found["gather"] = ranks.gather(torch.tensor([[rank, 1], [rank, 2]])).tolist()
    found["own"] = ranks.own(torch.arange(6)).tolist()
    found["sum"] = ranks.sum_over_ranks(torch.tensor([rank + 1])).item()
    norm = nn.BatchNorm2d(2)
    norm.running_mean += rank
    norm.running_var += 2 * rank
    ranks.average_buffers(norm)
    found["means"] = norm.running_mean.tolist() + norm.running_var.tolist()
    for there in (["a", "b"], ["a", "b", "c"][:2 + rank], ["a", "b"][::1 - 2 * rank]):
        try:
            ranks.demand_same_lists({"classes": ["sky"], "images": there})
            found.setdefault("lists", []).append("equal")
        except ranks.StartError as error:
            found["lists"].append(re.sub(r"\(.*?\)", "(HOST)", str(error)))
    time.sleep(1 - rank)
    found["about to end"] = time.time()
    try:
        failing_command()
    finally:
        results.put(found | {"ended": time.time()})


@ranks.command_line
def failing_command(argv=None):
    raise ranks.CommandError("the reason")


@pytest.mark.slow
def test_two_ranks_share_a_batch_and_their_exceptions_and_end_together(tmp_path, capfd):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=one_of_two, args=(r, results, tmp_path / "meet")) for r in (0, 1)]
    for process in processes:
        process.start()
    found = sorted((results.get(timeout=120) for _ in processes), key=lambda each: each["rank"])
    for process in processes:
        process.join(60)
    for rank, each in enumerate(found):
        assert (each["rank"], each["world"], each["together"]) == (rank, 2, rank)
        assert (each["error 0"], each["error 1"]) == ("of rank 0", "of rank 1")
        assert each["gather"] == [[0, 1], [0, 2], [1, 1], [1, 2]]
        assert each["own"] == [3 * rank, 3 * rank + 1, 3 * rank + 2]
        assert each["sum"] == 3 and each["means"] == [0.5, 0.5, 2, 2]
        assert each["lists"] == [
            "equal", "rank 1 (HOST) has 3 images, rank 0 (HOST) 2; rank 0 lacks c; make their copies of the "
            "data equal", "rank 1 (HOST) has 2 images, rank 0 (HOST) 2; make their copies of the data equal"]
    assert [process.exitcode for process in processes] == [2, 2]
    assert found[1]["ended"] > found[0]["about to end"]  # the second waited for the first
    assert capfd.readouterr().err.count("test_ranks.py: the reason\n") == 1


class Ended(ranks.CommandError):
    exit_code = 1


@pytest.mark.parametrize("error, code", [(ranks.CommandError, 2), (Ended, 1), (ranks.StartError, 2)])
def test_a_command_ends_with_one_line_and_the_code_of_its_error(capsys, error, code):
    @ranks.command_line
    def main(argv=None):
        raise error("1/0: the reason")

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code and capsys.readouterr().err == "test_ranks.py: 1/0: the reason\n"


def test_a_terminal_that_is_not_utf_8_ends_no_command(monkeypatch):
    @ranks.command_line
    def main(argv=None):
        print(argv)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    main("gamma 0.50\u00b10.10 \u80cc \udcff")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"gamma 0.50\\xb10.10 \\u80cc \\udcff\n"


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "prepare", "bench"])
def test_every_command_ends_that_way(command):
    assert importlib.import_module(command).main.__wrapped__


LAUNCHERS = [  # what tells a process that it has others beside it, and the way to start them as one run
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "srun started 2 .* srun --ntasks=1 --ntasks-per-node=1 "
                                                 "torchrun --nproc_per_node=2 train.py --tau 0.5 "),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"},
     "srun started 8 .* --ntasks=2 --ntasks-per-node=1 torchrun --nproc_per_node=4 --nnodes=2 --rdzv"),
    ({"OMPI_COMM_WORLD_SIZE": "3"}, "mpirun started 3 .*: torchrun --nproc_per_node=3 train.py --tau 0.5 "),
    ({"PMI_SIZE": "3"}, "mpirun started 3"),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun --ntasks=1 in it
    ({"SLURM_NTASKS": "2", "WORLD_SIZE": "1"}, None)]  # the remedy for runs of their own


@pytest.mark.parametrize("environment, message", LAUNCHERS)
def test_processes_that_srun_or_mpirun_started_learn_the_command(monkeypatch, environment, message):
    for name in (*VARIABLES, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--tau", "0.5"])
    if message:
        with pytest.raises(ranks.StartError, match=message):
            ranks.join()
    else:
        ranks.join()


def test_that_nobody_listens_any_more_ends_no_run(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Gone())
    ranks.say("lost")


def test_progress_says_every_five_seconds_how_far_it_is_and_how_long_it_takes(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(ranks.time, "monotonic", lambda: clock[0])
    seen = []
    for item in ranks.progress("abcdefgh", "letters"):  # two seconds each
        seen.append(item)
        clock[0] += 2
    assert seen == list("abcdefgh")
    # After 6 seconds 3 of 8 are done, so that 5 take 10 more; after 12 seconds 6, and 2 take 4 more.
    assert capsys.readouterr().out == "3 of 8 letters, 0:00:10 left\n6 of 8 letters, 0:00:04 left\n"


def test_progress_counts_what_an_item_stands_for_and_is_silent_where_it_is_quick(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(ranks.time, "monotonic", lambda: clock[0])

    def slow_to_start():  # as loaders are; it has no len
        clock[0] += 400
        yield from range(2)

    for _ in ranks.progress(slow_to_start(), "images", total=7, step=4):  # on 4 ranks
        clock[0] += 3200
    assert capsys.readouterr().out == "4 of 7 images, 0:45:00 left\n"
    for _ in ranks.progress(slow_to_start(), "MB", total=0):  # as a server does not say
        clock[0] += 10
    assert capsys.readouterr().out == "1 MB\n"
    assert list(ranks.progress(range(1000), "numbers")) == list(range(1000))
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    for _ in ranks.progress(range(3), "images"):
        clock[0] += 10
    assert capsys.readouterr().out == ""
