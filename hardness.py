"""How hard an unlabelled image is (Eq. 5-7), and the loss that it weighs (Eq. 10).

    Eq. 5, Eq. 6    confident_ratio                     Eq. 3     pixel_cross_entropy
    Eq. 7           instance_hardness, weighted_iou     Eq. 4     unsupervised_loss, gamma = 0
    Fig. 3(a)       confidence_hardness, loss_hardness  Eq. 10    unsupervised_loss, pseudo_label

Works alone with any segmentation network: torch is all it needs. Every function is vectorised over
the batch, without a host-device sync. R3, R5 and R6 are readings of what the paper leaves open; each
is explained where it is used.

Shapes: B images, C classes (two or more), H x W pixels. A `prob` is a softmax over C, (B, C, H, W),
float32. A `valid` is (B, H, W) bool, False where a crop was padded (R6); None means all True.

Raises ValueError for tensors of other shapes. Values are not checked, as reading them would be a
host-device sync: where logits and probabilities can be mistaken for each other, the first line of a
docstring says what that gives.
"""

import torch
import torch.nn.functional as F

IGNORE = 255  # the label of pixels that no loss sees: void, padding, low confidence


def confident_ratio(prob, tau, valid=None):
    """rho, Eq. 5 and Eq. 6, from probabilities. Logits are not refused, and give a wrong ratio.

    The ratio of (valid) pixels whose highest probability reaches tau: prob (B, C, H, W) -> (B,) in
    [0, 1]; 0 for an image that is all padding.
    """
    return ratio_of_maxima(top_class(prob)[0], tau, valid)


