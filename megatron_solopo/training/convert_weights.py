"""The commands of `solopo convert-checkpoint` on the started platform; convert.py reads their options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import PretrainedConfig

from megatron_solopo import __version__
from megatron_solopo.config import Config
from megatron_solopo.conversion.adapters import merging, save_adapters
from megatron_solopo.conversion.carried import carried_names
from megatron_solopo.conversion.compare import compare, read_prompts, report
from megatron_solopo.conversion.hf import beside_of, kept_dtypes
from megatron_solopo.conversion.hf_folder import has_stacked_experts
from megatron_solopo.conversion.hf_weights import HfWeights
from megatron_solopo.conversion.manifest import find_checkpoint
from megatron_solopo.conversion.megatron_folder import (
    load_weights_from,
    save_megatron_folder,
    stored_dtype,
    stored_weights,
)
from megatron_solopo.conversion.quantized import WeightReader
from megatron_solopo.conversion.save_folder import save_folder
from megatron_solopo.conversion.shards import parse_size
from megatron_solopo.conversion.sidecar_files import STACKED, SidecarFiles, config_json, dtype_name, generation_config
from megatron_solopo.conversion.start import check_weights, is_megatron_folder, load_start, open_hf_weights
from megatron_solopo.conversion.stored import StoredWeights
from megatron_solopo.conversion.trainers import (
    check_all_read,
    check_settings,
    find_trainer_checkpoint,
    is_trainer_folder,
    state_of_trainers,
    unsupported,
)
from megatron_solopo.errors import UserError
from megatron_solopo.model.hf_config import padded_vocab_size
from megatron_solopo.parallel.platform import first_error
from megatron_solopo.parallel.topology import world_size
from megatron_solopo.training.engine import build_chunks, initialize_parallel
from megatron_solopo.training.preflight import check_cut, chosen_template, end_of_turn, load_run_tokenizer, read_model
from megatron_solopo.training.reference import shared, starting_weights
from megatron_solopo.training.run_identity import check_reference, read_progress


def convert(options: argparse.Namespace, config: Config) -> int:
    """Checks model and layout, then runs ``options.command``; returns the exit status. Collective.

    Raises:
        UserError: see `read_model` and `check_cut`; or the command does not support the options or files.
    """
    hf_config = read_model(config)
    check_cut(hf_config, config, world_size())
    initialize_parallel(config)
    command = {
        "hf-to-megatron": _to_megatron,
        "megatron-to-megatron": _megatron_to_megatron,
        "megatron-to-hf": _to_hf,
        "verify": _verify,
    }[options.command]
    return command(options, config, hf_config)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _to_megatron(options: argparse.Namespace, config: Config, hf_config: PretrainedConfig) -> int:
    if is_megatron_folder(options.hf_path):
        raise UserError("folder-is-megatron", f"--hf-path {options.hf_path}: holds Megatron's weights already")
    reader = all_trained(options.hf_path, hf_config)
    dtype = _dtype(options.dtype) if options.dtype else reader.dtype(kept_dtypes(hf_config))
    models = build_chunks(hf_config, config, dtype)
    added = config.model.add_special_tokens
    weights = open_hf_weights(models, hf_config, options.hf_path, added)
    sidecar_files = SidecarFiles(
        Path(options.hf_path), _megatron_config(options.hf_path, hf_config, dtype), added_tokens=added
    )
    _save_megatron(options, hf_config, models, sidecar_files, weights)
    return 0


def _megatron_to_megatron(options: argparse.Namespace, config: Config, hf_config: PretrainedConfig) -> int:
    if config.model.lora_rank is not None:
        raise UserError(
            "adapter-not-merged",
            f"--load {options.load}: its run trained LoRA's adapters, and a Megatron folder holds a model; write the "
            "checkpoint with megatron-to-hf, and that folder with hf-to-megatron",
        )
    if (beside := beside_of(config.model.hf_path, hf_config)) is not None and beside[1]:
        raise _carries(config.model.hf_path)
    chat_template, end_of_turn = _chat_format(Path(options.load), config)
    source = _checkpoint(options)
    dtype = _dtype(options.dtype) if options.dtype else stored_dtype(source)
    models = build_chunks(hf_config, config, dtype)
    sidecar_files = SidecarFiles(
        Path(config.model.hf_path),
        _megatron_config(config.model.hf_path, hf_config, dtype),
        chat_template,
        config.model.chat_template_kwargs,
        config.model.add_special_tokens,
        end_of_turn,
        config.model.chat_template_date,
    )
    _save_megatron(options, hf_config, models, sidecar_files, _stored(options, config, hf_config, source, models))
    return 0


def _megatron_config(source: str, hf_config: PretrainedConfig, dtype: torch.dtype) -> str:
    """Returns the text of a Megatron folder's config.json."""
    document = config_json(source, hf_config, dtype)
    if has_stacked_experts(source):
        document = json.dumps(json.loads(document) | {STACKED: True}, indent=2) + "\n"
    return document


