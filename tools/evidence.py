"""Repeats comparisons, the paper's tables among them: runs rows of settings, and prints their table.

    python tools/evidence.py --rows table4 fig3a readings --seeds 3 --jobs 2
    python tools/evidence.py --rows labels --seeds 5 --classes rings rows columns checker
    python tools/evidence.py --rows camvid camvid160 --seeds 3 --data-root PATH/TO/camvid
    python tools/lite0.py evidence --rows lite0 --seeds 3 --data-root PATH/TO/camvid
    python tools/evidence.py --rows table1 --data-root data/voc --ranks 8 [--dry-run]
    python tools/evidence.py --named runs/evidence/HagSeg-1/last.pth [--tau 0.95]

Each run is the real command, in runs/evidence/ROW-SEED, where it leaves its folder (250 MB on shapes) and
its output in a .log file; what is finished is not run again, and what was stopped is resumed. Flags
behind `--` go to every run. mIoU is the teacher's at the last iteration, in percent, and beside it the
best of all validations, which is what the paper's Tables 1-3 report. gamma, confident share and CutMix
are means over the last tenth of the log. "right" is the share of the teacher's final pseudo-labels that
are, by the masks of the unlabelled images, which training does not see; beside it, that of the easiest
and of the hardest quarter of them.
"""

import argparse
import csv
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from augment import weak_augment
from batches import normalize, picture_to_tensor
from data import IGNORE, open_data
from evaluate import load_checkpoint, load_model
from hardness import pseudo_label
from ranks import command_line
from settings import parse_arguments, step_memory

STANDARD = "--loss standard --intensity standard --cutmix standard"
# tau is the paper's for street scenes; the rest is what two cores can do.
CAMVID = ("--dataset custom --split 1_8 --weights none --backbone resnet18 --channels 64 --image-size "
          "96 --crop-size 48 --scale 0.75 1.25 --batch-size 8 --lr 0.03 --ema 0.99 --tau 0.7 "
          "--iters 1000 --eval-every 5")
# Of a flag given twice, the last counts.
CAMVID160 = f"{CAMVID} --image-size 160 --crop-size 96 --batch-size 4 --iters 3000"
# For the network of tools/lite0.py, which starts from ImageNet; the learning rates are of a first trial.
LITE0 = ("--dataset custom --split 1_8 --channels 64 --image-size 128 --crop-size 64 --batch-size 4 "
         "--lr 0.02 --encoder-lr 0.005 --tau 0.7 --iters 6000 --eval-every 12")
TABLE4 = {  # row: its flags, the paper's mIoU (VOC 1/8, ResNet-101)
    "supervised": ("--supervised", "72.1"),
    "standard loss": ("--loss standard --intensity none --cutmix none", "74.7"),
    "hardness loss": ("--intensity none --cutmix none", "75.5"),
    "standard intensity": ("--loss standard --intensity standard --cutmix none", "75.4"),
    "hardness intensity": ("--loss standard --cutmix none", "76.5"),
    "standard CutMix": ("--loss standard --intensity none --cutmix standard", "76.1"),
    "hardness CutMix": ("--loss standard --intensity none", "76.9"),
    "standard": (STANDARD, "76.7"),
    "HagSeg": ("", "77.9"),
}
GROUPS = {
    "table4": {row: flags for row, (flags, _) in TABLE4.items()},
    "fig3a": {"HagSeg, confidence": "--hardness confidence", "HagSeg, loss": "--hardness loss"},
    "readings": {"HagSeg": "", "HagSeg as printed": "--as-printed",
                 "HagSeg as released": "--as-released"},
    # With lambda_u 3 and tau 0.95 it is the row HagSeg.
    "lambda": {f"lambda_u {value}": f"--lambda-u {value}" for value in (0.5, 1, 5)},
    "tau": {f"tau {value}": f"--tau {value}" for value in (0.5, 0.7, 0.85)},
    # As many labels again as HagSeg's run had, chosen by its gamma; then anew from the same start, or on.
    "labels": {"HagSeg": "", **{f"HagSeg, {which} added": f"--split {{HagSeg}}/{which}.txt"
                                for which in ("hardest", "random", "easiest")},
               "HagSeg, hardest added, trained on":
                   "--split {HagSeg}/hardest.txt --weights {HagSeg}/best.pth"},
}
for name, settings in (("CamVid", CAMVID), ("CamVid160", CAMVID160)):
    GROUPS[name.lower()] = {f"{name} {row}": f"{settings} {flags}"
                            for group in ("table4", "fig3a", "readings")
                            for row, flags in GROUPS[group].items()}
