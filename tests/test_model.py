"""DeepLabV3+: sizes, strides, dilation and weights."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torchvision import models
from torchvision.models.segmentation.deeplabv3 import ASPPPooling

from model import BACKBONES, DeepLabV3Plus, dilate

# All of them are tested; a basic block and a bottleneck will do for a quick look.
EACH_BACKBONE = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("resnet34", "resnet101")))
                 for name in BACKBONES]


def small(**options):
    torch.manual_seed(0)
    return DeepLabV3Plus(3, **{"backbone": "resnet18", "channels": 16, **options})


@pytest.mark.parametrize("backbone, millions", [("resnet50", 40.3), ("resnet101", 59.3)])
def test_parameters_with_21_classes(backbone, millions):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DeepLabV3Plus(21, backbone).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("backbone", EACH_BACKBONE)
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


@pytest.mark.slow
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
    with torch.device("meta"):
        torchvisions = models.resnet50(replace_stride_with_dilation=[False, True, True])
        ours = DeepLabV3Plus(3, "resnet50", output_stride=8)

    def describe(layer):
        return [(m.stride, m.dilation, m.padding) for m in layer.modules() if isinstance(m, torch.nn.Conv2d)]

    assert describe(ours.layer3) == describe(torchvisions.layer3)
    assert describe(ours.layer4) == describe(torchvisions.layer4)


@pytest.mark.parametrize("backbone", EACH_BACKBONE)
@pytest.mark.parametrize("output_stride, rates", [(16, (2, 4, 8)), (8, (4, 8, 16))])
def test_multi_grid_dilates_the_blocks_of_stage_4_one_by_one(backbone, output_stride, rates):
    with torch.device("meta"):
        even, grid = (small(backbone=backbone, output_stride=output_stride, multi_grid=multi_grid)
                      for multi_grid in (False, True))
    for block, rate in zip(grid.layer4, rates, strict=False):
        spread = [conv for conv in block.modules() if getattr(conv, "kernel_size", None) == (3, 3)]
        assert len(spread) == (1 if hasattr(block, "conv3") else 2)  # a bottleneck, or a basic block
        assert all(conv.dilation == conv.padding == (rate, rate) for conv in spread)
        assert all(conv.stride == (1, 1) for conv in block.modules() if isinstance(conv, torch.nn.Conv2d))
    # Nothing else changes: the state dict, the other stages, ASPP.
    describe = lambda network: [str(m) for name, m in network.named_modules()
                                if isinstance(m, torch.nn.Conv2d) and not name.startswith("layer4.")]
    assert describe(grid) == describe(even)
    assert [(name, tensor.shape) for name, tensor in grid.state_dict().items()] == [
        (name, tensor.shape) for name, tensor in even.state_dict().items()]


def test_multi_grid_looks_further():
    # The same weights; stage 4 is of the same size and not the same.
    images = torch.randn(1, 3, 96, 96)
    even, grid = small().eval(), small(multi_grid=True).eval()
    assert all(a.equal(b) for a, b in zip(even.state_dict().values(), grid.state_dict().values()))
    with torch.no_grad():
        assert even(images).shape == grid(images).shape and not even(images).allclose(grid(images))


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


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("aux", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torchscript_computes_the_same_bits(tmp_path, aux):
    network = small(aux=aux)
    torch.jit.script(network).save(tmp_path / "network.pt")
    scripted, images = torch.jit.load(tmp_path / "network.pt"), torch.randn(2, 3, 33, 50)
    for mode in (False, True):
        ours, theirs = network.train(mode)(images), scripted.train(mode)(images)
        assert isinstance(ours, tuple) == isinstance(theirs, tuple) == (aux and mode)
        for a, b in zip(ours, theirs):
            assert a.equal(b)


@pytest.mark.slow
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


def test_a_batch_of_one_cannot_train():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        small().train()(torch.randn(1, 3, 32, 32))
    assert small().eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("wrap, place", [
    (lambda state: state, "it"),
    (lambda state: {"epoch": 3, "state_dict": under("module.", state)}, "state_dict.module"),
    (lambda state: {"model": under("module.backbone.", state), "optimizer": {"state": {0: {}}}},
     "model.module.backbone"),
    (lambda state: {"model": {"state_dict": under("encoder.", state)}}, "model.state_dict.encoder"),
    (lambda state: {"student": under("backbone.", models.resnet18().state_dict()),
                    "teacher": under("backbone.", state)}, "teacher.backbone")])
def test_weights_of_a_torchvision_resnet_wherever_a_file_holds_them(tmp_path, wrap, place):
    torch.manual_seed(1)
    resnet = models.resnet18()
    resnet.bn1.running_var.fill_(2)
    torch.save(wrap(resnet.state_dict()), tmp_path / "weights.pth")
    network, bare = small(weights=tmp_path / "weights.pth"), small()
    assert network.note == f"weights {tmp_path / 'weights.pth'}: the encoder of {place}"
    assert network.layer4[1].conv2.weight.equal(resnet.layer4[1].conv2.weight)
    assert network.stem[0].weight.equal(resnet.conv1.weight)
    assert network.stem[1].running_var.equal(resnet.bn1.running_var)
    assert network.decoder[2].weight.equal(bare.decoder[2].weight) and bare.note == ""
    assert not bare.layer4[1].conv2.weight.equal(resnet.layer4[1].conv2.weight)


def constants(network, first=0):
    """A state dict for a network on "meta": each tensor of one value, its own, so that files are small."""
    return {name: torch.full((), first + i, dtype=tensor.dtype).expand(tensor.shape)
            for i, (name, tensor) in enumerate(network.state_dict().items())}


def resnet_state(name):
    with torch.device("meta"):
        network = models.get_model(name)
    return constants(network)


def checkpoint(path, **options):
    """A checkpoint as train.py writes it, of networks in which nothing has its first value."""
    with torch.device("meta"):
        network = DeepLabV3Plus(3, **{"backbone": "resnet18", "channels": 16, **options})
    networks = {"student": constants(network, 1000), "teacher": constants(network, 2000)}
    torch.save({"settings": options, "classes": ["a", "b", "c"], "iteration": 7, **networks}, path)
    return networks["teacher"]


@pytest.mark.parametrize("aux", [False, True])
def test_weights_of_a_checkpoint_are_its_teachers(tmp_path, aux):
    path = tmp_path / "last.pth"
    teacher = checkpoint(path, aux=aux)
    network = small(weights=path, aux=aux)
    assert network.note == f"weights {path}: the whole network of teacher"
    assert all(tensor.equal(teacher[name]) for name, tensor in network.state_dict().items())
    # For other classes, the last layers are those of a network without these weights.
    torch.manual_seed(0)
    start = DeepLabV3Plus(5, "resnet18", channels=16, aux=aux).state_dict()
    torch.manual_seed(0)
    network = DeepLabV3Plus(5, "resnet18", channels=16, aux=aux, weights=path)
    assert network.note == (f"weights {path}: the whole network of teacher; the last layer starts anew, "
                            f"for 5 classes in place of 3")
    last = {"decoder.2.weight", "decoder.2.bias", *(("aux.3.weight", "aux.3.bias") if aux else ())}
    for name, tensor in network.state_dict().items():
        assert tensor.equal(start[name] if name in last else teacher[name]), name


def test_weights_of_a_checkpoint_with_or_without_an_auxiliary_head(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint(path)
    network = small(weights=path, aux=True)
    assert network.note == f"weights {path}: the whole network of teacher; the auxiliary head starts anew"
    teacher = checkpoint(path, aux=True)
    assert all(tensor.equal(teacher[name]) for name, tensor in small(weights=path).state_dict().items())


def deep_stem(state):
    state.pop("conv1.weight")
    return {**state, "conv1.0.weight": torch.zeros(32, 3, 3, 3), "conv1.3.weight": torch.zeros(64, 32, 3, 3)}


def four_channels(state):
    return state | {"conv1.weight": torch.zeros(64, 4, 7, 7)}


def squeeze_and_excitation(state):
    return state | {"layer4.1.se.weight": torch.zeros(2)}


NO_RESNET = r"no ResNet by torchvision's names \(layer1.0.conv1.weight and so on\)"


@pytest.mark.parametrize("save, what", [
    (lambda path: checkpoint(path, channels=24), "resnet18 with 24 channels, where resnet18 with 16"),
    (lambda path: checkpoint(path, backbone="resnet34", channels=24),
     "resnet34 with 24 channels, where resnet18 with 16"),
    (lambda path: torch.save(resnet_state("resnet34"), path), "resnet34, where resnet18"),
    (lambda path: torch.save({"model": under("module.", resnet_state("resnet50"))}, path),
     "resnet50, where resnet18"),
    pytest.param(lambda path: torch.save(resnet_state("resnext50_32x4d"), path),
                 "resnext50_32x4d, where resnet18", marks=pytest.mark.slow),
    (lambda path: torch.save(deep_stem(resnet_state("resnet18")), path), r"a ResNet with a deep stem "
     r"\(several convolutions for conv1\), where resnet18"),
    (lambda path: torch.save(four_channels(resnet_state("resnet18")), path),
     r"a network whose conv1.weight is \(64, 4, 7, 7\) rather than \(64, 3, 7, 7\), where resnet18"),
    pytest.param(lambda path: torch.save(squeeze_and_excitation(resnet_state("resnet18")), path),
                 r"a network whose layer4.1.se.weight is \(2,\) rather than missing, where resnet18",
                 marks=pytest.mark.slow),
    (lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path), NO_RESNET),
    (lambda path: torch.save([1, 2], path), NO_RESNET),
])
@pytest.mark.slow
def test_weights_that_do_not_fit_say_what_they_are_and_what_would_do(tmp_path, monkeypatch, save, what):
    path = tmp_path / "weights.pth"
    save(path)
    with pytest.raises(ValueError, match=f"weights.pth: hold {what}.* is needed; give ") as error:
        small(weights=path)
    remedy = str(error.value).partition("; give ")[2]
    if remedy.startswith("--"):
        flags = remedy.split()
        options = {flag[2:]: int(value) if value.isdigit() else value
                   for flag, value in zip(flags[::2], flags[1::2], strict=True)}
        assert small(weights=path, **options).note.startswith(f"weights {path}: the ")
    else:
        assert remedy == "torchvision's state dict of resnet18, --weights imagenet or --weights none"
        cache_imagenet(monkeypatch, tmp_path, resnet_state("resnet18"))
        torch.save(resnet_state("resnet18"), path)
        for weights in (path, "imagenet", "none"):
            small(weights=weights)


def test_a_deeper_resnets_file_is_not_taken_for_a_shallower_one(tmp_path):
    torch.save(resnet_state("resnet34"), tmp_path / "34.pth")  # it has all layers of a ResNet-18
    with pytest.raises(ValueError, match="hold resnet34, where resnet18 is .* give --backbone resnet34"):
        small(weights=tmp_path / "34.pth")


def test_weights_that_are_absent_or_hold_more_than_tensors(tmp_path):
    with pytest.raises(OSError, match="no such file"):
        small(weights=tmp_path / "absent.pth")
    model = models.resnet18()
    torch.save(model, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"save it as torch.save\(model.state_dict\(\), FILE"):
        small(weights=tmp_path / "model.pth")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    small(weights=tmp_path / "model.pth")


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


def cache_imagenet(monkeypatch, folder, content):
    """Put a file where torchvision looks for the ImageNet weights, and the messages say so."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    cache = folder / "hub" / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        (cache / "resnet18-f37072fd.pth").write_bytes(content)
    else:
        torch.save(content, cache / "resnet18-f37072fd.pth")


def test_imagenet_weights_are_taken_from_torchvisions_cache(tmp_path, monkeypatch):
    torch.manual_seed(2)
    resnet = models.resnet18()
    cache_imagenet(monkeypatch, tmp_path, resnet.state_dict())
    network = small(weights="imagenet")
    assert network.layer1[0].conv1.weight.equal(resnet.layer1[0].conv1.weight) and network.note == ""


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>not found</html>", bytes(range(256))])
def test_a_broken_file_in_torchvisions_cache_is_one_line(tmp_path, monkeypatch, content):
    cache_imagenet(monkeypatch, tmp_path, content)
    with pytest.raises(OSError, match="^cannot fetch the ImageNet weights .*--weights none$"):
        small(weights="imagenet")


@pytest.mark.parametrize("options, message", [
    ({"backbone": "vgg16"}, "not one of"), ({"output_stride": 32}, "neither 8 nor 16")])
def test_unknown_backbones_and_strides(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
