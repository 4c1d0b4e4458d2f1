"""Repeats the comparisons in the README: runs rows of settings with seeds, and prints their table.

    python docs/evidence.py --rows table4 fig3a --seeds 3 --jobs 2
    python docs/evidence.py --rows camvid --seeds 1 --data-root ../shared/camvid

Each run is the real command, in runs/evidence/ROW-SEED, where it leaves about 250 MB; what is finished
is not run again. gamma, confident share and CutMix are means over the last tenth of the log. "right"
is the share of the teacher's final pseudo-labels that are, by the masks of the unlabelled images,
which training does not see; beside it, that of the easiest and of the hardest quarter of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from augment import weak_augment  # noqa: E402
from data import IGNORE, normalize, open_data, picture_to_tensor  # noqa: E402
from evaluate import load_model  # noqa: E402
from hardness import pseudo_label  # noqa: E402

STANDARD = "--loss standard --intensity standard --cutmix standard"
# tau is the paper's for street scenes; the rest is what two cores can do.
CAMVID = ("--dataset custom --split 1_8 --weights none --backbone resnet18 --channels 64 --image-size "
          "96 --crop-size 48 --scale 0.75 1.25 --batch-size 8 --lr 0.03 --ema 0.99 --tau 0.7 "
          "--iters 1000 --eval-every 5")
RIGHT = ("right", "right_easiest", "right_hardest")
GROUPS = {
    "table4": {
        "supervised": "--supervised",
        "standard loss": "--loss standard --intensity none --cutmix none",
        "hardness loss": "--intensity none --cutmix none",
        "standard intensity": "--loss standard --intensity standard --cutmix none",
        "hardness intensity": "--loss standard --cutmix none",
        "standard CutMix": "--loss standard --intensity none --cutmix standard",
        "hardness CutMix": "--loss standard --intensity none",
        "standard": STANDARD,
        "HagSeg": "",
    },
    "fig3a": {"HagSeg, confidence": "--hardness confidence", "HagSeg, loss": "--hardness loss",
              "HagSeg as printed": "--as-printed"},
    # With lambda_u 3 and tau 0.95 it is the row HagSeg.
    "lambda": {f"lambda_u {value}": f"--lambda-u {value}" for value in (0.5, 1, 5)},
    "tau": {f"tau {value}": f"--tau {value}" for value in (0.5, 0.7, 0.85)},
}
GROUPS["camvid"] = {f"CamVid {row}": f"{CAMVID} {flags}" for group in ("table4", "fig3a")
                    for row, flags in GROUPS[group].items()}


@torch.inference_mode()
def pseudo_label_accuracy(out):
    """Shares of a finished run's pseudo-labels, on its unlabelled images, that are right: of all of
    them, of the easiest quarter of the images by their last gamma, and of the hardest quarter."""
    teacher, checkpoint = load_model(out / "last.pth")
    settings = checkpoint["settings"]
    data = open_data(settings["dataset"], settings["data_root"])
    logged = (line.split(",") for line in (out / "hardness.csv").read_text().splitlines())
    gamma = {name: float(value) for _, name, value in logged}
    counts = []  # right and all pseudo-labels of an image, from the easiest to the hardest
    for name in sorted(gamma, key=gamma.get):
        image = data.image(name)
        image, mask = weak_augment(image, data.mask(name), max(image.size), np.random.default_rng(0),
                                   (1, 1), settings["image_size"])  # as a whole
        truth = picture_to_tensor(mask)
        label = pseudo_label(teacher(normalize(picture_to_tensor(image)[None])).softmax(1),
                             settings["tau"])[0]
        counted = (label != IGNORE) & (truth != IGNORE)
        counts.append([(label == truth)[counted].sum().item(), counted.sum().item()])
    quarter = len(counts) // 4
    sums = [np.sum(part, axis=0) for part in (counts, counts[:quarter], counts[-quarter:])]
    return [right / max(kept, 1) for right, kept in sums]


def run(row, flags, seed, args):
    out = args.out / f"{row.replace(' ', '_').replace(',', '')}-{seed}"
    record = out / "evidence.json"
    if not record.exists():
        command = [sys.executable, ROOT / "train.py", *flags.split(), "--seed", str(seed), "--out", out,
                   *(["--data-root", args.data_root] if args.data_root else [])]
        began = time.time()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))})
        found = {"seconds": time.time() - began}
        if (out / "hardness.csv").exists():
            found |= zip(RIGHT, pseudo_label_accuracy(out))
        record.write_text(json.dumps(found))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    late = trained[-max(1, len(trained) // 10):]
    means = {} if "--supervised" in flags else {
        name: statistics.mean(line[name] for line in late)
        for name in ("hardness_mean", "confident", "cutmix")}
    return {"teacher": 100 * lines[-1]["miou_teacher"], "student": 100 * lines[-1]["miou_student"],
            **means, **json.loads(record.read_text())}


def main():
    parser = argparse.ArgumentParser(description="Run and tabulate comparisons of settings.")
    parser.add_argument("--rows", nargs="+", choices=GROUPS, default=["table4"], help="groups of rows")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="of these groups, only these rows")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1, 2, ... of each row")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, sharing the cores")
    parser.add_argument("--data-root")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(1, args.seeds + 1)
    rows = {row: flags for group in args.rows for row, flags in GROUPS[group].items()
            if not args.only or row in args.only}
    with ThreadPoolExecutor(args.jobs) as pool:
        # Seed by seed, so that what is stopped early holds all rows.
        done = {(row, seed): pool.submit(run, row, flags, seed, args)
                for seed in seeds for row, flags in rows.items()}
    print("| row | seeds | teacher mIoU | student mIoU | gamma | confident | right | of the easiest | "
          "of the hardest | CutMix fired | s a run |\n" + "|---" * 11 + "|")
    for row in rows:
        results = [done[row, seed].result() for seed in seeds]

        def cell(name, digits):
            values = [result[name] for result in results if name in result]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if digits == 1 and len(values) > 1 else ""
            return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""

        print(f"| {row} | {len(results)} | {cell('teacher', 1)} | {cell('student', 1)} | "
              + " | ".join(cell(name, 2) for name in ("hardness_mean", "confident", *RIGHT, "cutmix"))
              + f" | {cell('seconds', 0)} |")


if __name__ == "__main__":
    main()