LITE0_ROWS = GROUPS["table4"] | {
    f"lambda_u {lambda_u}, tau {tau}": f"--lambda-u {lambda_u} --tau {tau}"
    for lambda_u, tau in ((1, 0.7), (1, 0.9), (1, 0.95), (1, 0.99), (0.5, 0.95), (3, 0.95))} | {
    "supervised, twice as long": "--supervised --iters 12000", "HagSeg, twice as long": "--iters 12000"}
GROUPS["lite0"] = {f"Lite0 {row}": f"{LITE0} {flags}" for row, flags in LITE0_ROWS.items()}
for name, settings in (("CamVid", CAMVID), ("Lite0", LITE0)):
    GROUPS[f"{name.lower()}_labels"] = {
        f"{name} {row}": f"{settings} {flags.replace('{', f'{{{name} ')}"
        for row, flags in GROUPS["labels"].items() if name == "CamVid" or "--weights" not in flags}

PAPER = {}  # row: the paper's mIoU; below, its supervised training, HagSeg, and HagSeg at stride 8
for table, dataset, backbone, splits, *numbers in (
        ("table1", "voc", "resnet50", "1_16 1_8 1_4",
         "63.8 69.0 72.5", "74.8 76.5 77.0", "75.9 76.7 77.1"),
        ("table1", "voc", "resnet101", "1_16 1_8 1_4",
         "67.4 72.1 74.7", "76.5 77.9 78.1", "77.2 78.4 79.3"),
        ("table2", "voc_classic", "resnet101", "1_16 1_8 1_4 1_2 full",
         "45.5 57.5 66.6 70.4 72.9", "68.8 74.4 78.5 79.5 81.2", "70.0 75.3 79.1 80.2 82.0"),
        ("table3", "cityscapes", "resnet50", "1_16 1_8 1_4 1_2",
         "64.0 69.2 73.0 76.4", "74.3 77.4 78.1 79.3", "75.2 78.0 78.2 80.2")):
    for row, flags, miou in zip(("supervised", "HagSeg", "HagSeg stride 8"),
                                ("--supervised", "", "--output-stride 8"), numbers):
        for split, number in zip(splits.split(), miou.split(), strict=True):
            cell = f"{table} {row} {backbone} {split}"
            GROUPS.setdefault(table, {})[cell] = (f"--dataset {dataset} --split {split} "
                                                  f"--backbone {backbone} {flags}")
            PAPER[cell] = number
GROUPS["voc_table4"] = {f"voc_table4 {row}": f"--dataset voc --split 1_8 --backbone resnet101 {flags}"
                        for row, (flags, _) in TABLE4.items()}
PAPER |= {f"voc_table4 {row}": number for row, (_, number) in TABLE4.items()}

# What a run's log and its pseudo-labels say of it, and the names of these columns.
LOGGED = {"gamma": "gamma", "confident": "confident", "cutmix_fired": "CutMix fired"}
RIGHT = {"right": "right", "right_easiest": "of the easiest", "right_hardest": "of the hardest"}


def accumulation(settings, ranks, memory):
    """The smallest --accumulate with which the settings of a run fit into GPUs of `memory` GiB: 1.15
    times the computed peak leaves room for what it does not count."""
    amp = settings.amp or settings.default_amp and not settings.cuda  # planned here for GPUs elsewhere
    images = settings.batch_size // ranks
    fit = [n for n in range(1, images + 1) if images % n == 0
           and 1.15 * step_memory(replace(settings, accumulate=n, amp=amp), ranks) < memory]
    return fit[0] if fit else images


