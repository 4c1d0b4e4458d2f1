"""Are two runs the same to the bit? For a change that must not alter what is computed.

    git worktree add ../before HEAD
    (cd ../before && python train.py --iters 20 --seed 3 --out runs/same)
    python train.py --iters 20 --seed 3 --out runs/same
    python tools/compare.py ../before/runs/same runs/same

Compares weights, buffers and momentum of last.pth, metrics.jsonl without what the clock gave, and
hardness.csv. Exit code 1 where they differ.
"""

import argparse
import json
import sys
from pathlib import Path

import torch


def flat(value, name=""):
    """name -> leaf of nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in pairs for key, leaf in flat(v, f"{name}.{k}").items()}
    return {name: value}


def contents(run):
    """name -> what two equal runs have in common."""
    state = torch.load(run / "last.pth", map_location="cpu", weights_only=True)
    found = flat({part: state[part] for part in ("iteration", "student", "teacher", "optimizer")})
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found |= flat([{k: v for k, v in r.items() if k != "images_per_second"} for r in records], "metrics")
    hardness = run / "hardness.csv"
    rows = hardness.read_text().splitlines() if hardness.exists() else []
    return found | {"hardness.csv": [row for row in rows if not row.startswith("iteration,")]}  # its header


def main():
    parser = argparse.ArgumentParser(description="Compare two runs to the bit.")
    parser.add_argument("runs", type=Path, nargs=2, help="the folders of two finished runs")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "last.pth").exists():
            parser.error(f"{run}: no last.pth in it; give the folder of a finished run")
    one, other = map(contents, args.runs)
    differ = sorted(one.keys() ^ other.keys()) + [
        name for name in one.keys() & other.keys()
        if not (one[name].equal(other[name]) if torch.is_tensor(one[name]) else one[name] == other[name])]
    print("\n".join(f"differs: {name}" for name in differ[:20]) or f"equal: {len(one)} values")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
