"""`compt chain` on every process of torchrun: it takes that command's options, and the recipe also as `--recipe`.

torchrun --nproc_per_node 8 -- launchers/train.py --recipe recipes/cc3m_vit.yaml --run runs/cc3m

Without the `--` torchrun takes `--run` for an abbreviation of an option of its own.
"""

import sys

from compt.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["chain", *(word.removeprefix("--recipe=") for word in sys.argv[1:] if word != "--recipe")]
    main()
