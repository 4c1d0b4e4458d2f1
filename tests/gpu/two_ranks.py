"""train.py on ranks that share one GPU, over gloo: NCCL refuses to. Started by torchrun.

    torchrun --standalone --nproc_per_node=2 tests/gpu/two_ranks.py [flags of train.py]
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train


def join():
    torch.distributed.init_process_group("gloo")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    train.join = join
    train.main()
