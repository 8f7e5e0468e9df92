"""``pretrain_solopo.py`` and ``solopo train``: options, platform, then the trainer.

megatron-core looks for Transformer Engine where it is imported, and the CPU platform hides it: therefore the modules
with megatron-core are imported here, behind the start of the platform, and everywhere else at the top of a module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.conversion.manifest import latest_iteration
from megatron_solopo.parallel import platform
from megatron_solopo.parallel.platform import Platform


def main(argv: list[str] | None = None) -> int:
    """Trains, or with ``--dry-run`` says what training would do; returns the exit status.

    Raises:
        UserError: a mistake of the user, see `trainer.train`.
        LostProcess: another process of the run is gone.
    """
    config, dry_run = config_load.load(argv)
    if dry_run:
        from megatron_solopo.training.dry_run import describe

        if os.environ.get("RANK", "0") == "0":
            print(describe(config))
        return 0
    with started(config) as here:
        from megatron_solopo.training.trainer import train

        train(here, config)
    return 0


@contextmanager
def started(config: Config) -> Iterator[Platform]:
    """The platform that a run computes on, within it.

    Raises:
        LostProcess: another process of the run is gone.
    """
    here = platform.start(config.parallel.device, config.parallel.distributed_timeout_minutes)
    try:
        with platform.explain_lost_process(lambda: _advice(config)):
            yield here
    finally:
        platform.stop(here)


def _advice(config: Config) -> str:
    """What to do after the loss of a process."""
    iteration = latest_iteration(config.output.save)
    return (
        ", and a slow one needs a larger --distributed-timeout-minutes "
        f"(now {config.parallel.distributed_timeout_minutes:g}). "
        + (
            "No checkpoint was written yet: start the run again"
            if iteration is None
            else f"The checkpoint of step {iteration} is complete: go on with --auto-resume"
        )
    )
