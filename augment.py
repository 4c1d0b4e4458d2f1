"""Table 5's augmentations, and their guidance by hardness: Eq. 8, hard-easy pairs, Eq. 9.

    Table 5    weak_augment, INTENSITY_OPERATIONS, strong_augment, random_boxes (CutMix)
    Eq. 8      blend_intensity
    Eq. 9      hard_easy_pairs, box_masks, cutmix

Works alone. The upper half, Table 5, works on the CPU and draws from the numpy Generator it is
given; the lower half, Eq. 8 and Eq. 9, is torch on a whole batch and its device, without a Python
loop over images and without a host-device sync. R1, R2, R12 and R13 are readings of what the paper
leaves open; each is explained where it is used.

Shapes: B images, H x W pixels. `hardness` is gamma of Eq. 7, (B,) in [0, 1], large for hard. The
lower half raises ValueError for tensors of other shapes.
"""

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as TF


def weak_augment(image, mask, crop_size, rng, scale=(0.5, 2.0), max_side=None):
    """Weak augmentation of Table 5: random scale, crop and flip, of image and mask together.

    image:      a Pillow image, W x H; a JPEG that is not loaded yet is decoded no larger than the
                crop needs.
    mask:       its label map, a Pillow image of the same size, or None.
    crop_size:  side of the square crop.
    scale:      the range of the factor on the image's own size.
    max_side:   if given, an image whose longer side is above it is first shrunk to it.
    Returns (image, mask), image in RGB, at most crop_size x crop_size: smaller where the scaled image
    is, for the caller to pad (see pad). Only the crop is resampled, with the same result as resizing
    the whole image and then cropping; masks take the nearest label.
    """
    width, height = image.size
    factor = rng.uniform(*scale) * min(1, (max_side or max(image.size)) / max(image.size))
    scaled = [max(1, round(side * factor)) for side in (width, height)]
    size = [min(side, crop_size) for side in scaled]
    left, top = (int(rng.integers(0, a - b + 1)) for a, b in zip(scaled, size, strict=True))
    corners = (left, top, left + size[0], top + size[1])
    flip = rng.random() < 0.5

    def crop(picture, resample):
        box = [c * side / s for c, side, s in zip(corners, picture.size * 2, scaled * 2, strict=True)]
        picture = picture.resize(size, resample, box=box)
        return ImageOps.mirror(picture) if flip else picture

    image.draft(None, tuple(scaled))
    return (crop(image.convert("RGB"), Image.Resampling.BILINEAR),
            crop(mask, Image.Resampling.NEAREST) if mask is not None else None)


# Table 5's intensity operations: name -> f(image, rng). The table gives no sigma for the blur and no sign
# for the hue, which here shifts both ways, as in torchvision's ColorJitter.
INTENSITY_OPERATIONS = {
    "identity": lambda image, rng: image,
    "invert": lambda image, rng: TF.invert(image),
    "autocontrast": lambda image, rng: TF.autocontrast(image),
    "equalize": lambda image, rng: TF.equalize(image),
    "blur": lambda image, rng: image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))),
    "contrast": lambda image, rng: TF.adjust_contrast(image, rng.uniform(0.05, 0.95)),
    "sharpness": lambda image, rng: TF.adjust_sharpness(image, rng.uniform(0.05, 0.95)),
    "color": lambda image, rng: TF.adjust_saturation(image, rng.uniform(0.05, 0.95)),
    "brightness": lambda image, rng: TF.adjust_brightness(image, rng.uniform(0.05, 0.95)),
    "hue": lambda image, rng: TF.adjust_hue(image, rng.uniform(-0.5, 0.5)),
    "posterize": lambda image, rng: TF.posterize(image, int(rng.integers(4, 9))),
    "solarize": lambda image, rng: TF.solarize(image, int(rng.integers(1, 256))),
}


