"""The pictures in README.md and docs/, of finished runs. Needs matplotlib.

    python tools/figures.py runs/shapes-1_16-hagseg --beside runs/shapes-1_16-supervised --out docs

hardness.png    Eq. 5-10 on four unlabelled images, from easy to hard. The views that the run saw last, up
                to 256 of them, are ranked by their gamma under its last networks; shown is the middle one of
                each quarter. CutMix is the first draw after the run's that fires and whose boxes fill a tenth
                to a half of their images.
gamma.png       Fig. 2(c): gamma over the run, its mean and spread, and the images of the lowest and of the
                highest mean.
panels.png      with --beside, a baseline on the same data: validation images are ranked by how many more of
                their pixels the run has right than the baseline; shown is the middle one of each eighth.
"""

import argparse
import csv
import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from batches import MEAN, STD, TrainingDraws, normalize, stack_items
from data import IGNORE, InputError, open_data
from evaluate import load_model, loaded_images, predict
from hardness import pseudo_label, top_class
from settings import Settings
from train import cutmix_view, phi, strong_views

matplotlib.use("Agg")
plt.rcParams.update({"font.size": 9, "savefig.dpi": 200})
QUARTERS = ("easiest\nquarter", "second\nquarter", "third\nquarter", "hardest\nquarter")
HEADINGS = ("unlabelled\nimage", "teacher's\nlabels", "student's\nlabels", "do they\nagree?",
            "hardness γ\nEq. 5-7", "intensity view\nEq. 8", "CutMix view\nEq. 9", "weight 1 - γ\nEq. 10")
AGREEMENT = {"agree, both confident": (232, 232, 232), "agree, one or both unsure": (158, 158, 170),
             "disagree": (192, 57, 43)}
BLUE, GREEN, RED = "#4a6fa5", "#2e8b57", "#c0392b"


def coloured(palette, labels):
    """A class map (H, W) as RGB (H, W, 3) in [0, 1], by a palette of 0 to 255; IGNORE is white."""
    table = np.ones((IGNORE + 1, 3))
    table[:len(palette)] = np.array(palette) / 255
    return table[labels.numpy()]


def show(axes, picture, title=""):
    axes.imshow(np.asarray(picture), interpolation="nearest")
    axes.set_xticks([], [])
    axes.set_yticks([], [])
    axes.set_title(title, fontsize=9)


def write_in(axes, text):
    """Text in the lower left corner of a picture."""
    axes.text(0.03, 0.04, text, transform=axes.transAxes, fontsize=8,
              bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5})


def show_share(axes, share, title, ink):
    """A bar of `share` out of 1, and the number."""
    axes.set(xlim=(0, 1), ylim=(0, 4), xticks=[], yticks=[])
    axes.barh(1.6, 1, 0.5, color="#ededed")
    axes.barh(1.6, share, 0.5, color=ink)
    axes.text(0.5, 2.5, f"{share:.2f}", ha="center", fontsize=11)
    axes.set_title(title, fontsize=9)
    axes.set_frame_on(False)


def legend(figure, entries, **options):
    """A line of named colours, each from 0 to 255."""
    patches = [Patch(facecolor=np.array(colour) / 255, edgecolor="grey", linewidth=0.5, label=name)
               for name, colour in entries.items()]
    figure.legend(handles=patches, ncols=len(patches), loc="lower left", frameon=False, fontsize=9,
                  handlelength=1.2, handleheight=1.2, **options)


def assess(student, teacher, items, args):
    """The items of TrainingDraws as a batch, both networks' softmax on its weak views, and its gamma."""
    batch = stack_items(items)
    weak = normalize(batch["weak"])
    prob_s, prob_t = student(weak).softmax(1), teacher(weak).softmax(1)
    return batch, prob_s, prob_t, phi(prob_t, prob_s, batch["valid"], args)


