"""Table 5, Eq. 8, hard-easy pairs and Eq. 9."""

import numpy as np
import pytest
import torch
from PIL import Image

from augment import (INTENSITY_OPERATIONS, blend_intensity, box_masks, cutmix, hard_easy_pairs, pad,
                     random_boxes, strong_augment, weak_augment)


def rng(*seed):
    return np.random.default_rng(seed)


def photograph(width=90, height=60, seed=0):
    small = Image.fromarray(rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_weak_crop_is_what_resizing_all_and_cropping_gives():
    # The factor and the corner are the first draws, so the slow way can repeat them.
    image, mask = photograph(), photograph(seed=1).convert("L").point(lambda v: v // 64)
    for seed in range(30):
        crop, labels = weak_augment(image, mask, 48, rng(seed))
        again = rng(seed)
        factor = again.uniform(0.5, 2.0)
        size = round(90 * factor), round(60 * factor)
        left, top = (int(again.integers(0, max(side - 48, 0) + 1)) for side in size)
        box = (left, top, left + min(48, size[0]), top + min(48, size[1]))
        slow = image.resize(size, Image.Resampling.BILINEAR).crop(box)
        if again.random() < 0.5:
            crop, labels = crop.transpose(0), labels.transpose(0)
        assert crop.size == labels.size == slow.size
        assert np.abs(np.array(crop).astype(int) - np.array(slow)).max() <= 2
        slow_labels = mask.resize(size, Image.Resampling.NEAREST).crop(box)
        assert (np.array(labels) == np.array(slow_labels)).mean() > 0.98


def test_weak_moves_image_and_mask_together_and_never_blends_labels():
    # A mask drawn into the red channel: after any crop, red must still tell the label.
    labels = np.zeros((60, 90), np.uint8)
    labels[20:45, 30:70] = 9
    labels[0:10] = 255
    mask = Image.fromarray(labels)
    image = Image.merge("RGB", [mask.point(lambda v: 200 * (v > 0))] * 3)
    for seed in range(30):
        crop, crop_mask = weak_augment(image, mask, 40, rng(seed))
        crop, crop_mask = np.array(crop)[..., 0], np.array(crop_mask)
        assert set(np.unique(crop_mask)) <= {0, 9, 255}
        assert ((crop > 100) == (crop_mask > 0)).mean() > 0.97


def test_weak_scale_flip_and_crop_have_table_5s_ranges():
    seen = [weak_augment(photograph(), None, 1000, rng(seed))[0].width / 90 for seed in range(400)]
    assert 0.49 < min(seen) < 0.55 and 1.95 < max(seen) < 2.01
    gradient = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (60, 1))).convert("RGB")
    flipped = []
    for seed in range(400):
        crop = np.array(weak_augment(gradient, None, 30, rng(seed))[0])[..., 0].astype(int)
        flipped.append(crop[0, 0] > crop[0, -1])
    assert 0.42 < np.mean(flipped) < 0.58
    assert weak_augment(photograph(), None, 40, rng(0), scale=(2, 2))[0].size == (40, 40)
    assert weak_augment(photograph().convert("L"), None, 40, rng(0))[0].mode == "RGB"


def test_weak_keeps_a_pixel_of_the_thinnest_image():
    # 40 x 1 times 0.4 would be 16 x 0.
    crop, mask = weak_augment(Image.new("RGB", (40, 1), (9, 9, 9)), Image.new("L", (40, 1), 7), 30, rng(0),
                              scale=(0.4, 0.4))
    assert crop.size == mask.size == (16, 1)
    assert crop.getcolors() == [(16, (9, 9, 9))] and mask.getcolors() == [(16, 7)]


def test_weak_max_side_shrinks_before_scaling():
    crop, _ = weak_augment(photograph(90, 60), None, 1000, rng(0), scale=(1, 1), max_side=45)
    assert crop.size == (45, 30)
    assert weak_augment(photograph(), None, 1000, rng(0), scale=(1, 1), max_side=500)[0].size == (90, 60)


def test_weak_decodes_a_large_jpeg_no_larger_than_needed(tmp_path):
    photograph(1600, 1200).save(tmp_path / "large.jpg", quality=95)
    lazily = Image.open(tmp_path / "large.jpg")
    crop, _ = weak_augment(lazily, None, 64, rng(0), scale=(1, 1), max_side=200)
    assert lazily.size == (200, 150)  # decoded at an eighth
    whole, _ = weak_augment(Image.open(tmp_path / "large.jpg").convert("RGB"), None, 64, rng(0),
                            scale=(1, 1), max_side=200)
    assert np.abs(np.array(crop).astype(int) - np.array(whole)).mean() < 3


