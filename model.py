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

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
LOW_LEVEL_CHANNELS = 48


class DeepLabV3Plus(nn.Module):
    """Encoder, atrous spatial pyramid pooling, and the decoder with low-level features.

    num_classes:    C, the channels of the logits.
    backbone:       one of BACKBONES.
    output_stride:  16 or 8: how much coarser than the image the deepest features are.
    channels:       width of ASPP and decoder (256 in the paper; 64 trains on a laptop).
    weights:        for the encoder: "imagenet" (torchvision's IMAGENET1K_V1), the path of a
                    torchvision ResNet state dict, or None / "none" for a random start.
    aux:            adds an FCN head on stage 3, used in training only (see forward).

    Raises ValueError for a backbone or stride that is not there, and for weights that do not fit;
    OSError where the weights cannot be read or fetched.
    """

    def __init__(self, num_classes, backbone="resnet50", output_stride=16, channels=256,
                 weights=None, aux=False):
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone {backbone!r} is not one of {', '.join(BACKBONES)}")
        if output_stride not in (8, 16):
            raise ValueError(f"output stride {output_stride} is neither 8 nor 16")
        resnet = models.get_model(backbone, weights=None)
        if weights not in (None, "none"):
            load_backbone_weights(resnet, backbone, weights)
        width = resnet.fc.in_features  # of stage 4; 2048 for bottlenecks, 512 for basic blocks

        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        if output_stride == 8:
            dilate(self.layer3, 1, 2)
            dilate(self.layer4, 2, 4)
        else:
            dilate(self.layer4, 1, 2)

        self.aspp = ASPP(width, [rate * 16 // output_stride for rate in (6, 12, 18)], channels)
        self.aspp.convs[-1] = ImagePooling(*self.aspp.convs[-1])
        del self.aspp.project[-1]  # its dropout: the authors use none, and it draws unseeded
        self.low_level = conv_bn_relu(width // 8, LOW_LEVEL_CHANNELS, 1)
        self.decoder = nn.Sequential(
            conv_bn_relu(channels + LOW_LEVEL_CHANNELS, channels, 3),
            conv_bn_relu(channels, channels, 3),
            nn.Conv2d(channels, num_classes, 1),
        )
        self.aux = FCNHead(width // 2, num_classes) if aux else None
        if aux:
            del self.aux[-2]  # its dropout, likewise

    def forward(self, images):
        """images (B, 3, H, W), any H and W, ImageNet-normalised -> logits (B, C, H, W), float32.

        With `aux`, training mode returns the pair (logits, auxiliary logits).
        Raises ValueError in training for a batch of one (see ImagePooling).
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


class ImagePooling(nn.Sequential):
    """ASPP's image pooling, of torchvision's modules: one value a channel, the same at every pixel.

    It is expanded rather than interpolated, which autocast would do in float32. Raises ValueError in
    training for a batch of one image, whose one value BatchNorm cannot normalise (a SyncBatchNorm
    can: it sees the other ranks' images too).
    """

    def forward(self, features):
        norm = self[2]
        if norm.training and isinstance(norm, nn.BatchNorm2d) and len(features) == 1:
            raise ValueError("DeepLabV3+ cannot train on a batch of one image: image pooling leaves "
                             "BatchNorm one value a channel; use a batch of two or more")
        pooled = super().forward(features).expand(-1, -1, *features.shape[-2:])
        # What it is joined with stays channels_last only if all of it is.
        return pooled.contiguous(memory_format=torch.channels_last)


def conv_bn_relu(in_channels, out_channels, kernel_size):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def upsample(coarse, size):
    # In float32: softmax and losses want the logits so, and the coarse map is cheap to cast.
    return F.interpolate(coarse.float(), size, mode="bilinear")


def dilate(layer, previous, dilation):
    """Give up a ResNet stage's stride of 2 for dilation, in place.

    The convolution that had the stride keeps the dilation `previous` of the stage before; the 3x3
    convolutions after it take `dilation`. Every second pixel of the result is then exactly what the
    strided stage computes, for basic blocks and bottlenecks alike.
    """
    for conv in (m for m in layer.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            rate = previous if conv.stride == (2, 2) else dilation
            conv.dilation = conv.padding = (rate, rate)
        conv.stride = (1, 1)


def load_backbone_weights(resnet, backbone, weights):
    """Load torchvision's ImageNet weights, or a state dict in a file, into a torchvision ResNet."""
    if weights == "imagenet":
        published = models.get_model_weights(backbone).IMAGENET1K_V1
        try:
            state = published.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # offline, or a broken file, for which torch.load has many errors
            folder, reason = Path(torch.hub.get_dir()) / "checkpoints", str(error).partition("\n")[0]
            raise OSError(f"cannot fetch the ImageNet weights ({reason}); bring {published.url} to "
                          f"{folder}, or give --weights FILE or --weights none") from error
    else:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise OSError(f"weights {weights}: no such file") from None
        except Exception as error:
            raise ValueError(f"weights {weights}: not a file of tensors that torch.load reads "
                             f"with weights_only=True") from error
    expected = resnet.state_dict()
    if not isinstance(state, dict):
        raise ValueError(f"weights {weights}: holds no state dict")
    for name, tensor in expected.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        if getattr(state.get(name), "shape", None) != tensor.shape:
            found = tuple(state[name].shape) if hasattr(state.get(name), "shape") else "nothing"
            raise ValueError(f"weights {weights}: do not fit {backbone}: layer {name} should be "
                             f"{tuple(tensor.shape)} and is {found}")
    resnet.load_state_dict({k: v for k, v in state.items() if k in expected and k[:3] != "fc."},
                           strict=False)