def strong_augment(image, rng):
    """Two different operations of Table 5's twelve, one after the other (R13).

    A Pillow RGB image without padding (equalize and autocontrast look at all of it) -> the same.
    """
    for name in rng.choice(list(INTENSITY_OPERATIONS), size=2, replace=False):
        image = INTENSITY_OPERATIONS[name](image, rng)
    return image


def pad(picture, size, fill):
    """A Pillow image on a size x size canvas of colour `fill`, in its upper left corner."""
    return ImageOps.expand(picture, (0, 0, size - picture.width, size - picture.height), fill)


def random_boxes(batch, height, width, rng):
    """One CutMix box an image (R12): side ratio U(0.1, 0.9), centre uniform, clipped at the border.

    Returns a (B, 4) int64 tensor of (top, left, bottom, right) on the CPU, where the numpy Generator
    `rng` draws. Move it to the images' device and give it to box_masks.
    """
    ratio, y, x = torch.from_numpy(rng.random((3, batch)))
    half = (0.1 + 0.8 * ratio) / 2
    top, bottom = ((y + side * half).clamp(0, 1) * height for side in (-1, 1))
    left, right = ((x + side * half).clamp(0, 1) * width for side in (-1, 1))
    return torch.stack([top, left, bottom, right], dim=1).round().long()


def blend_intensity(weak, strong, hardness):
    """A^I(u), Eq. 8: the strong view weighs 1 - gamma, so that hard images are distorted least (R1).

    weak, strong (B, 3, H, W), of one floating-point type -> the same, in that type. Pass 1 - gamma for
    the equation as printed.
    """
    demand("strong", strong, weak.shape)
    demand("hardness", hardness, weak.shape[:1])
    gamma = hardness[:, None, None, None].to(weak.dtype)  # lerp takes one type
    return torch.lerp(strong, weak, gamma)  # (1 - gamma) A^I(u) + gamma A_w(u)


def hard_easy_pairs(hardness):
    """The hard-easy pairs (u_m, u_n) of Eq. 9, Sec. 2.3.1: the easiest image with the hardest, the
    second easiest with the second hardest, and so on.

    hardness (B,) -> (B,) int64, the index of each image's partner. A pairing is mutual; in an odd
    batch the image in the middle is its own partner.
    """
    demand("hardness", hardness, (len(hardness),))
    ascending = hardness.argsort(stable=True)
    return torch.empty_like(ascending).scatter_(0, ascending, ascending.flip(0))


def box_masks(boxes, height, width):
    """M of Eq. 9: boxes (B, 4) -> (B, H, W) bool, True inside the box."""
    y = torch.arange(height, device=boxes.device)[None, :, None]
    x = torch.arange(width, device=boxes.device)[None, None, :]
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def cutmix(images, pseudo_labels, partner, masks):
    """A^C(u) and p^t', Eq. 9: inside its mask, an image shows its partner, and so does its label map.

    images (B, 3, H, W) and pseudo_labels (B, H, W) of any dtype, partner (B,), masks (B, H, W) bool
    -> (images, pseudo_labels). One coin ~ U(0, 1) triggers Eq. 9 for the whole batch: with
    `fired = coin > gamma_bar`, gamma_bar the mean hardness (R2), give `masks & fired`. An image whose
    mask is all False stays as it is.
    """
    size = images.shape[:1] + images.shape[2:]
    demand("pseudo_labels", pseudo_labels, size)
    demand("masks", masks, size, torch.bool)
    demand("partner", partner, images.shape[:1])
    return (torch.where(masks[:, None], images[partner], images),
            torch.where(masks, pseudo_labels[partner], pseudo_labels))


def demand(name, tensor, shape, dtype=None):
    """Raises ValueError for a tensor of another shape or type."""
    if tensor.shape != shape or dtype not in (None, tensor.dtype):
        raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and should be "
                         f"{dtype or tensor.dtype} of shape {tuple(shape)}")