def test_the_twelve_operations_of_table_5():
    assert set(INTENSITY_OPERATIONS) == {
        "identity", "invert", "autocontrast", "equalize", "blur", "contrast", "sharpness", "color",
        "brightness", "hue", "posterize", "solarize"}
    image = photograph().point(lambda v: 40 + v // 2)
    before = np.array(image)
    for name, operation in INTENSITY_OPERATIONS.items():
        results = [np.array(operation(image, rng(seed))) for seed in range(8)]
        assert all(r.shape == before.shape and r.dtype == np.uint8 for r in results), name
        assert (np.array(image) == before).all(), f"{name} changed its input"
        assert (name == "identity") == all((r == before).all() for r in results), name


class Highest:
    """Draws the upper (or lower) end of every range."""
    def __init__(self, end):
        self.end = end

    def uniform(self, low, high):
        self.range = (low, high)
        return (low, high)[self.end]

    def integers(self, low, high):
        self.range = (low, high)
        return (low, high - 1)[self.end]


@pytest.mark.parametrize("name, low, high", [
    ("contrast", 0.05, 0.95), ("sharpness", 0.05, 0.95), ("color", 0.05, 0.95),
    ("brightness", 0.05, 0.95), ("hue", -0.5, 0.5), ("blur", 0.1, 2.0), ("posterize", 4, 9),
    ("solarize", 1, 256)])
def test_the_ranges_of_table_5(name, low, high):
    for end in (0, 1):
        draws = Highest(end)
        INTENSITY_OPERATIONS[name](photograph(), draws)
        assert draws.range == (low, high)


def test_operations_by_hand():
    pixel = Image.new("RGB", (1, 1), (10, 100, 250))

    def value(name, draw):
        return INTENSITY_OPERATIONS[name](pixel, draw).getpixel((0, 0))

    assert value("invert", None) == (245, 155, 5)
    assert value("posterize", Highest(0)) == (0, 96, 240)           # 4 bits
    assert value("posterize", Highest(1)) == (10, 100, 250)         # 8 bits
    assert value("solarize", Highest(1)) == (10, 100, 250)          # threshold 255
    assert value("solarize", Highest(0)) == (245, 155, 5)           # threshold 1
    assert value("brightness", Highest(0)) == (0, 5, 12)


def test_strong_view_is_two_different_operations_one_after_the_other(monkeypatch):
    # R13. The operations leave their names behind.
    trace = []
    for name in INTENSITY_OPERATIONS:
        monkeypatch.setitem(INTENSITY_OPERATIONS, name,
                            lambda image, rng, name=name: trace.append(name) or image)
    pairs, image = set(), photograph()
    for seed in range(2000):
        trace.clear()
        assert strong_augment(image, rng(seed)) is image
        assert len(trace) == len(set(trace)) == 2
        pairs.add(tuple(trace))
    assert len(pairs) == 12 * 11


def test_pad_fills_below_and_to_the_right():
    padded = np.array(pad(Image.new("L", (2, 1), 7), 3, 255))
    assert padded.tolist() == [[7, 7, 255], [255, 255, 255], [255, 255, 255]]


def test_eq_8_distorts_easy_images_most():
    # R1. gamma 0 shows the strong view, gamma 1 the weak one, 0.25 three quarters of the strong.
    weak, strong = torch.zeros(3, 3, 2, 2), torch.ones(3, 3, 2, 2)
    blend = blend_intensity(weak, strong, torch.tensor([0.0, 1.0, 0.25]))
    assert blend[:, 0, 0, 0].tolist() == [1, 0, 0.75]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_eq_8_takes_views_of_any_floating_point_type(dtype):
    weak, strong = torch.zeros(2, 3, 2, 2, dtype=dtype), torch.ones(2, 3, 2, 2, dtype=dtype)
    blend = blend_intensity(weak, strong, torch.tensor([0.25, 1.0]))
    assert blend.dtype == dtype and blend[:, 0, 0, 0].tolist() == [0.75, 0]


def test_hard_easy_pairs_by_hand():
    # Sorted: image 2 (0.1), 0 (0.4), 3 (0.5), 1 (0.9). The easiest goes with the hardest.
    assert hard_easy_pairs(torch.tensor([0.4, 0.9, 0.1, 0.5])).tolist() == [3, 2, 1, 0]
    assert hard_easy_pairs(torch.tensor([0.4, 0.9, 0.1])).tolist() == [0, 2, 1]  # 0 is in the middle
    assert hard_easy_pairs(torch.zeros(4)).tolist() == [3, 2, 1, 0]  # ties: by position


def test_hard_easy_pairs_are_mutual_and_of_opposite_rank():
    gamma = torch.rand(16, generator=torch.Generator().manual_seed(0))
    partner = hard_easy_pairs(gamma)
    assert (partner[partner] == torch.arange(16)).all()
    rank = gamma.argsort().argsort()
    assert (rank + rank[partner] == 15).all()


def test_random_boxes_have_r12s_sides_and_lie_in_the_image():
    boxes = random_boxes(5000, 100, 200, rng(0))
    top, left, bottom, right = boxes.T
    assert boxes.min() >= 0 and bottom.max() <= 100 and right.max() <= 200
    inside = (top > 0) & (bottom < 100) & (left > 0) & (right < 200)
    height, width = (bottom - top)[inside], (right - left)[inside]
    assert ((2 * height - width).abs() <= 3).all()  # one ratio for both sides, but for rounding
    assert 9 <= height.min() < 13 and (bottom - top).max() <= 91 and (bottom - top).max() > 85
    assert abs(((top + bottom) / 2)[inside].float().mean() - 50) < 2
    assert (top == 0).float().mean() > 0.1  # centres are uniform, and boxes clipped at the border


def test_a_random_box_by_hand():
    # Ratio 0.1 + 0.8 / 2 = 0.5: rows 1.75 to 5.25 of 7; columns -1.3, clipped to 0, to 3.7 of 10. Rounded.
    class Draws:
        def random(self, shape):
            assert shape == (3, 1)
            return np.array([[0.5], [0.5], [0.12]])
    boxes = random_boxes(1, 7, 10, Draws())
    assert boxes.tolist() == [[2, 0, 5, 4]] and boxes.dtype == torch.int64


def test_eq_9_by_hand():
    # Two 1 x 3 images that are partners. The box of image 0 is its first pixel, of image 1 its last.
    images = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8).reshape(2, 1, 1, 3)
    labels = torch.tensor([[10, 20, 255], [40, 50, 60]], dtype=torch.uint8).reshape(2, 1, 3)
    masks = box_masks(torch.tensor([[0, 0, 1, 1], [0, 2, 1, 3]]), 1, 3)
    assert masks.tolist() == [[[True, False, False]], [[False, False, True]]]
    mixed, mixed_labels = cutmix(images, labels, torch.tensor([1, 0]), masks)
    assert mixed.flatten(1).tolist() == [[4, 2, 3], [4, 5, 3]]
    assert mixed_labels.flatten(1).tolist() == [[40, 20, 255], [40, 50, 255]]
    assert mixed.dtype == mixed_labels.dtype == torch.uint8
    same, same_labels = cutmix(images, labels, torch.tensor([1, 0]), torch.zeros_like(masks))
    assert same.equal(images) and same_labels.equal(labels)


