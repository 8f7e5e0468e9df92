"""``pretrain_solopo.py`` and ``solopo train``: options, platform, then the trainer.

megatron-core imports Transformer Engine, and the CPU platform hides it: therefore this module imports the modules with
megatron-core after the start of the platform; all others import them at the top.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.conversion.manifest import latest_iteration
from megatron_solopo.errors import UserError
from megatron_solopo.parallel import platform
from megatron_solopo.parallel.deterministic import fixed_order
from megatron_solopo.parallel.platform import Platform


def main(argv: list[str] | None = None) -> int:
    """Trains, or with ``--dry-run`` prints what training would do; returns the exit status.

    Raises:
        UserError: see `trainer.train`.
        LostProcess: another process of the run is gone.
    """
    config, command = config_load.parsed(argv)
    config_load.resolve(config)
    with contextlib.ExitStack() as stack:
        if command.mock_data:
            from megatron_solopo.training.mock_data import mocked

            config = stack.enter_context(mocked(config))
        if command.dry_run:
            _describe(config)
            return 0
        running = stack.enter_context(started(config))
        from megatron_solopo.training.trainer import train

        train(running, config)
    return 0


def _describe(config: Config) -> None:
    from megatron_solopo.planning.table import memory_of_run
    from megatron_solopo.training.dry_run import describe

    if os.environ.get("RANK", "0") == "0":
        print(describe(config, lambda plan, device: memory_of_run(config, plan, device)))


@contextmanager
def started(config: Config) -> Iterator[Platform]:
    """Starts the platform of a run, and stops it at the end of the block.

    Raises:
        LostProcess: another process of the run is gone.
        UserError: the GPU is out of memory.
    """
    parallel = config.parallel
    split_layers = parallel.tensor_model_parallel_size * parallel.context_parallel_size > 1
    with fixed_order() if config.training.deterministic_mode else nullcontext():
        running = platform.start(parallel.device, parallel.distributed_timeout_minutes, split_layers)
        try:
            with platform.explain_lost_process(lambda: _advice(config)):
                yield running
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(config, error) from error
        finally:
            platform.stop(running)


def _advice(config: Config) -> str:
    """Returns what to do after a process was lost."""
    iteration = latest_iteration(config.output.save)
    return (
        ", and a slow one needs a larger --distributed-timeout-minutes "
        f"(now {config.parallel.distributed_timeout_minutes:g}). "
        + (
            "No checkpoint was written yet: start the run again"
            if iteration is None
            else f"The checkpoint of step {iteration} is complete: resume with --auto-resume"
        )
    )


def _out_of_memory(config: Config, error: torch.OutOfMemoryError) -> UserError:
    """Returns the error of a failed allocation, with the options that hold most memory."""
    most = config.training.max_tokens_per_rank
    packs = f"--micro-batch-size {config.training.micro_batch_size}"
    packs += "" if most is None else f" or --max-tokens-per-rank {most}"
    recompute = "" if config.model.recompute_granularity else ", use --recompute-granularity full"
    return UserError(
        "gpu-out-of-memory",
        f"rank {os.environ.get('RANK', '0')}: the GPU is out of memory ({str(error).partition('. ')[0]}); lower {packs}"
        f"{recompute}, or divide the model over more processes; --dry-run shows what a layout holds",
    )
