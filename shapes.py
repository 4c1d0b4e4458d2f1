"""The embedded data set: four kinds of object on a background, 32 x 32 pixels, drawn from their ids.

Works alone, on numpy and pillow. One number per image makes it easy or hard: contrast falls with it,
and noise, clutter and overlap grow. Classes differ by their pattern, which Table 5's operations keep;
colour and outline are the same for all.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32
SHAPES_CLASSES = ("background", "rings", "rows", "columns", "checker")


@lru_cache(maxsize=1024)
def draw_shapes(name, size=SIZE):
    """The image and mask of an id, train_NUMBER or val_NUMBER: (Pillow RGB, Pillow L)."""
    part, number = name.split("_")
    rng = np.random.default_rng((part == "val", int(number), 12))  # in 12, few labels hold all classes
    hard = rng.random()
    contrast, noise = 120 - 85 * hard, 3 + 12 * hard
    ground = rng.uniform(70, 185, 3)
    image = np.broadcast_to(ground, (size, size, 3)).copy()
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(1, 3 + round(hard))):
        label = int(rng.integers(1, len(SHAPES_CLASSES)))
        outline, pattern = shape_masks(SHAPES_CLASSES[label], size, rng)
        tint = rng.choice([-1, 1]) * contrast * rng.uniform(0.5, 1, 3)
        image[outline] = ground - tint
        image[outline & pattern] = ground + tint
        mask[outline] = label
    image = Image.fromarray((image + rng.normal(0, noise, image.shape)).clip(0, 255).astype(np.uint8))
    for _ in range(round(2 * hard)):  # clutter
        shade = (ground + rng.uniform(-1, 1) * contrast).clip(0, 255).astype(int)
        ImageDraw.Draw(image).line([tuple(p) for p in rng.uniform(0, size, (2, 2))], tuple(shade))
    return image, Image.fromarray(mask)


def shape_masks(shape, size, rng):
    """Two (size, size) bool maps: a disc or a square, and where its pattern has the first colour."""
    radius, angle = size * rng.uniform(0.2, 0.36), rng.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)
    y, x = np.einsum("ij,jhw->ihw", turn, np.mgrid[:size, :size] - centre[:, None, None])
    distance = np.hypot(x, y) if rng.random() < 0.5 else np.maximum(abs(x), abs(y)) / 0.9
    rows, columns = (np.floor(12 * side / size) % 2 == 0 for side in (y, x))
    rings = np.floor(12 * np.hypot(x, y) / size) % 2 == 0
    patterns = {"rings": rings, "rows": rows, "columns": columns, "checker": rows ^ columns}
    return distance < radius, patterns[shape]
