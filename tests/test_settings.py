"""The flags of train.py: each setting is said once, and the protocols, --small and --weights fill it in."""

import re
from dataclasses import fields

import pytest
import torch

import settings
from data import InputError
from settings import PROTOCOLS, Settings, parse_arguments
from test_data import custom
from test_evaluate import checkpoint
from test_run_folder import run, small  # noqa: F401 (a fixture)
from test_train import TINY, lines


def help_text(capsys, *flags):
    with pytest.raises(SystemExit):
        parse_arguments([*flags, "--help"])
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_help_shows_every_flag_with_the_defaults_of_the_data_set(capsys):
    text = help_text(capsys, "--dataset", "cityscapes")
    for setting in fields(Settings):
        if setting.metadata:
            assert re.search(f" --{setting.name.replace('_', '-')}[ ,]", text)
    assert "--dataset {shapes,voc,voc_classic,cityscapes,custom}" in text
    assert "side of the training crops (default: 769)" in text
    assert "side of the training crops (default: 129)" in help_text(capsys, "--dataset", "voc", "--small")
    assert re.findall(r"--no-\S+", text.partition("options:")[2]) == ["--no-amp"]


@pytest.mark.parametrize("dataset", PROTOCOLS)
def test_small_fits_a_laptop_whatever_the_data_set(dataset):
    args = parse_arguments(["--dataset", dataset, "--small"])
    assert (args.backbone, args.channels, args.image_size, args.crop_size, args.batch_size, args.ema,
            args.iters) == ("resnet18", 64, 256, 129, 4, 0.99, 3000)
    own = parse_arguments(["--dataset", dataset, "--small", "--crop-size", "65", "--epochs", "3"])
    assert (own.crop_size, own.epochs, own.iters, own.channels) == (65, 3, None, 64)


def test_own_data_train_for_4000_iterations_at_least_unless_epochs_are_given():
    def planned(*flags):
        args = parse_arguments(["--dataset", "custom", *flags])
        return args.epochs, args.iters, args.least_iters

    assert planned() == (80, None, 4000)
    assert planned("--epochs", "3") == (3, None, 0)
    assert planned("--iters", "7") == (80, 7, 4000)  # iters come first
    assert parse_arguments(["--dataset", "voc"]).least_iters == 0


def test_weights_of_a_checkpoint_bring_their_network_and_sizes(tmp_path, capsys):
    weights = str(checkpoint(tmp_path / "w.pth", crop_size=65, image_size=96, multi_grid=False))
    flags = ["--dataset", "custom", "--weights", weights, "--out", str(tmp_path / "out")]
    args = parse_arguments(flags)
    assert (args.backbone, args.channels, args.output_stride, args.image_size, args.crop_size) == (
        "resnet18", 16, 16, 96, 65)
    assert capsys.readouterr().out == (
        f"--weights {weights}: backbone resnet18, channels 16, output stride 16, multi grid False, "
        f"image size 96, crop size 65, as that run had\n")
    args = parse_arguments([*flags, "--crop-size", "97", "--backbone", "resnet18"])
    assert (args.crop_size, args.channels) == (97, 16)
    assert capsys.readouterr().out.endswith(
        f"warning: --weights {weights}: was trained with crop size 65; the flags differ\n")


