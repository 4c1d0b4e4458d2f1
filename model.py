"""DeepLabV3+ (Chen et al., 2018) on torchvision's ResNets: the network of Sec. 3.

Works alone: copy this file next to any code that wants a segmentation network.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import Conv2dNormActivation

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
LOW_LEVEL_CHANNELS = 48
FIRST = "layer1.0.conv1.weight"  # by which a ResNet is found in a file


class DeepLabV3Plus(nn.Module):
    """Encoder, atrous spatial pyramid pooling, and the decoder with low-level features.

    num_classes:    C, the channels of the logits.
    backbone:       one of BACKBONES.
    output_stride:  16 or 8: how much coarser than the image the deepest features are.
    channels:       width of ASPP and decoder (256 in the paper; 64 trains on a laptop).
    weights:        "imagenet" (torchvision's IMAGENET1K_V1, for the encoder), a file, or None / "none"
                    for a random start. A file is a state dict of torchvision's ResNet, for the
                    encoder, or of this network, for all of it (the last layer starts anew where the
                    number of classes differs), or a checkpoint that holds one of the two at any
                    depth, preferably as "teacher". Dilation leaves no trace in weights, so give the
                    output_stride and multi_grid that they were trained with.
    aux:            adds an FCN head on stage 3, used in training only (see forward).
    multi_grid:     dilates the blocks of stage 4 by 1, 2 and 4 times the stage's dilation (2 at stride
                    16, 4 at stride 8) instead of evenly, as the authors did.

    `note` says what a file of weights gave, or is "". torch.jit.script and torch.export take the network.
    Raises ValueError for an unknown backbone or stride, and for weights that do not fit; OSError where
    the weights cannot be read or fetched.
    """

    def __init__(self, num_classes, backbone="resnet50", output_stride=16, channels=256,
                 weights=None, aux=False, multi_grid=False):
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone {backbone!r} is not one of {', '.join(BACKBONES)}")
        if output_stride not in (8, 16):
            raise ValueError(f"output stride {output_stride} is neither 8 nor 16")
        resnet = models.get_model(backbone, weights=None)
        width = resnet.fc.in_features  # of stage 4; 2048 for bottlenecks, 512 for basic blocks

        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        if output_stride == 8:
            dilate(self.layer3, 1, 2)
            dilate(self.layer4, 2, 4)
        else:
            dilate(self.layer4, 1, 2)
        if multi_grid:
            for block, times in zip(self.layer4, (1, 2, 4), strict=False):  # ResNet-18 has two blocks
                dilate(block, times * 32 // output_stride, times * 32 // output_stride)

        self.aspp = ASPP(width, [rate * 16 // output_stride for rate in (6, 12, 18)], channels)
        self.aspp.convs[-1] = ImagePooling(*self.aspp.convs[-1])
        del self.aspp.project[-1]  # its dropout: the authors use none, and it draws unseeded
        self.low_level = Conv2dNormActivation(width // 8, LOW_LEVEL_CHANNELS, 1)
        self.decoder = nn.Sequential(
            Conv2dNormActivation(channels + LOW_LEVEL_CHANNELS, channels, 3),
            Conv2dNormActivation(channels, channels, 3),
            nn.Conv2d(channels, num_classes, 1),
        )
        self.aux = FCNHead(width // 2, num_classes) if aux else None
        if aux:
            del self.aux[-2]  # its dropout, likewise
        self.note = "" if weights in (None, "none") else load_weights(self, weights, backbone, channels)

    def forward(self, images) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """images (B, 3, H, W), any H and W, ImageNet-normalised -> logits (B, C, H, W), float32.

        With `aux`, training mode returns the pair (logits, auxiliary logits).
        In training a batch of one raises ValueError: image pooling leaves BatchNorm one value a channel.
        (SyncBatchNorm sees the other ranks' images too.)
        """
        size = images.shape[-2:]
        low_level = self.layer1(self.stem(images))
        stage3 = self.layer3(self.layer2(low_level))
        features = self.aspp(self.layer4(stage3))
        # Back in the features' own type: under autocast that is bf16, and joining float32 to it costs.
        features = upsample(features, low_level.shape[-2:]).to(features.dtype)
        logits = self.decoder(torch.cat([features, self.low_level(low_level)], dim=1))
        if self.aux is not None and self.training:
            return upsample(logits, size), upsample(self.aux(stage3), size)
        return upsample(logits, size)

    def encoder_parameters(self):
        """The ResNet's parameters, which start from ImageNet and take the smaller learning rate."""
        for part in (self.stem, self.layer1, self.layer2, self.layer3, self.layer4):
            yield from part.parameters()


@torch.no_grad()
def update_teacher(teacher, student, alpha, iteration):
    """Eq. 2: teacher = alpha teacher + (1 - alpha) student, floating-point buffers included. R9, alpha
    grows as in Mean Teacher: min(alpha, 1 - 1/(t + 1)). Works with any two networks of one kind."""
    alpha = min(alpha, 1 - 1 / (iteration + 1))
    theta_t, theta_s = ([v for v in (*network.parameters(), *network.buffers()) if v.is_floating_point()]
                        for network in (teacher, student))
    torch._foreach_lerp_(theta_t, theta_s, 1 - alpha)


class ImagePooling(nn.Sequential):
    """ASPP's image pooling, of torchvision's modules: one value a channel, the same at every pixel.

    It is expanded rather than interpolated, which autocast would do in float32.
    """

    def forward(self, features):
        pooled = features
        for module in self:  # torch.jit.script knows no super()
            pooled = module(pooled)
        pooled = pooled.expand(-1, -1, features.shape[2], features.shape[3])
        # The tensors that it is joined with stay channels_last only if all of them are.
        return pooled.contiguous(memory_format=torch.channels_last)


def upsample(coarse, size: list[int]):
    # In float32: softmax and losses want the logits so, and the coarse map is cheap to cast.
    return F.interpolate(coarse.float(), size, mode="bilinear")


def dilate(layer, previous, dilation):
    """Replace a ResNet stage's stride of 2 by dilation, in place.

    The convolution that had the stride keeps the dilation `previous` of the stage before; the 3x3
    convolutions after it take `dilation`. Every second pixel of the result is then exactly what the
    strided stage computes, for basic blocks and bottlenecks alike.
    """
    for conv in (m for m in layer.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            rate = previous if conv.stride == (2, 2) else dilation
            conv.dilation = conv.padding = (rate, rate)
        conv.stride = (1, 1)


def read_weights(weights, backbone):
    """What torchvision publishes as "imagenet", or what a file holds, as dicts of dicts of tensors."""
    if weights == "imagenet":
        published = models.get_model_weights(backbone).IMAGENET1K_V1
        try:
            return published.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # offline, or a broken file, for which torch.load has many errors
            folder, reason = Path(torch.hub.get_dir()) / "checkpoints", str(error).partition("\n")[0]
            raise OSError(f"cannot fetch the ImageNet weights ({reason}); download {published.url} to "
                          f"{folder}, or give --weights FILE or --weights none") from error
    try:
        tree = torch.load(weights, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OSError(f"weights {weights}: no such file") from None
    except Exception as error:
        raise ValueError(f"weights {weights}: not a file of tensors that torch.load reads with "
                         f"weights_only=True; save it as torch.save(model.state_dict(), FILE)") from error
    return tree if isinstance(tree, dict) else {}


def load_weights(network, weights, backbone, channels):
    """Load "imagenet" or a file (see DeepLabV3Plus) into a network of these options, in place.

    Returns a line on what a file gave, "" for "imagenet".
    """
    tensors, needed = dict(flatten(read_weights(weights, backbone))), dict(flatten(network.state_dict()))
    # The ResNet lies at the top, or under "teacher", "state_dict.module.backbone" and the like.
    places = [name.removesuffix(FIRST) for name in tensors if f".{name}".endswith(f".{FIRST}")]
    place = max(places, key=lambda place: "teacher" in place, default="")
    state = {name.removeprefix(place): tensor for name, tensor in tensors.items() if name.startswith(place)}
    whole = all(name in state for name in needed if name.startswith(("aspp.", "low_level.", "decoder.")))
    demand_fit(state, needed, whole, weights, backbone, channels)

    for name in needed if whole else encoder(needed):
        if name in state and state[name].shape == needed[name].shape:  # else it starts anew
            needed[name].copy_(state[name])
    if weights == "imagenet":
        return ""
    notes = [f"weights {weights}: {'the whole network' if whole else 'the encoder'} of {place[:-1] or 'it'}"]
    if whole and len(state["decoder.2.weight"]) != len(needed["decoder.2.weight"]):
        notes.append(f"the last layer starts anew, for {len(needed['decoder.2.weight'])} classes in place of "
                     f"{len(state['decoder.2.weight'])}")
    if whole and "aux.0.weight" in needed.keys() - state.keys():
        notes.append("the auxiliary head starts anew")
    return "; ".join(notes)


def demand_fit(state, needed, whole, weights, backbone, channels):
    """Raises ValueError, with the remedy, for the state of another ResNet or, if `whole`, other channels."""
    held, need = kind(state, needed, backbone), backbone
    width = len(state["decoder.0.0.weight"]) if whole else channels
    if (held, width) == (backbone, channels):
        return
    flags = {"--backbone": (held, backbone), "--channels": (width, channels)}
    remedy = " ".join(f"{flag} {has}" for flag, (has, given) in flags.items() if has != given)
    if held not in BACKBONES:
        remedy = f"torchvision's state dict of {backbone}, --weights imagenet or --weights none"
    if whole:
        held, need = f"{held} with {width} channels", f"{backbone} with {channels}"
    raise ValueError(f"weights {weights}: hold {held}, where {need} is needed; give {remedy}")


def flatten(tree, path=""):
    """Dicts of dicts of tensors -> pairs (name, tensor), with dots in the names, torchvision's names."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{path}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{path}{name}".replace("stem.0.", "conv1.").replace("stem.1.", "bn1."), value


def encoder(state):
    """The shapes of a ResNet's layers in a state dict with torchvision's names."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()
            if name.startswith(("conv1.", "bn1.", "stem.", "layer")) and "num_batches" not in name}


def kind(state, needed, backbone):
    """Which ResNet a state dict is of: torchvision's name, or how it differs from what is needed."""
    have, need = encoder(state), encoder(needed)
    if have == need:
        return backbone
    if FIRST not in have:
        return f"no ResNet by torchvision's names ({FIRST} and so on)"
    if any(name.startswith(("conv1.0.", "stem.")) for name in have):
        return "a ResNet with a deep stem (several convolutions for conv1)"
    for name in models.list_models(models, include="*resne[tx]*"):
        with torch.device("meta"):
            if have == encoder(models.get_model(name).state_dict()):
                return name
    name = next(name for name in (*need, *have) if have.get(name) != need.get(name))
    return f"a network whose {name} is {have.get(name, 'missing')} rather than {need.get(name, 'missing')}"
