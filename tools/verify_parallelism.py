"""The same as `solopo verify-parallelism`; `--help` explains it."""

import sys

from megatron_solopo.cli import run
from megatron_solopo.training.verify import main

if __name__ == "__main__":
    sys.exit(run(main))