@torch.inference_mode()
def hardness_figure(folder, data_root=None):
    """Eq. 5-10 on the last views of the run in `folder`, one of each quarter of gamma."""
    (teacher, state), (student, _) = (load_model(folder / "last.pth", student=s) for s in (False, True))
    args = Settings(**state["settings"])
    if args.supervised or args.intensity == "none" or args.cutmix != "hardness":
        raise InputError(f"{folder}: no run of HagSeg's whole method; give the folder of one")
    data = open_data(args.dataset, data_root or args.data_root)
    draws = TrainingDraws(data, state["lists"]["labelled"], state["lists"]["unlabelled"], args.batch_size,
                          args.crop_size, args.seed, args.scale, args.image_size)
    end = args.iters * args.batch_size
    places = [divmod(place, args.batch_size)
              for place in range(max(0, end - min(256, len(draws.unlabelled))), end)]
    gamma = torch.cat([assess(student, teacher, [draws.unlabelled_item(*place)
                                                 for place in places[i:i + args.batch_size]], args)[3]
                       for i in range(0, len(places), args.batch_size)])
    ranked = gamma.argsort().tolist()
    chosen = [draws.unlabelled_item(*places[ranked[(2 * quarter + 1) * len(ranked) // 8]])
              for quarter in range(4)]

    batch, prob_s, prob_t, gamma = assess(student, teacher, chosen, args)
    (sure_s, labels_s), (sure_t, labels_t) = top_class(prob_s), top_class(prob_t)
    agreement = (torch.minimum(sure_s, sure_t) < args.tau).long()  # an index into AGREEMENT
    agreement[labels_s != labels_t] = 2
    agreement[~batch["valid"]] = IGNORE
    whose = torch.arange(4, dtype=torch.uint8)[:, None, None].expand_as(labels_t).contiguous()
    for iteration in range(args.iters, args.iters + 10_000):
        source = cutmix_view(batch["weak"], whose, gamma, iteration, args)[1]  # which image a pixel is of
        if all(0.1 <= share <= 0.5 for share in (source != whose).float().mean((1, 2))):
            break
    else:
        raise InputError(f"{folder}: its mean hardness is {gamma.mean():.3f}, so CutMix does not fire; give "
                         f"a longer run")
    views, _ = strong_views(batch, normalize(batch["weak"]), pseudo_label(prob_t, args.tau, batch["valid"]),
                            gamma, iteration, args)
    intensity, cutmix = ((view.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)).clamp(0, 1)
                         for view, *_ in views)

    figure, rows = plt.subplots(4, 8, figsize=(9.6, 5.6), width_ratios=[1, 1, 1, 1, 0.75, 1, 1, 0.75])
    weak = batch["weak"].permute(0, 2, 3, 1)
    for i, (row, quarter) in enumerate(zip(rows, QUARTERS)):
        titles = HEADINGS if i == 0 else [""] * 8
        show(row[0], weak[i], titles[0])
        row[0].set_ylabel(f"{'ABCD'[i]}: {quarter}", rotation=0, ha="right", va="center", fontsize=9)
        show(row[1], coloured(data.palette, labels_t[i]), titles[1])
        show(row[2], coloured(data.palette, labels_s[i]), titles[2])
        show(row[3], coloured(list(AGREEMENT.values()), agreement[i]), titles[3])
        show_share(row[4], gamma[i].item(), titles[4], RED)
        show(row[5], intensity[i], titles[5])
        write_in(row[5], f"distorted by {1 - gamma[i]:.0%}")
        partner = source[i][source[i] != i][0]
        show(row[6], cutmix[i], titles[6])
        write_in(row[6], f"box from {'ABCD'[partner]}")
        row[6].contour((source[i] != i).numpy(), levels=[0.5], colors="white", linewidths=1.5)
        show_share(row[7], 1 - gamma[i].item(), titles[7], GREEN)
    figure.subplots_adjust(left=0.095, right=0.995, top=0.915, bottom=0.115, wspace=0.08, hspace=0.06)
    legend(figure, dict(zip(data.classes, data.palette)), bbox_to_anchor=(0.08, 0.035))
    legend(figure, AGREEMENT, bbox_to_anchor=(0.08, -0.015))
    return figure


def gamma_figure(folder):
    """Fig. 2(c) of the run in `folder`: mean and spread of gamma, and two images."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "gamma" in record]
    traces = defaultdict(list)
    with open(folder / "hardness.csv", newline="") as file:
        for iteration, name, gamma in itertools.islice(csv.reader(file), 1, None):  # without the header
            traces[name].append((int(iteration), float(gamma)))
    average = {name: np.mean([gamma for _, gamma in trace]) for name, trace in traces.items()}
    iteration, mean, spread = (np.array([record[name] for record in records])
                               for name in ("iteration", "gamma", "gamma_std"))
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.fill_between(iteration, (mean - spread).clip(0, 1), (mean + spread).clip(0, 1), color=BLUE,
                      alpha=0.25, linewidth=0)
    axes.plot(iteration, mean, color=BLUE, linewidth=2, label="all images: mean, spread")
    for which, name, ink in (("easiest", min(average, key=average.get), GREEN),
                             ("hardest", max(average, key=average.get), RED)):
        axes.plot(*zip(*traces[name]), color=ink, linewidth=1, marker=".", label=f"{which}: {name}")
    axes.set(xlabel="iteration", ylabel="hardness γ", xlim=(0, iteration[-1]), ylim=(0, 1.02))
    figure.legend(frameon=False, fontsize=9, ncols=3, loc="outside upper center", handlelength=1.4)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@torch.inference_mode()
def panels_figure(folder, baseline, data_root=None):
    """Validation images, their truth, and what the runs in `baseline` and `folder` make of them."""
    (network, state), (other, _) = (load_model(run / "last.pth") for run in (folder, baseline))
    settings = state["settings"]
    data = open_data(settings["dataset"], data_root or settings["data_root"])

    def predicted(image):
        return [predict(model, image, settings["window"], settings["image_size"])
                for model in (other, network)]

    found = []
    for image, truth, name in loaded_images(data, state["lists"]["val"]):
        right = [(labels == truth)[truth != IGNORE].float().mean().item() for labels in predicted(image)]
        found.append((right[1] - right[0], name, right))
    found.sort()
    chosen = [found[(2 * eighth + 1) * len(found) // 16] for eighth in range(8)]

    figure, rows = plt.subplots(4, 8, figsize=(9.6, 4.9))
    for axes, heading in zip(rows[:, 0], ("image", "truth", "supervised", "HagSeg")):
        axes.set_ylabel(heading, rotation=0, ha="right", va="center", fontsize=10)
    shown = loaded_images(data, [name for _, name, _ in chosen])
    for column, (_, _, right), (image, truth, _) in zip(rows.T, chosen, shown):
        show(column[0], image.permute(1, 2, 0))
        show(column[1], coloured(data.palette, truth))
        for axes, share, labels in zip(column[2:], right, predicted(image)):
            show(axes, coloured(data.palette, labels))
            write_in(axes, f"{share:.0%} right")
    figure.subplots_adjust(left=0.09, right=0.995, top=0.995, bottom=0.075, wspace=0.06, hspace=0.06)
    legend(figure, dict(zip(data.classes, data.palette)), bbox_to_anchor=(0.07, -0.02))
    return figure


def main(argv=None):
    """Exit code 2 for runs that cannot be drawn."""
    parser = argparse.ArgumentParser(description="Draw what hardness does in a run, and what comes out.")
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--beside", type=Path, metavar="RUN", help="the folder of a baseline: panels.png too")
    parser.add_argument("--data-root", help="where the data set is, if not where the run found it")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the pictures")
    args = parser.parse_args(argv)
    try:
        figures = {"hardness.png": hardness_figure(args.run, args.data_root),
                   "gamma.png": gamma_figure(args.run)}
        if args.beside:
            figures["panels.png"] = panels_figure(args.run, args.beside, args.data_root)
    except InputError as error:
        print(f"figures.py: {error}", file=sys.stderr)
        sys.exit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.out / name)
        print(args.out / name)


if __name__ == "__main__":
    main()
