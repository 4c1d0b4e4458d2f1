"""Eq. 5-7 and Eq. 10, by hand, as properties, and against a slow version in NumPy."""

import math

import numpy as np
import pytest
import torch

from hardness import (IGNORE, confidence_hardness, confident_ratio, instance_hardness, loss_hardness,
                      pixel_cross_entropy, pseudo_label, top_class, unsupervised_loss, weighted_iou)


def one_hot(classes, num_classes, confidence=1.0):
    """A prob whose argmax is `classes` and whose maximum is `confidence` everywhere."""
    classes = torch.as_tensor(classes)
    rest = (1 - confidence) / (num_classes - 1)
    prob = torch.full((*classes.shape, num_classes), rest)
    return prob.scatter_(-1, classes[..., None], confidence).movedim(-1, 1)


def random_prob(B=3, C=5, H=6, W=7, seed=0, sharpness=4.0):
    logits = torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed))
    return (sharpness * logits).softmax(1)


def test_confident_ratio_of_a_2x2_image():
    # Highest probabilities 0.9, 0.6, 0.7, 0.5: two of four reach 0.7 ("at least": 0.7 counts).
    prob = torch.tensor([[[[0.9, 0.6], [0.7, 0.5]], [[0.1, 0.4], [0.3, 0.5]]]])
    assert confident_ratio(prob, 0.7).tolist() == [0.5]
    # Without the last pixel: two of three.
    valid = torch.tensor([[[True, True], [True, False]]])
    assert confident_ratio(prob, 0.7, valid).tolist() == pytest.approx([2 / 3])


def test_weighted_iou_of_a_2x2_image():
    # z1 = 0 0 / 0 1 and z2 = 0 0 / 1 1.  IoU_0 = 2/3 and IoU_1 = 1/2.
    # Shares of z1: 3/4 and 1/4, so wIoU = 3/4 * 2/3 + 1/4 * 1/2 = 5/8.
    # Shares of z2: 1/2 and 1/2, so wIoU = 1/2 * 2/3 + 1/2 * 1/2 = 7/12.
    z1, z2 = torch.tensor([[[0, 0], [0, 1]]]), torch.tensor([[[0, 0], [1, 1]]])
    assert weighted_iou(z1, z2, 3).tolist() == pytest.approx([5 / 8])
    assert weighted_iou(z2, z1, 3).tolist() == pytest.approx([7 / 12])


def test_hardness_of_a_2x2_image():
    # The maps above, the student confident in all four pixels, the teacher in three:
    # gamma = 1 - (1/2 * wIoU(z_s, z_t) + 3/8 * wIoU(z_t, z_s)) = 1 - (5/16 + 7/32) = 15/32.
    prob_s = one_hot([[[0, 0], [0, 1]]], 3, 0.95)
    prob_t = one_hot([[[0, 0], [1, 1]]], 3, 0.95)
    prob_t[0, :, 0, 0] = torch.tensor([0.5, 0.3, 0.2])
    assert instance_hardness(prob_t, prob_s, 0.9).tolist() == pytest.approx([15 / 32])


def test_top_class_is_the_maximum_and_the_first_place_of_it():
    prob = random_prob(B=4, C=21)
    prob[0, 7] = prob[0, 3] = 1  # two equal ones: the first
    for memory_format in (torch.contiguous_format, torch.channels_last):
        confidence, labels = top_class(prob.contiguous(memory_format=memory_format))
        assert confidence.equal(prob.amax(1)) and labels.equal(prob.argmax(1))
        assert (labels[0] == 3).all()
    # Off the CPU the shapes and types are the same.
    confidence, labels = top_class(torch.empty(4, 21, 6, 7, device="meta"))
    assert confidence.shape == labels.shape == (4, 6, 7) and labels.dtype == torch.int64
    # What has diverged is still given a class, which indexing on a GPU needs.
    assert (top_class(torch.full((1, 5, 2, 2), math.nan))[1] == 4).all()