def test_a_box_has_rows_and_columns():
    # Rows 1 and 2, column 3, of 4 x 5.
    mask, = box_masks(torch.tensor([[1, 3, 3, 4]]), 4, 5)
    assert mask.nonzero().tolist() == [[1, 3], [2, 3]]


def test_the_lower_half_reads_no_value():
    # On a GPU that would be a host-device sync; on "meta", whose tensors hold no values, it raises.
    with torch.device("meta"):
        images, gamma, boxes = torch.empty(2, 3, 4, 4), torch.empty(2), torch.empty(2, 4)
        mixed, labels = cutmix(blend_intensity(images, images, gamma), images[:, 0], hard_easy_pairs(gamma),
                               box_masks(boxes, 4, 4))
    assert mixed.shape == (2, 3, 4, 4) and labels.shape == (2, 4, 4)


VIEWS, LABELS, GAMMA = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), torch.zeros(2)
PARTNER, MASKS = torch.tensor([1, 0]), torch.ones(2, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize("call, message", [
    (lambda: blend_intensity(VIEWS, VIEWS, GAMMA[:, None]),
     r"hardness is torch.float32 of shape \(2, 1\), and should be torch.float32 of shape \(2,\)$"),
    (lambda: blend_intensity(VIEWS, VIEWS[:1], GAMMA), r"strong is .* \(1, 3, 4, 4\), and should be"),
    (lambda: hard_easy_pairs(GAMMA[:, None]), r"hardness is .* \(2, 1\), and should be .* \(2,\)"),
    (lambda: cutmix(VIEWS, LABELS, PARTNER, MASKS[:, None]), r"masks is .* \(2, 1, 4, 4\), and should be"),
    (lambda: cutmix(VIEWS, LABELS, PARTNER, MASKS[0]), r"masks is .* \(4, 4\), and should be .* \(2, 4, 4\)"),
    (lambda: cutmix(VIEWS, LABELS, PARTNER, MASKS.byte()), "masks is torch.uint8 .* should be torch.bool"),
    (lambda: cutmix(VIEWS, LABELS[:, None], PARTNER, MASKS), r"pseudo_labels is .* \(2, 1, 4, 4\), and"),
    (lambda: cutmix(VIEWS, LABELS, PARTNER[:1], MASKS), r"partner is .* \(1,\), and should be .* \(2,\)")])
def test_what_would_be_silently_wrong_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