def _save_megatron(
    options: argparse.Namespace,
    hf_config: PretrainedConfig,
    models: Sequence[GPTModel],
    sidecar_files: SidecarFiles,
    weights: HfWeights | StoredWeights,
) -> None:
    dtype, reason = next(models[0].parameters()).dtype, unsupported(hf_config)
    beside = None if reason else state_of_trainers(hf_config, models[0].config, models[0].vocab_size, dtype)
    save_megatron_folder(models, sidecar_files, Path(options.save), weights, beside)
    if dist.get_rank() == 0:
        print(f"wrote {options.save} ({dtype_name(dtype)}); train from it with --hf-path {options.save}")
        others = "Megatron-LM and Megatron-Bridge"
        print(f"not for {others}: {hf_config.model_type} has {reason}" if reason else f"{others} start from it too")


def _checkpoint(options: argparse.Namespace) -> Path:
    """Returns the checkpoint that --load and --ckpt-step name."""
    if is_trainer_folder(Path(options.load)):
        return find_trainer_checkpoint(Path(options.load), options.ckpt_step)
    return find_checkpoint(options.load, options.ckpt_step)


def _stored(
    options: argparse.Namespace, config: Config, hf_config: PretrainedConfig, source: Path, models: Sequence[GPTModel]
) -> StoredWeights:
    """Returns the weights of a checkpoint; of another trainer's after its settings and tensors were compared with the
    model."""
    if not is_trainer_folder(Path(options.load)):
        return stored_weights(source, models)
    check_settings(source, config.model.hf_path, hf_config, models[0].config)
    weights = stored_weights(source, models)
    check_all_read(source, weights)
    return weights


def all_trained(folder: str, hf_config: PretrainedConfig) -> WeightReader:
    """Returns the weights of a folder that are the trained model's all.

    Raises:
        UserError: the folder holds others beside it.
    """
    reader = WeightReader(folder)
    if reader.is_nested or carried_names(reader, hf_config):
        raise _carries(folder)
    return reader


def _carries(folder: str) -> UserError:
    return UserError(
        "folder-carries",
        f"--hf-path {folder}: holds tensors beside the trained model, such as an image encoder or layers of "
        "multi-token prediction, which a Megatron folder does not carry; start training from this folder itself",
    )


def _chat_format(load: Path, config: Config) -> tuple[str | None, int | None]:
    """Returns the text of a run's --chat-template, or None, and the id that ends its turns; (None, None) for a Megatron
    folder, whose files are used as they are."""
    if not (load / "config.yaml").is_file():
        return None, None
    template = config.model.chat_template
    if template is not None and not Path(template).is_file():
        raise UserError(
            "file-missing",
            f"--load {load}: the --chat-template {template} of its run does not exist any more; restore it, or set "
            f"another one in {load / 'config.yaml'}",
        )
    generation_config(Path(config.model.hf_path))  # raises an error where it cannot be read
    tokenizer = load_run_tokenizer(config.model)
    return chosen_template(config.model, tokenizer), end_of_turn(tokenizer)


