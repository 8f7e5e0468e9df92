"""The same as `solopo convert-checkpoint`; `--help` explains it."""

import sys

from megatron_solopo.cli import run
from megatron_solopo.training.convert import main

if __name__ == "__main__":
    sys.exit(run(main))
