"""README.md and docs/: links, commands, flags, names, messages and snippets are those of the code."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import run_folder
from settings import PROTOCOLS, parse_arguments
from test_train import TinyNetwork

HERE = Path(__file__).resolve().parent.parent
README, RUNS, OWN = (HERE / name for name in ("README.md", "docs/runs.md", "docs/own-photographs.md"))
PAGES = [README, *sorted(HERE.glob("docs/*.md")), HERE / "splits" / "README.md"]
CODE = [*HERE.glob("*.py"), *HERE.glob("tools/*.py")]
MODULES = {path.stem for path in CODE}
OTHERS = {"--help", "--nproc_per_node", "--ipc"}  # flags of other programs that sentences name
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE)))


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_blocks(text):
    return re.sub(r"^(```.*?^```|    .*?)$", "", text, flags=re.M | re.S)


def code_spans(text):
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks(text))


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page):
    """The commands of a page as lists of words: of its indented blocks, and of code in its sentences."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"^    (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M))
    spans = "\n".join(" ".join(span.split()) for span in code_spans(text))
    for line in f"{blocks}\n{spans}".replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", line):
            words = shlex.split(part, comments=True) if re.search(r"\b(python|torchrun)\b", part) else []
            starts = [i for i, word in enumerate(words) if word in ("python", "torchrun")]
            if starts and any(word.endswith(".py") for word in words):
                yield words[starts[0]:]


def parse(script, flags):
    """Let a script parse flags, and do no more."""
    if script == "tools/lite0.py":
        script, flags = f"{flags[0]}.py", flags[1:]
    if script == "train.py":
        parse_arguments(flags)
        return
    module = importlib.import_module(Path(script).stem)
    parse_args = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def only_parse(self, *arguments):
        parse_args(self, *arguments)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        patch.setattr("sys.argv", [script, *flags])
        with pytest.raises(Parsed):
            module.main()