def _to_hf(options: argparse.Namespace, config: Config, hf_config: PretrainedConfig) -> int:
    parse_size(options.max_shard_size)
    chat_template, end_of_turn = _chat_format(Path(options.load), config)
    source = _checkpoint(options)
    models = build_chunks(hf_config, config, stored_dtype(source))
    adapters = config.model.lora_rank is not None
    if options.lora_export is not None and not adapters:
        raise UserError("option-unused", f"--lora-export would have no effect: the run of {options.load} has no LoRA")
    stored = None if adapters else _stored(options, config, hf_config, source, models)
    alone = adapters and options.lora_export == "adapter"
    if adapters:
        load_weights_from(source, models)
        if not alone:
            weights = shared(lambda: starting_weights(config))
            check_reference(read_progress(source), weights, config)
            load_start(models, hf_config, config.model.hf_path)
    problem: UserError | None = None
    try:
        if alone:
            save_adapters(models, hf_config, config.model, Path(options.save_hf), options.overwrite)
        else:
            save_folder(
                models,
                hf_config,
                config.model.hf_path,
                options.save_hf,
                force=options.overwrite,
                chat_template=chat_template,
                chat_template_kwargs=config.model.chat_template_kwargs,
                chat_template_date=config.model.chat_template_date,
                added_tokens=config.model.add_special_tokens,
                end_of_turn=end_of_turn,
                dtype=_dtype(options.dtype) if options.dtype else None,
                max_shard_size=options.max_shard_size,
                stored=stored,
                change=merging(models, hf_config, config.model),
                made_of=None if adapters else _made_of(source, Path(config.model.hf_path)),
            )
    except UserError as error:
        problem = error
    if problem := first_error(problem):
        raise problem
    if dist.get_rank() == 0:
        print(f"wrote {options.save_hf} from {source}")
    return 0


def _made_of(*folders: Path) -> str:
    """Returns a text that differs when a file of these folders, or this package, does; no file is read."""
    if dist.get_rank() != 0:  # which alone need have them
        return ""
    paths = (path for folder in folders for path in sorted(folder.resolve().iterdir()) if path.is_file())
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return json.dumps({"megatron_solopo": __version__, "files": files}, indent=1)


def _verify(options: argparse.Namespace, config: Config, hf_config: PretrainedConfig) -> int:
    if options.bound is not None and not 0 <= options.bound < float("inf"):
        raise UserError("option-value", f"--bound {options.bound:g}: must be a number of nats, 0 or more")
    if options.ckpt_step is not None and options.load is None:
        raise UserError("option-unused", "--ckpt-step would have no effect: it needs --load")
    if is_megatron_folder(config.model.hf_path):
        raise UserError(
            "folder-is-megatron",
            f"--hf-path {config.model.hf_path}: holds Megatron's weights, which transformers does not load; pass it as "
            "--load, and the Hugging Face folder as --hf-path",
        )
    if config.model.add_special_tokens is not None:
        raise UserError(
            "special-tokens-added",
            f"--load {options.load}: its run added special tokens, whose rows {config.model.hf_path} does not have; "
            "write the checkpoint with megatron-to-hf, and compare that folder with itself",
        )
    if config.model.lora_rank is not None:
        raise UserError(
            "adapter-not-merged",
            f"--load {options.load}: its run trained LoRA's adapters, which transformers does not load; write the "
            "checkpoint with megatron-to-hf, and compare that folder with itself",
        )
    padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
    check_weights(config.model.hf_path, hf_config, padded)  # for clearer messages than those of transformers
    prompts = read_prompts(options.prompts, config.model.hf_path, hf_config)
    models = build_chunks(hf_config, config, _dtype(options.dtype))
    if options.load is None:
        load_start(models, hf_config, config.model.hf_path)
    else:
        _stored(options, config, hf_config, _checkpoint(options), models).fill_all()
    comparison = compare(models[0], hf_config, config.model.hf_path, prompts)
    bound = options.bound if options.bound is not None else 1e-3 if options.dtype == "float32" else None
    return report(comparison, options.dtype, bound) if comparison is not None else 0