def folder(row, seed, args):
    return args.out / f"{row.replace(' ', '_').replace(',', '')}-{seed}"


def script(name):
    """How a script is called: behind tools/lite0.py, if that has called this one."""
    if Path(sys.argv[0]).name == "lite0.py":
        return [os.path.relpath(sys.argv[0]), name]
    return [os.path.relpath(ROOT / f"{name}.py")]


def command(row, flags, seed, args):
    """The command of a run, as a list; as it is printed it can be pasted into a shell."""
    bases = {base: shlex.quote(str(folder(base, seed, args))) for base in args.bases}
    more = [*shlex.split(flags.format_map(bases)), *args.flags, "--seed", str(seed),
            "--out", str(folder(row, seed, args)),
            *(["--data-root", args.data_root] if args.data_root else [])]
    accumulate = args.accumulate or accumulation(parse_arguments(more), args.ranks or 1, args.memory)
    return [*(["torchrun", f"--nproc_per_node={args.ranks}"] if args.ranks else ["python"]),
            *script("train"), *more,
            *(["--accumulate", str(accumulate)] if accumulate > 1 else [])]


@torch.inference_mode()
def pseudo_labels(teacher, data, names, settings):
    """Yields the mask and the pseudo-labels, both (H, W), of each of these images, which are taken whole."""
    for name in names:
        image = data.image(name)
        image, mask = weak_augment(image, data.mask(name), max(image.size), np.random.default_rng(0),
                                   (1, 1), settings["image_size"])
        prob = teacher(normalize(picture_to_tensor(image)[None])).softmax(1)
        yield picture_to_tensor(mask), pseudo_label(prob, settings["tau"])[0]


def pseudo_label_accuracy(out):
    """Shares of a finished run's pseudo-labels, on its unlabelled images, that are right: of all of
    them, of the easiest quarter of the images by their last gamma, and of the hardest quarter."""
    teacher, checkpoint = load_model(out / "last.pth")
    settings = checkpoint["settings"]
    data = open_data(settings["dataset"], settings["data_root"])
    with open(out / "hardness.csv", newline="") as file:
        gamma = {name: float(value) for iteration, name, value in csv.reader(file)
                 if iteration != "iteration"}  # the header
    counts = []  # right and all pseudo-labels of an image, from the easiest to the hardest
    for truth, label in pseudo_labels(teacher, data, sorted(gamma, key=gamma.get), settings):
        counted = (label != IGNORE) & (truth != IGNORE)
        counts.append([(label == truth)[counted].sum().item(), counted.sum().item()])
    quarter = len(counts) // 4
    sums = [np.sum(part, axis=0) for part in (counts, counts[:quarter], counts[-quarter:])]
    return [right / max(kept, 1) for right, kept in sums]


def named_table(path, tau=None):
    """How the pseudo-labels of a checkpoint name each class, on the training images that it had no labels
    of: the share of all pixels that are of the class; of these, the shares that are named rightly, and
    as another class; and of the pixels that are named so, the share that is right."""
    teacher, checkpoint = load_model(path)
    settings = checkpoint["settings"] | ({} if tau is None else {"tau": tau})
    data = open_data(settings["dataset"], settings["data_root"])
    names = sorted({*data.labelled} - {*checkpoint["lists"]["labelled"]})
    classes = len(data.classes)
    counts = torch.zeros(classes, classes + 1, dtype=torch.float64)  # truth x pseudo-label; the last: none
    for truth, label in pseudo_labels(teacher, data, names, settings):
        kept = truth != IGNORE
        pairs = truth[kept].long() * (classes + 1) + label[kept].long().clamp(max=classes)
        counts += pairs.bincount(minlength=counts.numel()).view_as(counts)
    lines = [f"{path}, iteration {checkpoint['iteration']}, tau {settings['tau']}, {len(names)} images\n",
             "| class | of all pixels | named rightly | named otherwise | right where named |",
             "|---" * 5 + "|"]
    for k, name in enumerate(data.classes):
        of_it, right = counts[k].sum(), counts[k, k]
        shares = (of_it / counts.sum(), right / of_it, (counts[k, :-1].sum() - right) / of_it,
                  right / counts[:, k].sum())
        lines.append(f"| {name} | " + " | ".join("" if v.isnan() else f"{v:.1%}" for v in shares) + " |")
    return "\n".join(lines)