@pages
def test_links_and_anchors_resolve(page):
    text = without_blocks(page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match("https?://", target):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pages
def test_commands_parse_with_todays_flags(page, monkeypatch):
    monkeypatch.chdir(HERE)
    for words in commands(page):
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        if words[script] == "labelme2voc.py":
            continue
        assert (HERE / words[script]).exists(), words
        assert words[0] == "torchrun" or script == 1, words
        parse(words[script], words[script + 1:])
    assert page != README or len([*commands(page)]) > 8


@pages
def test_flags_in_sentences_exist(page):
    known = OTHERS | {f"--{name.replace('_', '-')}" for name in vars(parse_arguments([]))}
    known |= {flag for path in CODE for flag in re.findall(r'"(--[a-z][\w-]*)"', path.read_text())}
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", without_blocks(page.read_text())):
        assert flag.rstrip("-") in known, flag


@pages
def test_files_tests_and_functions_in_the_text_exist(page):
    tests = "\n".join(path.read_text() for path in [*HERE.glob("test_*.py"), *HERE.glob("tests/*.py")])
    for span in code_spans(page.read_text()):
        if named := re.fullmatch(r"(?:bash )?([\w/]+\.(?:py|sh))", span):
            assert any((HERE / folder / named[1]).exists() for folder in (".", "tests", "tools")), span
        elif re.fullmatch(r"test_\w+", span):
            assert f"def {span}(" in tests, span
        elif (named := re.fullmatch(r"(\w+)\.(?!txt|json|csv)(\w+)", span)) and named[1] in MODULES:
            assert hasattr(importlib.import_module(named[1]), named[2]), span


def test_the_readme_fits_a_screen_and_a_sitting():
    lines = README.read_text().splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 100
    sections = re.split(r"^## ", README.read_text(), flags=re.M)
    assert max(section.count("\n") for section in sections) <= 30
    files = "hardness.py", "augment.py", "model.py"
    counts = {name: (HERE / name).read_text().count("\n") for name in files}
    counts["supervised_loss"] = (HERE / "train.py").read_text().split("def supervised_loss")[0].count("\n")
    for name, count in counts.items():
        said = int(re.search(rf"`{name}`\s+\((\d+)", README.read_text())[1])
        assert abs(said - count) <= 15, f"{name} has {count} lines"


def test_the_papers_numbers_and_protocols_in_the_readme_are_those_of_the_code():
    from evidence import PAPER
    text = README.read_text()
    rows = re.findall(r"^\| (\d): (\w+), (\w+) ", text, re.M)
    assert len(rows) == 4
    for table, dataset, backbone in rows:
        cells = re.search(rf"^\| {table}: {dataset}, {backbone} \|(.*)\|$", text, re.M)[1].split("|")
        for split, cell in zip("1_16 1_8 1_4 1_2 full".split(), cells):
            if cell.strip():
                ours = [PAPER[f"table{table} {row} {backbone} {split}"] for row in ("supervised", "HagSeg")]
                assert cell.split() == [ours[0], "→", ours[1]], (table, backbone, split)
    rows = re.findall(r"^\| (voc.*?|cityscapes) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) / ([\d.]+) \| "
                      r"(\S+) \|$", text, re.M)
    assert len(rows) == 2
    for datasets, *said in rows:
        for dataset in datasets.split(", "):
            args = parse_arguments(["--dataset", dataset])
            assert [*map(float, said)] == [args.crop_size, args.epochs, args.tau, args.encoder_lr, args.lr,
                                           args.weight_decay]
    assert all(dataset in text for dataset in PROTOCOLS)


def test_the_files_and_columns_of_a_run_and_of_predictions_are_told():
    runs, own = RUNS.read_text(), OWN.read_text()
    for name in (*run_folder.METRICS, *run_folder.LOGS[:2], "last.pth", "best.pth", "result.txt",
                 "predictions.png", "settings.json"):
        assert f"`{name}`" in runs, name
    for name in predict.RESULTS | predict.RANKING:
        assert f"`{name}`" in own, name
    for column in ("L_x", "L_u", "gamma", "confident", "CutMix fired"):
        assert column in run_folder.MEANING and f"`{column}`" in README.read_text(), column


def test_messages_that_the_page_explains_are_those_of_the_code():
    code = "".join((HERE / f"{name}.py").read_text() for name in ("check", "data", "prepare"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message that is written in several lines
    table = re.search(r"\| the message says .*?\n\n", OWN.read_text(), re.S)[0]
    fragments = re.findall("`([^`]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", table, re.M)))
    assert len(fragments) > 10
    for said in fragments:
        pattern = re.escape(said).replace("3", r"\{\w+\}")  # a number that the message fills in
        assert re.search(pattern, code), said


def test_the_readmes_snippet_adds_hardness_to_a_loop():
    code, = python_blocks(README)
    student, teacher = TinyNetwork(), TinyNetwork().eval()
    before = [network.conv.weight.clone() for network in (student, teacher)]
    u_w, u_s = torch.randn(2, 4, 3, 8, 8)
    loop = {"student": student, "teacher": teacher, "u_w": u_w, "u_s": u_s, "iteration": 1000,
            "optimizer": torch.optim.SGD(student.parameters(), 0.1), "loss_x": student(u_w).mean()}
    exec(code.replace("0.95", "0.3"), loop)
    assert loop["loss_u"] > 0 and student.training and 0 < loop["gamma"].mean() < 1
    for network, weight in zip((student, teacher), before):
        assert not network.conv.weight.equal(weight)


def test_masks_of_a_class_each_are_merged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, inside in (("road", [[1, 1, 0]]), ("car", [[0, 1, 0]])):
        (tmp_path / "by_class" / name).mkdir(parents=True)
        Image.fromarray(np.array(inside, np.uint8) * 255).save(tmp_path / "by_class" / name / "a.png")
    code, = python_blocks(OWN)
    exec(code, {})
    assert np.array(Image.open("mine/masks/a.png")).tolist() == [[1, 2, 0]]


@pytest.mark.slow
def test_snippets_of_a_trained_model_run(tmp_path, monkeypatch):
    import train
    monkeypatch.chdir(tmp_path)
    train.main(["--iters", "1", "--channels", "16", "--out", "runs/voc-1_8-hagseg"])
    Image.new("RGB", (50, 40)).save("photograph.jpg")
    predicting, scripting, onnx = python_blocks(RUNS)
    found = {}
    exec(predicting, found)
    assert found["labels"].shape == (40, 50) and set(found["names"]) <= set(found["checkpoint"]["classes"])
    exec(scripting, {})
    logits = torch.jit.load("hagseg.pt")(torch.randn(1, 3, 40, 50))
    assert logits.shape == (1, 5, 40, 50)
    pytest.importorskip("onnxscript")
    exec(onnx, {})
    assert Path("hagseg.onnx").exists()
