"""Exports a run's Hugging Face folders: the trained model to --save-hf, earlier ones to --save-hf/iter_0000100."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_solopo.config import Config
from megatron_solopo.conversion.adapters import merging, save_adapters
from megatron_solopo.conversion.manifest import checkpoint_folder
from megatron_solopo.conversion.places import restore
from megatron_solopo.conversion.save_folder import save_folder
from megatron_solopo.errors import UserError
from megatron_solopo.parallel.platform import first_error, run_on_rank0
from megatron_solopo.training import resume
from megatron_solopo.training.engine import Engine
from megatron_solopo.training.preflight import RunData


def export_model(engine: Engine, config: Config, data: RunData, step: int) -> str | None:
    """Writes the current model to a folder inside --save-hf; collective. Returns rank 0's error on every rank, or
    None."""
    return _save(engine, config, data, checkpoint_folder(resume.export_folder(config), step))


def export_last_model(engine: Engine, config: Config, data: RunData, steps: int) -> str | None:
    """Writes the model after the last step to --save-hf itself; otherwise as `export_model`."""
    try:
        # A full disk must not cost the model: `export_is_complete` reports it.
        run_on_rank0(lambda: resume.begin_export(config, steps))
        refused = first_error(None)
    except UserError as error:
        refused = first_error(str(error))
    problem = refused or _save(engine, config, data, resume.export_folder(config))
    if problem:
        return problem
    full = first_error(run_on_rank0(lambda: resume.export_is_complete(config, steps)))
    return full and (
        f"--save {config.output.save}: {resume.EXPORT} cannot be written ({full}); the model is in "
        f"{config.output.save_hf}, but the next start will not find that out"
    )


def _save(engine: Engine, config: Config, data: RunData, target: Path) -> str | None:
    engine.gather_parameters()
    try:
        if config.model.lora_rank is not None and config.output.lora_export == "adapter":
            save_adapters(engine.models, engine.hf_config, config.model, target, force=True)
            return first_error(None)
        save_folder(
            engine.models,
            engine.hf_config,
            config.model.hf_path,
            target,
            force=True,  # a folder of an earlier start of this run, or one that `begin_export` allowed
            chat_template=data.chat_template,
            chat_template_kwargs=config.model.chat_template_kwargs,
            chat_template_date=config.model.chat_template_date,
            added_tokens=config.model.add_special_tokens,
            end_of_turn=data.end_of_turn,
            change=merging(engine.models, engine.hf_config, config.model),
        )
        return first_error(None)
    except UserError as error:
        return first_error(str(error))


def delete_earlier_exports(config: Config) -> None:
    """Removes what an earlier run recorded of its export in the run folder, and with --overwrite its folders."""
    if dist.get_rank() == 0:
        resume.forget_export(config)
        if config.output.save_hf_interval and config.output.overwrite:
            restore(resume.export_folder(config))
            for path in resume.export_folder(config).glob("iter_*"):
                shutil.rmtree(path, ignore_errors=True)