def choose_labels(out, seed):
    """Write hardest.txt, random.txt and easiest.txt into a finished run's folder: its labelled ids and
    as many of its unlabelled ones, ranked by `predict.py --hardness`, which sees them as photographs."""
    settings = load_checkpoint(out / "last.pth")["settings"]
    data = open_data(settings["dataset"], settings["data_root"])
    labelled, unlabelled = ((out / f"{part}labelled.txt").read_text().splitlines() for part in ("", "un"))
    photographs, predictions = out / "photographs", out / "predictions"
    photographs.mkdir(exist_ok=True)
    for name in unlabelled:
        data.image(name).save(photographs / f"{name}.png")
    subprocess.run([sys.executable, *script("predict"), out / "last.pth", photographs, "--hardness",
                    "--out", predictions], check=True, stdout=subprocess.DEVNULL)
    with open(predictions / "hardness.csv", newline="") as file:
        ranked = [Path(row["file"]).stem for row in csv.DictReader(file)]  # hardest first
    drawn = np.random.default_rng(seed).permutation(sorted(ranked)).tolist()
    for which, order in (("hardest", ranked), ("random", drawn), ("easiest", ranked[::-1])):
        ids = labelled + order[:len(labelled)]
        (out / f"{which}.txt").write_text("".join(f"{name}\n" for name in sorted(ids)))


