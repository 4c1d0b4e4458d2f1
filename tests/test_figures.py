"""tools/figures.py: which images its pictures show, and that they are drawn."""

import json
import re

import pytest
import torch

import train
from data import InputError
from test_data import custom
from test_train import TINY

pytest.importorskip("matplotlib")
import figures  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run of the whole method, confident enough for its CutMix to fire."""
    folder = tmp_path_factory.mktemp("figures") / "run"
    train.main([*TINY, *"--tau 0.25 --ema 0.5 --log-every 1 --iters 8 --out".split(), str(folder)])
    return folder


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_hardness_goes_from_the_easiest_quarter_to_the_hardest(run):
    cells = figures.hardness_figure(run).axes
    gamma = [float(*texts(cells[8 * row + 4])) for row in range(4)]
    weight = [float(*texts(cells[8 * row + 7])) for row in range(4)]
    partners = [re.search("from (.)", *texts(cells[8 * row + 6]))[1] for row in range(4)]
    assert gamma == sorted(gamma) and gamma[0] < gamma[3]
    assert [g + w for g, w in zip(gamma, weight)] == pytest.approx([1] * 4, abs=0.011)
    assert partners == ["D", "C", "B", "A"]  # the easiest with the hardest


def test_gamma_is_drawn_as_the_run_logged_it(run):
    axes, = figures.gamma_figure(run).axes
    mean, easiest, hardest = axes.lines
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert mean.get_ydata().tolist() == [record["gamma"] for record in records if "gamma" in record]
    assert max(easiest.get_ydata()) < min(hardest.get_ydata())


def test_panels_go_from_the_largest_loss_to_the_largest_gain(run, tmp_path):
    student = torch.load(run / "last.pth", weights_only=True)
    student["teacher"] = student["student"]
    torch.save(student, tmp_path / "last.pth")
    cells = figures.panels_figure(run, tmp_path).axes
    right = [[int(texts(cells[8 * row + i])[0].split("%")[0]) for i in range(8)] for row in (2, 3)]
    gains = [new - old for old, new in zip(*right)]
    assert gains == sorted(gains) and gains[0] < gains[-1]


def test_a_run_without_hardness_is_refused(run, tmp_path):
    state = torch.load(run / "last.pth", weights_only=True)
    state["settings"]["supervised"] = True
    torch.save(state, tmp_path / "last.pth")
    with pytest.raises(InputError, match="whole method"):
        figures.hardness_figure(tmp_path)


def test_the_pictures_are_written(run, tmp_path, capsys):
    figures.main([str(run), "--beside", str(run), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"hardness.png", "gamma.png", "panels.png"}


def test_a_runs_own_data_is_found(tmp_path):
    root, out = custom(tmp_path / "data"), tmp_path / "run"
    train.main(["--dataset", "custom", "--data-root", str(root), *TINY, "--iters", "2", "--out", str(out)])
    assert len(figures.panels_figure(out, out).axes) == 4 * 8
