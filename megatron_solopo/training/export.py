"""Hugging Face folders of a run: the trained model in --save-hf, earlier ones in --save-hf/iter_0000100."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_solopo.config import Config
from megatron_solopo.conversion.hf import save_folder
from megatron_solopo.conversion.manifest import checkpoint_folder
from megatron_solopo.conversion.places import restore
from megatron_solopo.errors import UserError
from megatron_solopo.parallel.platform import first_error
from megatron_solopo.training.engine import Engine


def export_model(engine: Engine, config: Config, iteration: int | None) -> str | None:
    """Writes the model as it is now; collective. Returns on every process what the first could not do.

    Args:
        iteration: of a folder inside --save-hf, or None for --save-hf itself.
    """
    target = Path(config.output.save_hf)
    if iteration is not None:
        target = checkpoint_folder(target, iteration)
    engine.gather_parameters()
    try:
        save_folder(
            engine.models,
            engine.hf_config,
            config.model.hf_path,
            target,
            force=config.output.force or iteration is not None,  # a killed run may have written this one already
            chat_template=config.model.chat_template,
            chat_template_kwargs=config.model.chat_template_kwargs,
            added_tokens=config.model.add_special_tokens,
        )
        return first_error(None)
    except UserError as error:
        return first_error(str(error))


def delete_earlier_exports(config: Config) -> None:
    """A new run with --force starts without the folders of the run it replaces."""
    if dist.get_rank() == 0 and config.output.save_hf_interval and config.output.force:
        restore(Path(config.output.save_hf))
        for path in Path(config.output.save_hf).glob("iter_*"):
            shutil.rmtree(path, ignore_errors=True)
