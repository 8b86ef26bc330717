"""`compt chain` on every process of torchrun: its options, with the recipe as `--recipe` and `--run` as `--run-folder`.

torchrun --nproc_per_node 8 launchers/train.py --recipe recipes/cc3m_vit.yaml --run-folder runs/cc3m

torchrun reads all options before it hands on its script's: it takes `--run` for an abbreviation of one of its own.
"""

import re
import sys

from compt.cli import main

if __name__ == "__main__":
    words = [re.sub(r"^--recipe=|(?<=^--run)-folder(?==|$)", "", word) for word in sys.argv[1:] if word != "--recipe"]
    sys.argv[1:] = ["chain", *words]
    main()