def test_rho_of_the_student_pairs_with_the_students_own_shares():
    # R5. Only the student is confident: gamma = 1 - wIoU(z_s, z_t) / 2 = 1 - 5/16. With the shares
    # of the other map it would be 1 - 7/24.
    prob_s = one_hot([[[0, 0], [0, 1]]], 3, 0.95)
    prob_t = one_hot([[[0, 0], [1, 1]]], 3, 0.6)
    assert instance_hardness(prob_t, prob_s, 0.9).tolist() == pytest.approx([11 / 16])


def test_gamma_is_0_where_both_agree_with_confidence_and_1_where_nothing_is_confident():
    classes = torch.arange(48).reshape(2, 4, 6) % 7
    sure, unsure = one_hot(classes, 7, 1.0), one_hot(classes, 7, 0.4)
    assert instance_hardness(sure, sure, 0.95).tolist() == [0, 0]
    assert instance_hardness(unsure, unsure, 0.95).tolist() == [1, 1]
    assert instance_hardness(sure, one_hot((classes + 1) % 7, 7), 0.95).tolist() == [1, 1]


def test_one_class_everywhere_has_wiou_1():
    z = torch.full((1, 5, 5), 3)
    assert weighted_iou(z, z, 21).tolist() == [1]
    assert weighted_iou(z, torch.full_like(z, 4), 21).tolist() == [0]


def test_gamma_is_symmetric_and_within_bounds():
    for seed in range(20):
        prob_t, prob_s = random_prob(seed=seed), random_prob(seed=seed + 100)
        gamma = instance_hardness(prob_t, prob_s, 0.6)
        assert ((gamma >= 0) & (gamma <= 1)).all()
        assert torch.allclose(gamma, instance_hardness(prob_s, prob_t, 0.6))


@pytest.mark.parametrize("measure", [
    lambda t, s, valid: instance_hardness(t, s, 0.6, valid),
    lambda t, s, valid: instance_hardness(t, s, 0.6, valid, ignore_class=0),
    lambda t, s, valid: confidence_hardness(t, s, 0.6, valid),
    lambda t, s, valid: loss_hardness(t, s, valid=valid)])
def test_padding_changes_nothing(measure):
    # R6. What stands in the padding must not matter, nor how much of it there is.
    prob_t, prob_s = random_prob(seed=1), random_prob(seed=2)
    bare = measure(prob_t, prob_s, None)

    def pad(prob, seed):
        return torch.cat([prob, random_prob(H=4, seed=seed)], dim=2)

    valid = torch.ones(3, 10, 7, dtype=torch.bool)
    valid[:, 6:] = False
    for seed in (3, 4):
        assert torch.allclose(measure(pad(prob_t, seed), pad(prob_s, seed + 10), valid), bare)
    assert measure(prob_t, prob_s, torch.zeros(3, 6, 7, dtype=torch.bool)).tolist() == [1, 1, 1]


def test_wiou_takes_any_label_where_nothing_is_valid():
    z1 = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    z2 = torch.tensor([[[0, 0, 255]]], dtype=torch.uint8)
    # Of z1's two valid pixels one is class 0, with IoU 1/2; class 1 has IoU 0.
    assert weighted_iou(z1, z2, 2, z1 != 255).tolist() == [0.25]


def test_wiou_takes_uint8_maps_of_many_classes():
    z = torch.full((1, 2, 2), 20, dtype=torch.uint8)  # 20 x 21 classes is more than a uint8 holds
    assert weighted_iou(z, z, 21).tolist() == [1]


def test_one_valid_pixel_is_all_of_an_image():
    prob_t, prob_s = one_hot([[[1, 0]]], 3, 0.9), one_hot([[[1, 1]]], 3, 0.6)
    valid = torch.tensor([[[True, False]]])
    assert confident_ratio(prob_t, 0.8, valid).tolist() == [1]
    assert instance_hardness(prob_t, prob_s, 0.8, valid).tolist() == [0.5]  # only the teacher is confident
    assert loss_hardness(prob_t, prob_s, valid=valid).tolist() == pytest.approx([0.4])
    prob_s[..., 1] = torch.tensor([0.0, 1.0, 0.0])[:, None]  # the label there is impossible, and padding
    assert loss_hardness(prob_t, prob_s, valid=valid).tolist() == pytest.approx([0.4])


