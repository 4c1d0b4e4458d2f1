"""DeepLabV3+: sizes, strides, dilation and weights."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torchvision import models
from torchvision.models.segmentation.deeplabv3 import ASPPPooling

from model import BACKBONES, DeepLabV3Plus, dilate


def small(**options):
    torch.manual_seed(0)
    return DeepLabV3Plus(3, **{"backbone": "resnet18", "channels": 16, **options})


@pytest.mark.parametrize("backbone, millions", [("resnet50", 40.3), ("resnet101", 59.3)])
def test_parameters_with_21_classes(backbone, millions):
    parameters = sum(p.numel() for p in DeepLabV3Plus(21, backbone).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_logits_have_the_images_size_and_features_the_output_stride(backbone, output_stride):
    network = small(backbone=backbone, output_stride=output_stride).eval()
    seen = {}
    network.layer4.register_forward_hook(lambda m, i, out: seen.update(deep=out.shape))
    network.low_level.register_forward_hook(lambda m, i, out: seen.update(low=out.shape))
    with torch.no_grad():
        assert network(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)
        assert seen["deep"][2:] == (64 // output_stride, 96 // output_stride)
        assert seen["low"][1:] == (48, 16, 24)
        assert network(torch.randn(1, 3, 33, 50)).shape == (1, 3, 33, 50)
    rates = [branch[0].dilation[0] for branch in network.aspp.convs[1:4]]
    assert rates == ([12, 24, 36] if output_stride == 8 else [6, 12, 18])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_features_are_the_strided_ones_seen_finer(backbone, output_stride):
    # A trous: every second (fourth) pixel of the dilated features is a pixel of the strided ones.
    torch.manual_seed(0)
    plain = models.get_model(backbone, weights=None).eval().double()
    images = torch.randn(1, 3, 64, 64).double()
    strided = torch.nn.Sequential(*list(plain.children())[:8])
    with torch.no_grad():
        expected = strided(images)
        if output_stride == 8:
            dilate(plain.layer3, 1, 2)
            dilate(plain.layer4, 2, 4)
        else:
            dilate(plain.layer4, 1, 2)
        finer = strided(images)
    step = 32 // output_stride
    assert finer.shape[-1] == step * expected.shape[-1]
    torch.testing.assert_close(finer[..., ::step, ::step], expected)


def test_dilation_of_bottlenecks_is_torchvisions():
    torchvisions = models.resnet50(replace_stride_with_dilation=[False, True, True])
    ours = DeepLabV3Plus(3, "resnet50", output_stride=8)

    def describe(layer):
        return [(m.stride, m.dilation, m.padding) for m in layer.modules() if isinstance(m, torch.nn.Conv2d)]

    assert describe(ours.layer3) == describe(torchvisions.layer3)
    assert describe(ours.layer4) == describe(torchvisions.layer4)


def test_nothing_draws_at_random_in_training():
    network = small().train()
    images = torch.randn(2, 3, 32, 32)
    assert network(images).equal(network(images))
    assert not any(isinstance(m, torch.nn.Dropout) for m in small(aux=True).modules())


def test_logits_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert small()(torch.randn(2, 3, 32, 32)).dtype == torch.float32


def test_image_pooling_is_torchvisions_interpolation():
    # Of one value a channel; and torch.cat keeps channels_last, which it does if all its inputs have it.
    network = small().eval()
    features = torch.randn(2, 512, 3, 5)
    pooling = network.aspp.convs[-1]
    torch.testing.assert_close(pooling(features), ASPPPooling.forward(pooling, features), atol=1e-6, rtol=0)
    joined = []
    network.aspp.project.register_forward_pre_hook(lambda module, inputs: joined.append(inputs[0]))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network(torch.randn(2, 3, 64, 96).contiguous(memory_format=memory_format))
        assert joined[-1].is_contiguous(memory_format=memory_format)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch 2.6 asks a GPU even for fake convolutions")
def test_what_autocast_computes_in_bf16_on_a_gpu_is_joined_in_bf16():
    # Tensors that hold no values, but have the types and sizes that a GPU would give.
    network, joined = small().eval(), []
    real = network.state_dict()
    for part in (network.aspp.project, network.decoder):
        part.register_forward_pre_hook(lambda module, inputs: joined.append(inputs[0].dtype))
    with FakeTensorMode():
        state = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                 for name, tensor in real.items()}
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            logits = functional_call(network, state, torch.empty(2, 3, 64, 96, device="cuda"))
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert joined == [torch.bfloat16] * 2
    assert logits.dtype == torch.float32 and logits.device.type == "cuda"


def test_export_with_any_batch_height_and_width():
    network = small().eval()
    free = torch.export.Dim.DYNAMIC
    exported = torch.export.export(network, (torch.randn(2, 3, 64, 96),),
                                   dynamic_shapes={"images": {0: free, 2: free, 3: free}})
    for size in ((1, 3, 64, 96), (3, 3, 33, 50), (2, 3, 129, 40)):
        images = torch.randn(*size)
        torch.testing.assert_close(exported.module()(images), network(images), atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient_and_the_encoder_is_the_resnet():
    network = small()
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    resnet = sum(p.numel() for n, p in models.resnet18().named_parameters() if n[:3] != "fc.")
    assert sum(p.numel() for p in network.encoder_parameters()) == resnet


def test_auxiliary_head_answers_in_training_only():
    network = small(aux=True)
    logits, auxiliary = network.train()(torch.randn(2, 3, 40, 40))
    assert logits.shape == auxiliary.shape == (2, 3, 40, 40)
    assert network.eval()(torch.randn(1, 3, 40, 40)).shape == (1, 3, 40, 40)


def test_a_batch_of_one_in_training_says_what_to_do():
    with pytest.raises(ValueError, match="batch of two or more"):
        small().train()(torch.randn(1, 3, 32, 32))
    small().eval()(torch.randn(1, 3, 32, 32))
    # SyncBatchNorm sees the other ranks' images, so it is let through: on a CPU, to its own refusal.
    with pytest.raises(ValueError, match="GPU|device|Expected more than 1 value"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(small()).train()(torch.randn(1, 3, 32, 32))


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(1)
    resnet = models.resnet18()
    torch.save(resnet.state_dict(), tmp_path / "weights.pth")
    network = small(weights=tmp_path / "weights.pth")
    assert network.layer4[1].conv2.weight.equal(resnet.layer4[1].conv2.weight)
    assert network.stem[1].running_var.equal(resnet.bn1.running_var)
    assert not small().layer4[1].conv2.weight.equal(resnet.layer4[1].conv2.weight)


def test_weights_that_do_not_fit_name_the_layer(tmp_path):
    torch.save(models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    with pytest.raises(ValueError, match=r"resnet50.pth: do not fit resnet18: layer layer1.0.conv1"):
        small(weights=tmp_path / "resnet50.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        small(weights=tmp_path / "list.pth")
    with pytest.raises(OSError, match="no such file"):
        small(weights=tmp_path / "absent.pth")


def test_weights_that_hold_code_are_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"conv1.weight": Code()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="weights_only=True"):
        small(weights=tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()


def test_imagenet_weights_offline_name_the_file_and_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(OSError, match=r"resnet18-f37072fd.pth to .*hub/checkpoints, or give --weights"):
        small(weights="imagenet")


def test_imagenet_weights_are_taken_from_torchvisions_cache(tmp_path, monkeypatch):
    # The file where the message above asks for it.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(2)
    resnet = models.resnet18()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(resnet.state_dict(), cache / "resnet18-f37072fd.pth")
    assert small(weights="imagenet").layer1[0].conv1.weight.equal(resnet.layer1[0].conv1.weight)


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>not found</html>", bytes(range(256))])
def test_a_broken_file_in_torchvisions_cache_is_one_line(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(content)
    with pytest.raises(OSError, match="^cannot fetch the ImageNet weights .*--weights none$"):
        small(weights="imagenet")


@pytest.mark.parametrize("options, message", [
    ({"backbone": "vgg16"}, "not one of"), ({"output_stride": 32}, "neither 8 nor 16")])
def test_unknown_backbones_and_strides(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