def test_weights_of_a_resnet_leave_the_settings_alone(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    assert parse_arguments(["--dataset", "custom", "--weights", str(tmp_path / "resnet.pth")]).channels == 256


def test_a_run_from_a_checkpoint_resumes_without_it(tmp_path):
    root, weights = custom(tmp_path / "data"), checkpoint(tmp_path / "w.pth", crop_size=32)
    tiny = "--batch-size 4 --no-amp --dataset custom --data-root".split()
    flags = [*tiny, root, "--iters", 2, "--out", tmp_path / "out", "--weights", weights]
    assert run(*flags)[0] == 0
    weights.unlink()
    code, out, err = run(*flags)
    assert (code, err) == (0, "") and "mean IoU" in out


def test_own_data_are_validated_twenty_times_a_run(tmp_path, small):  # noqa: F811
    root = custom(tmp_path / "data")
    assert run(*TINY, "--dataset", "custom", "--data-root", root, "--iters", 40, "--out", tmp_path / "out",
               "--supervised")[0] == 0
    validated = [r["iteration"] for r in lines(tmp_path / "out") if "miou_teacher" in r]
    assert validated == list(range(2, 41, 2))


@pytest.mark.parametrize("images, masks, epoch", [(10, 6, 1), (60, 58, 14)])
def test_an_epoch_of_own_data_is_a_pass_over_the_larger_set(tmp_path, small, images, masks, epoch):  # noqa: F811
    root = custom(tmp_path / "data", images, masks)  # two masks are for validation
    for method in ([], ["--supervised"]):
        _, out, err = run(*TINY, "--dataset", "custom", "--data-root", root, "--epochs", 1, "--out",
                          tmp_path / f"out{len(method)}", *method)
        assert f"\n{epoch} iterations on " in out, err


@pytest.mark.parametrize("large", ["", "--batch-size 2 --crop-size 4001", "--small --crop-size 9999"])
def test_a_step_too_large_for_the_memory_is_refused_with_flags_that_fit(tmp_path, monkeypatch, small,  # noqa: F811
                                                                        large):
    root = custom(tmp_path / "data")
    flags = ["--dataset", "custom", "--data-root", root, "--weights", "none", "--iters", 1,
             "--out", tmp_path / "out"]
    monkeypatch.setattr(settings, "machine_memory", lambda: 20.0)
    code, out, err = run(*flags, *large.split())
    assert code == 2 and not (tmp_path / "out").exists()
    assert err.startswith("train.py: a step of resnet")
    assert err.endswith("GiB, and each process has 20.0; give --small, and leave out --backbone, --channels, "
                        "--crop-size and --batch-size\n")
    assert run(*flags, "--small")[0] == 0


def test_a_step_that_is_slow_on_a_cpu_is_said(monkeypatch):
    monkeypatch.setattr(settings, "machine_memory", lambda: 20.0)
    args = parse_arguments(["--dataset", "custom", "--accumulate", "2"])
    assert "GiB, and is slow on a CPU; --small is made for one" in settings.check_memory(args)


@pytest.mark.parametrize("flags, told, remedies", [
    ("--batch-size 16 --accumulate 3", "give a multiple of 3, or another --accumulate", ([12, 3], [16, 4])),
    ("--supervised --batch-size 4 --accumulate 4", "one image at a time, .*; give 8", ([8, 4],))])
def test_a_batch_that_cannot_be_split_is_refused_with_flags_that_work(flags, told, remedies):
    with pytest.raises(InputError, match=told):
        parse_arguments(flags.split())
    for size, n in remedies:
        args = parse_arguments([*flags.split(), f"--batch-size={size}", f"--accumulate={n}"])
        assert (args.batch_size, args.accumulate) == (size, n)


def test_small_runs_say_nothing_of_memory():
    assert settings.check_memory(parse_arguments([])) == ""
    assert settings.check_memory(parse_arguments(["--dataset", "custom", "--small"])) == ""


def test_a_step_of_a_checkpoints_sizes_fits_with_what_the_line_says(tmp_path, monkeypatch, small):  # noqa: F811
    weights = tmp_path / "w.pth"
    torch.save({"settings": {"backbone": "resnet50", "channels": 256, "crop_size": 2001}}, weights)
    flags = ["--dataset", "custom", "--data-root", custom(tmp_path / "data"), "--weights", weights,
             "--iters", 1, "--out", tmp_path / "out"]
    monkeypatch.setattr(settings, "machine_memory", lambda: 20.0)
    code, _, err = run(*flags)
    assert code == 2 and "give --small, and leave out --backbone" in err
    code, _, err = run(*flags, "--small")
    assert code == 0, err