def test_ignore_class_makes_a_crop_of_background_maximally_hard():
    background = one_hot(torch.zeros(1, 4, 4, dtype=torch.long), 3)
    assert instance_hardness(background, background, 0.9).item() == 0
    assert instance_hardness(background, background, 0.9, ignore_class=0).item() == 1
    # Of 0 0 / 1 1 against 0 0 / 1 2, class 1 alone is left of z1's shares, and its IoU is 1/2.
    z1, z2 = torch.tensor([[[0, 0], [1, 1]]]), torch.tensor([[[0, 0], [1, 2]]])
    assert weighted_iou(z1, z2, 3, ignore_class=0).tolist() == [0.5]


def slow_hardness(prob_t, prob_s, tau, valid, ignore_class=None):
    """Eq. 5-7 an image and a class at a time."""
    def wiou(z1, z2, valid, num_classes):
        total = 0.0
        counted = [c for c in range(num_classes) if c != ignore_class]
        pixels = sum(((z1 == c) & valid).sum() for c in counted)
        for c in counted:
            a, b = (z1 == c) & valid, (z2 == c) & valid
            if a.any():
                total += a.sum() / pixels * (a & b).sum() / (a | b).sum()
        return total

    gammas = []
    for p_t, p_s, v in zip(prob_t.numpy(), prob_s.numpy(), valid.numpy(), strict=True):
        z_t, z_s = p_t.argmax(0), p_s.argmax(0)
        rho_t, rho_s = ((p.max(0) >= tau)[v].mean() for p in (p_t, p_s))
        gammas.append(1 - rho_s / 2 * wiou(z_s, z_t, v, len(p_s)) - rho_t / 2 * wiou(z_t, z_s, v, len(p_t)))
    return gammas


@pytest.mark.parametrize("ignore_class", [None, 0])
def test_against_a_loop_over_images_and_classes(ignore_class):
    for seed in range(10):
        prob_t = random_prob(4, 6, 9, 11, seed)
        prob_s = (prob_t.log() + random_prob(4, 6, 9, 11, seed + 50)).softmax(1)
        valid = torch.rand(4, 9, 11, generator=torch.Generator().manual_seed(seed)) < 0.8
        expected = slow_hardness(prob_t, prob_s, 0.5, valid, ignore_class)
        gamma = instance_hardness(prob_t, prob_s, 0.5, valid, ignore_class)
        np.testing.assert_allclose(gamma, expected, atol=1e-6)


def test_alternatives_of_fig_3a_by_hand():
    prob_t = one_hot([[[0, 0], [1, 1]]], 2, 0.9)
    prob_s = one_hot([[[0, 0], [0, 1]]], 2, 0.8)
    # rho_t = 1 and rho_s = 0 at tau 0.85.
    assert confidence_hardness(prob_t, prob_s, 0.85).tolist() == [0.5]
    # The student gives the teacher's labels 0.8, 0.8, 0.2, 0.8: 1 - their geometric mean.
    expected = 1 - math.prod([0.8, 0.8, 0.2, 0.8]) ** 0.25
    assert loss_hardness(prob_t, prob_s).tolist() == pytest.approx([expected])
    prob_t, prob_s = random_prob(seed=1), random_prob(seed=2)
    loss = torch.nn.functional.nll_loss(prob_s.log(), prob_t.argmax(1), reduction="none").mean((1, 2))
    torch.testing.assert_close(loss_hardness(prob_t, prob_s), 1 - (-loss).exp())
    impossible = one_hot([[[1, 1], [1, 1]]], 2)
    assert loss_hardness(one_hot([[[0, 0], [0, 0]]], 2), impossible).item() == pytest.approx(1)


