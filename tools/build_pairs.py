"""The same as `solopo build-pairs`; `--help` explains it."""

import sys

from megatron_solopo.cli import run
from megatron_solopo.data.pairing.build_pairs import main

if __name__ == "__main__":
    sys.exit(run(main))
