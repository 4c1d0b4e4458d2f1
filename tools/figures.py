"""Pictures of a run, from its logs alone: gamma over training, and the easiest and hardest images.

    python tools/figures.py runs/shapes-1_16-hagseg --out docs

gamma.png: mean and spread of gamma over the iterations, and two traced images (Fig. 2c): the one
with the lowest and the one with the highest mean gamma. extremes.png: above, the four easiest
unlabelled images by their last gamma; below, the four hardest.
"""

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import open_data

BAND, MEAN, EASY, HARD = (205, 220, 240), (40, 80, 160), (40, 140, 60), (200, 60, 40)


def curve(records, traces, size=(640, 320), margin=40):
    """A Pillow plot of gamma +- gamma_std, and of each named trace of (iteration, gamma)."""
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    last = records[-1]["iteration"]

    def point(iteration, gamma):
        return (margin + iteration / last * (size[0] - 2 * margin),
                size[1] - margin - min(max(gamma, 0), 1) * (size[1] - 2 * margin))

    bounds = [[point(r["iteration"], r["gamma"] + side * r["gamma_std"]) for r in records]
              for side in (1, -1)]
    draw.polygon(bounds[0] + bounds[1][::-1], fill=BAND)
    draw.line([point(r["iteration"], r["gamma"]) for r in records], fill=MEAN, width=3)
    for trace, ink in zip(traces.values(), (EASY, HARD)):
        draw.line([point(*p) for p in trace], fill=ink, width=1)
    for tick in (0, 0.5, 1):
        draw.text((8, point(0, tick)[1] - 6), f"{tick:.1f}", fill="black")
    for tick in (0, last):
        draw.text((point(tick, 0)[0] - 10, size[1] - margin + 8), str(tick), fill="black")
    draw.rectangle(point(0, 1) + point(last, 0), outline="black")
    legend = [("mean gamma and spread", MEAN), *zip(traces, (EASY, HARD))]
    for i, (name, ink) in enumerate(legend):
        draw.text((margin + 10 + 190 * i, 14), name, fill=ink)
    return picture


def sheet(rows, side=128):
    """Pillow images in rows, each with a caption: rows of (image, caption)."""
    picture = Image.new("RGB", (len(rows[0]) * (side + 6), len(rows) * (side + 22)), "white")
    draw = ImageDraw.Draw(picture)
    for y, row in enumerate(rows):
        for x, (image, caption) in enumerate(row):
            left, top = x * (side + 6), y * (side + 22)
            picture.paste(image.resize((side, side * image.height // image.width)), (left, top))
            draw.text((left, top + side + 4), caption, fill="black")
    return picture


def main():
    parser = argparse.ArgumentParser(description="Draw what a run's logs say about hardness.")
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--data-root", help="where the run's data set is")
    parser.add_argument("--out", type=Path, default=Path("."), help="where the pictures go")
    args = parser.parse_args()
    settings = json.loads((args.run / "settings.json").read_text())
    records = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    traces = defaultdict(list)
    with open(args.run / "hardness.csv", newline="") as file:
        for iteration, name, gamma in csv.reader(file):
            if iteration != "iteration":  # the header
                traces[name].append((int(iteration), float(gamma)))
    mean = {name: sum(g for _, g in trace) / len(trace) for name, trace in traces.items()}
    easy, hard = min(mean, key=mean.get), max(mean, key=mean.get)
    args.out.mkdir(parents=True, exist_ok=True)
    curve([r for r in records if "L" in r], {f"easy: {easy}": traces[easy], f"hard: {hard}": traces[hard]}
          ).save(args.out / "gamma.png")

    data = open_data(settings["dataset"], args.data_root or settings["data_root"])
    ranked = sorted(traces, key=lambda name: traces[name][-1][1])
    sheet([[(data.image(name).convert("RGB"), f"{name} {traces[name][-1][1]:.2f}") for name in names]
           for names in (ranked[:4], ranked[-4:])]).save(args.out / "extremes.png")


if __name__ == "__main__":
    main()
