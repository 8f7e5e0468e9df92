"""What the commands of `solopo convert-checkpoint` do, on the started platform; `convert` reads their options."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_solopo.config import Config
from megatron_solopo.conversion.compare import compare, read_prompts, report
from megatron_solopo.conversion.hf import save_folder
from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.conversion.manifest import find_checkpoint
from megatron_solopo.conversion.megatron_folder import (
    load_weights_from,
    save_megatron_folder,
    stored_dtype,
    stored_weights,
)
from megatron_solopo.conversion.shards import parse_size
from megatron_solopo.conversion.sidecar_files import SidecarFiles, config_json, dtype_name, generation_config
from megatron_solopo.conversion.start import check_weights, is_megatron_folder, load_start, open_hf_weights
from megatron_solopo.errors import UserError
from megatron_solopo.model.hf_config import padded_vocab_size
from megatron_solopo.parallel.platform import first_error
from megatron_solopo.parallel.topology import world_size
from megatron_solopo.training.engine import build_chunks, initialize_parallel
from megatron_solopo.training.preflight import check_cut, chosen_template, end_of_turn, load_run_tokenizer, read_model


def convert(given: argparse.Namespace, config: Config) -> int:
    """Checks model and layout, then does the work of ``given.command``; returns the exit status. Collective.

    Raises:
        UserError: see `read_model` and `check_cut`, or what the command cannot do.
    """
    hf_config = read_model(config)
    check_cut(hf_config, config, world_size())
    initialize_parallel(config)
    work = {"hf-to-megatron": _to_megatron, "megatron-to-hf": _to_hf, "verify": _verify}[given.command]
    return work(given, config, hf_config)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _to_megatron(given: argparse.Namespace, config: Config, hf_config: PretrainedConfig) -> int:
    if is_megatron_folder(given.hf_path):
        raise UserError(f"--hf-path {given.hf_path}: holds Megatron's weights already")
    dtype = _dtype(given.dtype) if given.dtype else TensorReader(given.hf_path).dtype()
    models = build_chunks(hf_config, config, dtype)
    added = config.model.add_special_tokens
    weights = open_hf_weights(models, hf_config, given.hf_path, added)
    sidecar_files = SidecarFiles(Path(given.hf_path), config_json(given.hf_path, hf_config, dtype), added_tokens=added)
    save_megatron_folder(models, sidecar_files, Path(given.save), weights)
    if dist.get_rank() == 0:
        print(f"wrote {given.save} ({dtype_name(dtype)}); train from it with --hf-path {given.save}")
    return 0


def _chat_format(load: Path, config: Config) -> tuple[str | None, int | None]:
    """(the text of a run's --chat-template, if given, the id that ends its turns); (None, None) of a Megatron folder,
    whose files hold what is known."""

    if not (load / "config.yaml").is_file():
        return None, None
    template = config.model.chat_template
    if template is not None and not Path(template).is_file():
        raise UserError(
            f"--load {load}: the --chat-template {template} of its run is no longer there; put it back, or name "
            f"another in {load / 'config.yaml'}"
        )
    generation_config(Path(config.model.hf_path))  # can be read
    tokenizer = load_run_tokenizer(config.model)
    return chosen_template(config.model, tokenizer), end_of_turn(tokenizer)


def _to_hf(given: argparse.Namespace, config: Config, hf_config: PretrainedConfig) -> int:
    parse_size(given.max_shard_size)
    chat_template, end_of_turn = _chat_format(Path(given.load), config)
    source = find_checkpoint(given.load, given.ckpt_step)
    models = build_chunks(hf_config, config, stored_dtype(source))
    stored = stored_weights(source, models)
    problem = None
    try:
        save_folder(
            models,
            hf_config,
            config.model.hf_path,
            given.save_hf,
            force=given.overwrite,
            chat_template=chat_template,
            chat_template_kwargs=config.model.chat_template_kwargs,
            chat_template_date=config.model.chat_template_date,
            added_tokens=config.model.add_special_tokens,
            end_of_turn=end_of_turn,
            dtype=_dtype(given.dtype) if given.dtype else None,
            max_shard_size=given.max_shard_size,
            stored=stored,
        )
    except UserError as error:
        problem = str(error)
    if problem := first_error(problem):
        raise UserError(problem)
    if dist.get_rank() == 0:
        print(f"wrote {given.save_hf} from {source}")
    return 0


def _verify(given: argparse.Namespace, config: Config, hf_config: PretrainedConfig) -> int:
    if given.bound is not None and not 0 <= given.bound < float("inf"):
        raise UserError(f"--bound {given.bound:g}: give nats, 0 or more")
    if given.ckpt_step is not None and given.load is None:
        raise UserError("--ckpt-step would have no effect: it needs --load")
    if is_megatron_folder(config.model.hf_path):
        raise UserError(
            f"--hf-path {config.model.hf_path}: holds Megatron's weights, which transformers does not load; give it as "
            "--load, and the Hugging Face folder here"
        )
    if config.model.add_special_tokens is not None:
        raise UserError(
            f"--load {given.load}: its run added special tokens, whose rows {config.model.hf_path} does not have; "
            "write the checkpoint with megatron-to-hf, and compare that folder with itself"
        )
    padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
    check_weights(config.model.hf_path, hf_config, padded)  # which transformers would miss in words of its own
    prompts = read_prompts(given.prompts, config.model.hf_path, hf_config)
    models = build_chunks(hf_config, config, _dtype(given.dtype))
    if given.load is None:
        load_start(models, hf_config, config.model.hf_path)
    else:
        load_weights_from(find_checkpoint(given.load, given.ckpt_step), models)
    found = compare(models[0], hf_config, config.model.hf_path, prompts)
    bound = given.bound if given.bound is not None else 1e-3 if given.dtype == "float32" else None
    return report(found, given.dtype, bound) if found is not None else 0
