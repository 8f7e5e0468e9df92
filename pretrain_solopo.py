"""Train with SoLoPO: torchrun --nproc_per_node N pretrain_solopo.py --config FILE [--flag value ...]"""

import sys

from megatron_solopo.cli import run
from megatron_solopo.training.run import main

if __name__ == "__main__":
    sys.exit(run(main))