def run(row, flags, seed, call, args, done):
    """Train a row with a seed by a command, unless that is finished, and return what it came to."""
    for base in args.bases:  # whose choice of labels it takes
        if f"{{{base}}}" in flags:
            done[base, seed].result()
    out, began = folder(row, seed, args), time.time()
    record = out / "evidence.json"
    if not record.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs // (args.ranks or 1)))}
        environment |= os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with open(f"{out}.log", "a") as log:
            subprocess.run(call, check=True, stdout=log, env=environment)
        found = {"seconds": time.time() - began}
        if (out / "hardness.csv").exists() and row not in PAPER:
            found |= zip(RIGHT, pseudo_label_accuracy(out))
        record.write_text(json.dumps(found))
    if row in args.bases and not (out / "easiest.txt").exists():
        choose_labels(out, seed)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "L" in line]
    validated = [line["miou_teacher"] for line in lines if "miou_teacher" in line]
    found = json.loads(record.read_text()) | {
        "teacher": 100 * validated[-1], "student": 100 * lines[-1]["miou_student"],
        "best": 100 * max(validated), "which": f"{np.argmax(validated) + 1} of {len(validated)}"}
    if "--supervised" not in flags:
        late = trained[-max(1, len(trained) // 10):]
        found |= {name: statistics.mean(line[name] for line in late) for name in LOGGED}
    # A row of result.txt: a class, the teacher's IoU, the student's.
    iou = {line[:-20].strip(): line[-20:-10] for line in (out / "result.txt").read_text().splitlines()}
    return found | {label: float(iou[label]) for label in args.classes}


def table_row(row, results, columns):
    """A line of the table: means over the seeds, with their standard deviation where it is mIoU."""
    def cell(name):
        values = [result[name] for result in results if name in result]
        if not values:
            return ""
        digits = 2 if name in LOGGED | RIGHT else 0 if name == "seconds" else 1
        text = f"{statistics.mean(values):.{digits}f}"
        if len(values) > 1:
            return text + (f" ± {statistics.stdev(values):.1f}" if digits == 1 else "")
        return text + (f" ({results[0]['which']})" if name == "best" else "")

    return f"| {row} | {PAPER.get(row, '')} | {len(results)} | {' | '.join(map(cell, columns))} |"


@command_line
def main(argv=None):
    parser = argparse.ArgumentParser(description="Run and tabulate comparisons of settings.")
    parser.add_argument("--rows", nargs="+", choices=GROUPS, default=["table4"], help="groups of rows")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="of these groups, only these rows")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds of each row")
    parser.add_argument("--first-seed", type=int, default=1, help="0 is that of train.py alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, sharing the cores")
    parser.add_argument("--ranks", type=int, metavar="N", help="torchrun with N processes, a GPU each")
    parser.add_argument("--accumulate", type=int, metavar="N",
                        help="of train.py (default: what the GPUs' memory asks for)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a GPU (default: as it is here)")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="report their IoU too")
    parser.add_argument("--named", metavar="CHECKPOINT",
                        help="run nothing; count how its pseudo-labels name the pixels of each class")
    parser.add_argument("--tau", type=float, help="for --named, in place of the run's own")
    parser.add_argument("--data-root")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="more flags of train.py, for all rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.named:
        print(named_table(args.named, args.tau))
        return
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    rows = {row: flags for group in args.rows for row, flags in GROUPS[group].items()}
    unknown = {*(args.only or [])} - {*rows}
    if unknown:
        parser.error(f"--only {shlex.join(sorted(unknown))}: not in these groups, which hold "
                     f"{shlex.join(rows)}")
    args.bases = [row for row in rows if any(f"{{{row}}}" in flags for flags in rows.values())]
    rows = {row: flags for row, flags in rows.items()
            if not args.only or row in args.only or row in args.bases}
    if args.memory is None:
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        args.memory = min((gpu.total_memory / 2 ** 30 for gpu in gpus), default=float("inf"))
    # Seed by seed, so that what is stopped early holds all rows.
    calls = {(row, seed): command(row, rows[row], seed, args) for seed, row in itertools.product(seeds, rows)}
    if args.dry_run:
        print("\n".join(map(shlex.join, calls.values())))
        return
    done, failed = {}, False
    with ThreadPoolExecutor(args.jobs) as pool:
        for (row, seed), call in calls.items():
            done[row, seed] = pool.submit(run, row, rows[row], seed, call, args, done)
        try:
            wait(done.values())
        except KeyboardInterrupt:  # the runs have it too, and save
            pool.shutdown(cancel_futures=True)
            sys.exit("evidence.py: stopped; the same command resumes")
    columns = {"teacher": "teacher mIoU", "student": "student", "best": "teacher's best"}
    columns |= {label: label for label in args.classes}
    if any(row not in PAPER for row in rows):
        columns |= LOGGED | RIGHT
    columns["seconds"] = "s a run"
    print(f"| row | the paper's | seeds | {' | '.join(columns.values())} |\n"
          + "|---" * (len(columns) + 3) + "|")
    found = {row: {} for row in rows}
    for row, seed in calls:
        try:
            found[row][seed] = done[row, seed].result()
        except subprocess.CalledProcessError as error:
            failed = True
            print(f"{row}, seed {seed}: {shlex.join(map(str, error.cmd))} ended with "
                  f"{error.returncode}; see {folder(row, seed, args)}.log", file=sys.stderr)
    for row, results in found.items():
        print(table_row(row, list(results.values()), columns))
    for name in ("teacher", *args.classes) if len(seeds) > 1 else ():
        print(f"\n| {columns[name]}, by seed | {' | '.join(map(str, seeds))} |\n"
              + "|---" * (len(seeds) + 1) + "|")
        for row, results in found.items():
            cells = (f"{results[seed][name]:.1f}" if seed in results else "" for seed in seeds)
            print(f"| {row} | {' | '.join(cells)} |")
    sys.exit(failed)


if __name__ == "__main__":
    main()
