"""`compt chain` on every process that torchrun, deepspeed, accelerate or srun starts (docs/cluster.md).

torchrun --nproc_per_node 8 launchers/train.py --recipe recipes/cc3m_vit.yaml --run-folder runs/cc3m
"""

import os
import sys

from compt.cli.launch import chain_words
from compt.cli.main import run

if __name__ == "__main__":
    run(lambda: chain_words(sys.argv[1:], os.environ))
