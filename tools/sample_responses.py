"""The same as `solopo sample-responses`; `--help` explains it."""

from megatron_solopo.cli import run_tool

if __name__ == "__main__":
    run_tool(__file__)