def ratio_of_maxima(confidence, tau, valid=None):
    """rho of Eq. 5 and Eq. 6 from the highest probability of each pixel, (B, H, W) -> (B,)."""
    demand("valid", valid, confidence.shape, torch.bool)
    confident = confidence >= tau  # 1(max(p(j)) >= tau)
    if valid is None:
        valid = torch.ones_like(confident)
    return (confident & valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def weighted_iou(z1, z2, num_classes, valid=None, ignore_class=None):
    """wIoU(z1, z2) of Eq. 7: the IoU of each class, weighted by its share of z1's pixels (R5).

    z1, z2 (B, H, W) integer class maps -> (B,) in [0, 1]. Not commutative: the shares are z1's, so
    a class that z1 lacks adds nothing. 1 where the maps agree on every valid pixel; 0 for an image
    that is all padding.
    num_classes:   C. A label of C or more on a valid pixel is an index out of range, or is counted as
                   another class.
    ignore_class:  a class that weighs nothing; the shares are then taken among the others, and an
                   image that holds no other class has wIoU 0. The authors' code does so with class 0.
    """
    return wiou_of_counts(count_pairs(z1, z2, num_classes, valid), ignore_class)


def count_pairs(z1, z2, num_classes, valid=None):
    """How many (valid) pixels are class i in z1 and class j in z2: (B, H, W) twice -> (B, C, C)."""
    demand("z2", z2, z1.shape)
    demand("valid", valid, z1.shape, torch.bool)
    B, C = len(z1), num_classes
    pair = (z1.long() * C + z2).flatten(1)
    counted = torch.ones_like(pair)
    if valid is not None:  # padding counts nowhere, whatever class stands there
        counted = valid.flatten(1).long()
        pair = pair * counted
    return pair.new_zeros(B, C * C).scatter_add_(1, pair, counted).view(B, C, C).float()


def wiou_of_counts(counts, ignore_class=None):
    """wIoU(z1, z2) from what count_pairs counts, (B, C, C) -> (B,); wIoU(z2, z1) from its transpose."""
    area1, area2, intersection = counts.sum(2), counts.sum(1), counts.diagonal(dim1=1, dim2=2)
    iou = intersection / (area1 + area2 - intersection).clamp(min=1)
    if ignore_class is not None:
        area1[:, ignore_class] = 0
    return (area1 * iou).sum(1) / area1.sum(1).clamp(min=1)


def top_class(prob):
    """The highest probability of each pixel and its class, the first of equal ones: prob.max(1).

    prob (B, C, H, W) -> (confidence (B, H, W), labels (B, H, W) int64).
    """
    demand_classes(prob)
    if not prob.is_cpu:
        return prob.max(1)
    # On a CPU, a max-pool with the classes as rows and the pixels as channels is several times faster.
    (B, C, H, W), pixels = prob.shape, prob.flatten(2)
    columns = pixels[:, :, None].permute(0, 3, 1, 2)  # (B, H x W, C, 1)
    confidence, labels = F.max_pool2d(columns, (C, 1), return_indices=True)
    return confidence.view(B, H, W), labels.view(B, H, W)


def instance_hardness(prob_t, prob_s, tau, valid=None, ignore_class=None):
    """gamma, Eq. 7, from probabilities. Logits are not refused, and give a wrong gamma.

    How far teacher and student are from a confident agreement on an image.
    prob_t, prob_s: both networks' predictions on the weakly augmented image, (B, C, H, W)
    -> (B,) in [0, 1], large for hard: 1 where nothing is confident, nothing overlaps or all is
    padding; 0 where both agree everywhere at full confidence. Symmetric in its two arguments.
    """
    demand("prob_s", prob_s, prob_t.shape)
    (max_s, z_s), (max_t, z_t) = top_class(prob_s), top_class(prob_t)
    rho_s = ratio_of_maxima(max_s, tau, valid)  # Eq. 5
    rho_t = ratio_of_maxima(max_t, tau, valid)  # Eq. 6
    counts = count_pairs(z_s, z_t, prob_s.shape[1], valid)
    wiou_st = wiou_of_counts(counts, ignore_class)  # wIoU(p^s, p^t)
    wiou_ts = wiou_of_counts(counts.mT, ignore_class)  # wIoU(p^t, p^s)
    gamma = 1 - (rho_s / 2 * wiou_st + rho_t / 2 * wiou_ts)
    return gamma.clamp(0, 1)


def confidence_hardness(prob_t, prob_s, tau, valid=None):
    """"high-ratios" of Fig. 3(a), from probabilities. Logits are not refused, and give a wrong value.

    1 - (rho_s + rho_t) / 2. Shapes and range as Eq. 7's.
    """
    demand("prob_s", prob_s, prob_t.shape)
    return 1 - (confident_ratio(prob_s, tau, valid) + confident_ratio(prob_t, tau, valid)) / 2


def loss_hardness(prob_t, prob_s, *, valid=None):
    """"losses" of Fig. 3(a), from probabilities. Logits are not refused, and give a wrong value.

    1 - exp(-L), where L is the student's mean cross-entropy, over the valid pixels, to the teacher's
    labels. exp(-L) is the geometric mean of the probability that the student gives the teacher's
    label, so the result lies in [0, 1] without a scale to choose: 0 for certain agreement, toward 1
    as L grows; 1 for an image that is all padding. Shapes as Eq. 7's.
    """
    demand("prob_s", prob_s, prob_t.shape)
    z_t = top_class(prob_t)[1]
    demand("valid", valid, z_t.shape, torch.bool)
    loss = -prob_s.gather(1, z_t[:, None]).squeeze(1).clamp(min=torch.finfo(prob_s.dtype).tiny).log()
    if valid is None:
        return 1 - torch.exp(-loss.mean((1, 2)))
    pixels = valid.sum((1, 2))
    easiness = torch.exp(-(loss * valid).sum((1, 2)) / pixels.clamp(min=1))
    return 1 - easiness * (pixels > 0)


def pseudo_label(prob_t, tau, valid=None):
    """The labels of Eq. 4 and Eq. 10, from probabilities. Logits are not refused, and keep other pixels.

    The indicator 1(max(p^t(j)) >= tau) as a label map: the teacher's class where it is 1 on a valid
    pixel, IGNORE elsewhere. prob_t (B, C, H, W) -> (B, H, W) uint8, small to mix and to exchange, for
    at most 255 classes.
    """
    if prob_t.shape[1] > IGNORE:
        raise ValueError(f"prob has {prob_t.shape[1]} classes; a uint8 label holds at most {IGNORE}")
    confidence, labels = top_class(prob_t)
    demand("valid", valid, labels.shape, torch.bool)
    keep = confidence >= tau if valid is None else (confidence >= tau) & valid
    return labels.masked_fill(~keep, IGNORE).to(torch.uint8)


def unsupervised_loss(logits, pseudo_labels, hardness, view_weights=None):
    """L_u, Eq. 10, from logits. Probabilities are not refused, and give a wrong loss.

    Each image's cross-entropy to its pseudo-labels, weighted by 1 - gamma (R3).
    logits:         a list of the student's outputs (B, C, H, W), one for each strong view.
    pseudo_labels:  a list, as long, of their label maps (B, H, W), any integer type, IGNORE where
                    nothing supervises.
    hardness:       gamma (B,); zeros make it Eq. 4.
    view_weights:   a weight for each view, numbers or a tensor (V,); None weighs them equally, as the
                    2 of Eq. 10 does. The authors' code: (1/2, 1/2), or (1, 0) if CutMix did not fire.
    Returns a scalar: the mean over the images of the views' weighted sum. Each image is divided by
    H x W, however many of its pixels are supervised (R6).
    """
    if view_weights is None:
        view_weights = [1 / len(logits)] * len(logits)
    if not len(logits) == len(pseudo_labels) == len(view_weights):
        raise ValueError(f"{len(logits)} views of logits come with {len(pseudo_labels)} of pseudo-labels and "
                         f"{len(view_weights)} weights; one of each is needed for a view")
    loss = sum(weight * pixel_cross_entropy(view, labels)
               for weight, view, labels in zip(view_weights, logits, pseudo_labels))
    for view in logits:
        demand("hardness", hardness, view.shape[:1])
    return ((1 - hardness) * loss).mean()


def pixel_cross_entropy(logits, labels):
    """The inner sum of Eq. 3, 4 and 10, from logits. Probabilities are not refused, and give a wrong loss.

    1/(H x W) sum over the pixels of the cross-entropy H, which is 0 where a label is IGNORE.
    logits (B, C, H, W), labels (B, H, W) integer -> (B,).
    """
    demand_classes(logits)
    loss = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    return loss.mean((1, 2))


def demand_classes(tensor):
    """Raises ValueError unless a prob, or logits, are (B, C, H, W) with two classes or more."""
    if tensor.ndim != 4 or tensor.shape[1] < 2:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not (B, C, H, W) with two classes "
                         f"or more; make two of a sigmoid's p by torch.cat([1 - p, p], 1), of its logit "
                         f"z by torch.cat([0 * z, z], 1)")


def demand(name, tensor, shape, dtype=None):
    """Raises ValueError for a tensor of another shape or type; None passes."""
    if tensor is not None and (tensor.shape != shape or dtype not in (None, tensor.dtype)):
        raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and should be "
                         f"{dtype or tensor.dtype} of shape {tuple(shape)}")
