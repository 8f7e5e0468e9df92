"""The same as `solopo prepare-data`; `--help` explains it."""

import sys

from megatron_solopo.cli import run
from megatron_solopo.data.building.prepare_data import main

if __name__ == "__main__":
    sys.exit(run(main))