def test_pseudo_labels_are_kept_where_confident_and_valid():
    prob = torch.tensor([[[[0.9, 0.6], [0.2, 0.05]], [[0.1, 0.4], [0.8, 0.95]]]])
    valid = torch.tensor([[[True, True], [True, False]]])
    assert pseudo_label(prob, 0.8).tolist() == [[[0, IGNORE], [1, 1]]]
    assert pseudo_label(prob, 0.8, valid).tolist() == [[[0, IGNORE], [1, IGNORE]]]
    assert pseudo_label(prob, 0.8).dtype == torch.uint8


def test_unsupervised_loss_by_hand():
    # Two images of 1 x 2 pixels, two classes. Uniform logits cost log 2 a pixel; 255 costs nothing.
    uniform = torch.zeros(2, 2, 1, 2)
    both, first = torch.tensor([[[0, 1]], [[1, 1]]]), torch.tensor([[[0, 255]], [[255, 255]]])
    gamma = torch.tensor([0.25, 1.0])
    # View I: image 0 costs log 2 on average, view C: half of it, as one of two pixels is ignored and
    # H x W stays 2 (R6). Weighted by 1 - gamma (R3): 0.75 and 0. Halved over the views, and over B.
    expected = (0.75 * (1 + 0.5) / 2 + 0) / 2 * math.log(2)
    assert unsupervised_loss([uniform, uniform], [both, first], gamma).item() == pytest.approx(expected)
    # Without hardness and with one view: Eq. 4.
    assert unsupervised_loss([uniform], [both], torch.zeros(2)).item() == pytest.approx(math.log(2))


def test_unsupervised_loss_with_weights_of_the_views_by_hand():
    # View I costs log 2 a pixel, view C half of it, as every second pixel is ignored; gamma is 0.5.
    uniform, gamma = torch.zeros(2, 2, 1, 2), torch.tensor([0.5, 0.5])
    views = [uniform, uniform], [torch.tensor([[[0, 1]]] * 2), torch.tensor([[[0, 255]]] * 2)]
    log2 = math.log(2)
    for fired, expected in ((1.0, (0.5 * 1 + 0.5 * 0.5) / 2), (0.0, 0.5)):
        fired = torch.tensor(fired)  # as the authors' code: a view that CutMix did not make weighs nothing
        weights = torch.stack([1 - fired / 2, fired / 2])
        assert unsupervised_loss(*views, gamma, weights).item() == pytest.approx(expected * log2)
    assert unsupervised_loss(*views, gamma, (0.5, 0.5)).equal(unsupervised_loss(*views, gamma))
    assert unsupervised_loss(*views, gamma, (0, 2)).item() == pytest.approx(0.5 * log2)


def test_a_view_that_weighs_nothing_sends_no_gradient():
    logits = [torch.randn(1, 3, 2, 2, requires_grad=True) for _ in range(2)]
    unsupervised_loss(logits, [torch.ones(1, 2, 2)] * 2, torch.tensor([0.2]), (1, 0)).backward()
    assert logits[0].grad.any() and not logits[1].grad.any()


def test_unsupervised_loss_sends_no_gradient_where_nothing_supervises():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    labels = torch.tensor([[[255, 1], [255, 255]]])
    unsupervised_loss([logits], [labels], torch.tensor([0.2])).backward()
    assert (logits.grad.abs().sum(1) > 0).tolist() == [[[False, True], [False, False]]]


def test_no_function_reads_a_value():
    # On a GPU that would be a host-device sync; on "meta", whose tensors hold no values, it raises.
    with torch.device("meta"):
        prob, valid = torch.empty(2, 5, 4, 4), torch.empty(2, 4, 4, dtype=torch.bool)
        gamma = instance_hardness(prob, prob, 0.9, valid, ignore_class=0)
        assert confidence_hardness(prob, prob, 0.9, valid).shape == gamma.shape == (2,)
        assert loss_hardness(prob, prob, valid=valid).shape == (2,)
        labels = pseudo_label(prob, 0.9, valid)
        assert unsupervised_loss([prob, prob], [labels, labels], gamma).shape == ()


