"""The same as `solopo sample-responses`; `--help` explains it."""

import sys

from megatron_solopo.cli import run
from megatron_solopo.data.sampling.sample_responses import main

if __name__ == "__main__":
    sys.exit(run(main))
