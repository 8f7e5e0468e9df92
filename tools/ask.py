"""The same as `solopo ask`; `--help` explains it."""

import sys

from megatron_solopo.cli import run
from megatron_solopo.evaluation.ask import main

if __name__ == "__main__":
    sys.exit(run(main))