PROB, GAMMA = torch.full((2, 3, 4, 4), 1 / 3), torch.zeros(2)
LABELS, VALID = torch.zeros(2, 4, 4, dtype=torch.uint8), torch.ones(2, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize("call, message", [
    (lambda: pseudo_label(torch.full((1, 299, 2, 2), 1 / 299), 0.5), "299 classes; .* at most 255"),
    (lambda: confident_ratio(PROB[0], 0.5), r"\(3, 4, 4\) is not \(B, C, H, W\)"),
    (lambda: confident_ratio(PROB, 0.5, VALID[:, None]), r"valid is torch.bool of shape \(2, 1, 4, 4\), and "
     r"should be torch.bool of shape \(2, 4, 4\)"),
    (lambda: pseudo_label(PROB, 0.5, VALID[0]), r"valid is .* should be .* \(2, 4, 4\)"),
    (lambda: loss_hardness(PROB, PROB, valid=VALID.byte() * 255), "valid is torch.uint8 .* be torch.bool"),
    (lambda: weighted_iou(LABELS, LABELS, 3, VALID.byte() * 255), "valid is torch.uint8 .* be torch.bool"),
    (lambda: weighted_iou(LABELS, LABELS[:1], 3), r"z2 is .* \(1, 4, 4\), and should be .* \(2, 4, 4\)"),
    (lambda: instance_hardness(PROB, PROB[:1], 0.5), "prob_s is"),
    (lambda: confidence_hardness(PROB, PROB[:1], 0.5), "prob_s is"),
    (lambda: loss_hardness(PROB, PROB[:1]), "prob_s is"),
    (lambda: unsupervised_loss([PROB], [LABELS], GAMMA[:, None]), r"hardness is .* \(2, 1\), and .* \(2,\)$"),
    (lambda: unsupervised_loss([PROB], [LABELS], GAMMA.mean()), r"hardness is .* \(\), and should be"),
    (lambda: unsupervised_loss([PROB, PROB], [LABELS], GAMMA), "2 views .* 1 of pseudo-labels and 2 weights"),
    (lambda: unsupervised_loss([PROB], [LABELS], GAMMA, (1, 0)), "1 views .* 1 of pseudo-labels and 2"),
    (lambda: unsupervised_loss(PROB, LABELS, GAMMA), "is not .B, C, H, W."),
    *((lambda piece=piece: piece(PROB[:, :1]), r"torch.cat\(\[1 - p, p\], 1\)") for piece in (
        lambda p: confident_ratio(p, 0.5), lambda p: instance_hardness(p, p, 0.5),
        lambda p: confidence_hardness(p, p, 0.5), lambda p: loss_hardness(p, p),
        lambda p: pseudo_label(p, 0.5), lambda p: pixel_cross_entropy(p, LABELS)))])
def test_what_would_be_silently_wrong_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_255_classes_are_told_from_what_is_ignored():
    prob = one_hot([[[0, 254]]], 255, 0.9)
    assert pseudo_label(prob, 0.8).tolist() == [[[0, 254]]]


def test_the_two_channels_that_the_message_makes_of_one():
    # Of a sigmoid's logit 2, p = 0.88: class 1, with confidence p, and the binary cross-entropy.
    z, labels = torch.full((1, 1, 1, 2), 2.0), torch.tensor([[[0, 1]]])
    p, logits = z.sigmoid(), torch.cat([0 * z, z], 1)
    assert pseudo_label(torch.cat([1 - p, p], 1), 0.85).tolist() == [[[1, 1]]]
    assert logits.softmax(1).allclose(torch.cat([1 - p, p], 1))
    binary = torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], labels.float())
    assert pixel_cross_entropy(logits, labels).item() == pytest.approx(binary.item())
