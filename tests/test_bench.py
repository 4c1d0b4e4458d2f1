"""The real command at its smallest, and what its clock counts."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench
from test_train import HIDDEN

HERE = Path(bench.__file__).parent.parent


@pytest.mark.slow
def test_operations_are_counted_without_a_step(capsys):
    bench.main(["--only", "flops", "--crop-size", "513", "--batch-size", "16"])
    counted, = re.findall(r"network, counted +([\d.]+) TFLOP", capsys.readouterr().out)
    assert float(counted) == 25.4  # docs/speed.md


def test_the_clock_counts_a_part_within_another_once():
    clock = bench.Clock(torch.device("cpu"))
    with clock("outer"):
        time.sleep(0.02)
        with clock("inner"):
            time.sleep(0.1)
    lap = clock.lap()
    assert lap.keys() == {"outer", "inner"} and lap["inner"] >= 0.1 and 0.02 <= lap["outer"] < 0.1
    assert clock.lap() == {}


@pytest.mark.parametrize("flags, message", [
    ("--crop-size 1", "--crop-size 1: too small"), ("--repeats 0", "--repeats 0: at least 1"),
    ("--dataset=voc", "--dataset=voc: not measured; leave it out"), ("--aux", "--aux: not measured")])
def test_input_that_cannot_be_used_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--only", "loader", *flags.split()])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in said[-1]
    assert len(said) == 1 or said[0].startswith("usage: ")


@pytest.mark.slow
def test_gpu_sh_runs_end_to_end_and_prints_the_table_of_docs_speed(tmp_path):
    # Of the tests of tests/gpu, which run by themselves too, one each time.
    environment = {**os.environ, **HIDDEN, "GPU_SH_TINY": "1", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1",
                   "PYTEST_ADDOPTS": "-k 'cpus_in_bf16 or nccl'",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "tools/gpu.sh"], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.stdout == (tmp_path / "gpu.txt").read_text() and not done.stderr
    bf16 = done.stdout.split("=== bf16")[1].split("===")[0]
    for name in ("load wait", "copy to device", "the rest", *bench.PARTS.values(), "first step", "images",
                 "workers a step needs"):
        assert f"  {name} " in bf16.replace("\n", "\n  ")
    assert re.search(r"^step/network \d+\.\d{3}$", bf16, re.MULTILINE)
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    page = (HERE / "docs" / "speed.md").read_text().partition("## On a GPU")[2].partition("\n## ")[0]
    assert [what for what, _ in table] == [line.split(" | ")[0] for line in page.splitlines()
                                           if line.startswith("| ")]
    cells = {what.strip("| "): cell.removesuffix(" |") for what, cell in table}
    assert cells.pop("what") == "CPU, tiny sizes"
    for what, cell in cells.items():
        assert re.search(r"\d", cell) and not re.search("stopped|failed|left out", cell), (what, cell)
    resumed = cells["the default data set, killed once and resumed: mIoU; seconds"]
    assert re.fullmatch(r"[\d.]+; \d+ \+ \d+", resumed) and "resumes at iteration" in done.stdout
