"""The same as `solopo evaluate`; `--help` explains it."""

import sys

from megatron_solopo.cli import run
from megatron_solopo.evaluation.evaluate import main

if __name__ == "__main__":
    sys.exit(run(main))
