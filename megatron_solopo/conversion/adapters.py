"""LoRA's adapters and PEFT's folders: reading, the first values, writing, merging into the model's matrices.

Tensors have PEFT's names, ``base_model.model.`` and the path of the module, then ``lora_A.weight`` [r, in] or
``lora_B.weight`` [out, r].
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from transformers import PretrainedConfig

from megatron_solopo.atomic import folder_aside, new_file, write_text
from megatron_solopo.config import ModelConfig
from megatron_solopo.conversion.hf import Entered, hf_tensors, local_part, named_entries
from megatron_solopo.conversion.hf_weights import stored_shapes
from megatron_solopo.conversion.places import check_target, put_in_place, restore
from megatron_solopo.errors import UserError
from megatron_solopo.lora_options import (
    CONFIG,
    MIXTRALS,
    MLP,
    PROJECTIONS,
    RECURRENT,
    WEIGHTS,
    adapts_experts,
    alpha_of,
    modules_of,
)
from megatron_solopo.model.families.fields import has_latents
from megatron_solopo.model.families.operators import Entry, Rename
from megatron_solopo.model.families.projections import adapted, chosen_projections, projection_of, projections_of
from megatron_solopo.model.hf_config import outer_model_type
from megatron_solopo.model.lora import SUFFIX, has_adapters, lora_scale
from megatron_solopo.parallel.topology import expert_count

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def adapter_entries(model: GPTModel, hf_config: PretrainedConfig) -> Entered:
    """Yields (entry, its PEFT name, the parameter on this process) for every parameter of a model's adapters. The name
    is that in the language model alone, see `stored`."""
    matrices = adapted(hf_config)
    for local, layer in enumerate(model.decoder.layers):
        for each in matrices:
            parts, place = each.entry.operator.parts(), f"decoder.layers.{local}.{each.path}{SUFFIX}"
            for owner, expert in each.owners(layer):
                adapter = getattr(owner, each.name + SUFFIX, None)
                for projection in () if adapter is None else adapter.projections:
                    number = each.projections[projection]
                    module = each.entry.hf[number].removesuffix(".weight")
                    module = PREFIX + module.format(layer=layer.layer_number - 1, expert=expert)
                    for part, ending, operator in (("a", A, Rename()), ("b", B, parts.operators[number])):
                        entry = Entry(f"{place}.{projection}_{part}", (module + ending,), operator)
                        yield entry, entry.hf, getattr(adapter, f"{projection}_{part}")


def stored(name: str, hf_config: PretrainedConfig) -> str:
    """Returns PEFT's name of an adapter's tensor: in a model with images the language model is a module of it."""
    if outer_model_type(hf_config) is None:
        return name
    return name.replace(PREFIX + "model.", PREFIX + "model.language_model.", 1)


def check_adapters(options: ModelConfig, hf_config: PretrainedConfig) -> None:
    """Refuses adapters that this model cannot have, and a folder of --lora-path with others than its config says.

    Raises:
        UserError: PEFT would not read adapters of experts as they are, or projections are fused; or a tensor is
            missing, left over or of another shape.
    """
    if options.lora_rank is not None:
        _check_modules(options, hf_config)
    if options.lora_path is None:
        return
    path = Path(options.lora_path) / WEIGHTS
    expected = {stored(name, hf_config): shape for name, shape in adapter_shapes(options, hf_config).items()}
    with _opened(path) as file:
        names = {*file.keys()}
        if missing := sorted(expected.keys() - names):
            raise UserError("tensor-missing", f"{path}: the tensor {missing[0]!r} is missing ({len(missing)} such)")
        if left_over := sorted(names - expected.keys()):
            raise UserError("tensor-left-over", f"{path}: the tensor {left_over[0]!r} is of no adapter of this model")
        for name, shape in expected.items():
            if (actual := tuple(file.get_slice(name).get_shape())) != shape:
                raise UserError(
                    "tensor-shape",
                    f"{path}: the tensor {name!r} has the shape {actual}, the model and {CONFIG} make it {shape}",
                )


def _check_modules(options: ModelConfig, hf_config: PretrainedConfig) -> None:
    """Refuses --lora-modules, or its default, if the model's folder has no tensor for a projection, or PEFT finds a
    name where there are no adapters."""
    if has_latents(hf_config):
        raise UserError(
            "adapter-unsupported",
            f"--lora-rank: attention of {hf_config.model_type} makes keys and values of latents, whose matrices "
            "have no adapters here; train all weights",
        )
    available, chosen = projections_of(hf_config), chosen_projections(hf_config, options)
    shared = any(".shared_experts." in matrix.path for matrix in adapted(hf_config))
    if shared and not {*MLP}.isdisjoint(chosen):
        raise UserError(
            "adapter-unsupported",
            f"--lora-modules: PEFT finds gate_proj, up_proj and down_proj of {hf_config.model_type} in experts, "
            f"shared experts and MLPs alike, which have no adapters together; name "
            f"{','.join(name for name in available if name not in MLP)}",
        )
    needed = chosen if options.lora_modules else [name for name in chosen if name not in RECURRENT]
    if missing := [name for name in needed if name not in available]:
        raise UserError(
            "adapter-unsupported",
            f"--lora-modules: folders of {hf_config.model_type} have no matrix {missing[0]} of its own, for which PEFT "
            f"would have an adapter; name some of {','.join(available)}",
        )
    if adapts_experts(options) and expert_count(hf_config):
        _check_experts(options)


def _check_experts(options: ModelConfig) -> None:
    """Refuses adapters of experts that PEFT would not read as they are: on transformers 5 it puts gate and up of an
    expert together, with twice the rank and twice alpha (peft/utils/transformers_weight_conversion.py)."""
    of_experts = {*MLP} & {*modules_of(options)}
    if of_experts not in ({*MLP}, {"down_proj"}):
        raise UserError(
            "adapter-of-experts",
            f"--lora-modules {options.lora_modules}: PEFT reads adapters of gate_proj, up_proj and down_proj of "
            "experts together, or those of down_proj; name these",
        )
    if len(of_experts) > 1 and options.use_rslora:
        raise UserError(
            "adapter-of-experts",
            "--use-rslora with adapters of gate_proj and up_proj of experts: PEFT puts both into one of twice the rank "
            "and would scale it by sqrt(2) too much; leave it out",
        )
    if options.lora_dropout:
        raise UserError(
            "adapter-of-experts",
            "--lora-dropout with adapters of experts: PEFT has none there; leave one of them out",
        )


def adapter_shapes(options: ModelConfig, hf_config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Returns PEFT's name -> shape of every tensor of the adapters of --lora-rank."""
    assert options.lora_rank is not None
    chosen, experts = chosen_projections(hf_config, options), adapts_experts(options)
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in stored_shapes(hf_config).items():
        if projection_of(name) in chosen and (experts or ".experts." not in name) and len(shape) == 2:
            module = name.removesuffix(".weight")
            shapes[f"{PREFIX}{module}{A}"] = options.lora_rank, shape[1]
            shapes[f"{PREFIX}{module}{B}"] = shape[0], options.lora_rank
    return shapes


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except FileNotFoundError:
        raise UserError(
            "adapter-missing", f"{path}: no such file; save the adapters with PEFT's save_pretrained"
        ) from None
    except (SafetensorError, OSError) as error:
        raise UserError("file-damaged", f"{path}: not a complete safetensors file ({error}); copy it again") from None


def trained_entries(model: GPTModel, hf_config: PretrainedConfig) -> Entered:
    """Yields the entries of the parameters that are trained: of the adapters, where a model has them, else of all but
    a router's bias."""
    entries = (adapter_entries if has_adapters([model]) else named_entries)(model, hf_config)
    return (each for each in entries if each[2].requires_grad)


@torch.no_grad()
def start_adapters(models: Sequence[GPTModel], hf_config: PretrainedConfig, options: ModelConfig, seed: int) -> None:
    """Fills the adapters of a model's chunks from --lora-path, or as PEFT begins them: B of zeros, and A uniform up to
    1 / sqrt(inputs).

    A is drawn whole by ``seed`` and the tensor's name, on the CPU, so it depends on no layout.
    """
    file = None if options.lora_path is None else _opened(Path(options.lora_path) / WEIGHTS)
    for model in models:
        for entry, (name,), parameter in adapter_entries(model, hf_config):
            part = rank, size, dimension = local_part(entry, parameter)
            if file is None:
                shape = list(parameter.shape)
                if dimension is not None:
                    shape[dimension] *= size
                tensor = _drawn(name, shape, seed)
            else:
                tensor = file.get_tensor(stored(name, hf_config))
            entry.operator.fill(parameter, [tensor], *part)


def _drawn(name: str, shape: Sequence[int], seed: int) -> Tensor:
    if name.endswith(B):
        return torch.zeros(*shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()  # a hash, because users choose neighbouring seeds
    numbers = np.random.default_rng(int.from_bytes(digest)).random(tuple(shape), dtype=np.float32)
    return (2 * torch.from_numpy(numbers) - 1) / sqrt(shape[1])


def adapter_tensors(models: Sequence[GPTModel], hf_config: PretrainedConfig) -> dict[str, Tensor]:
    """Returns PEFT's name -> unsplit tensor of every adapter, on rank 0; a part or nothing on others. Collective."""
    return dict(hf_tensors(models, hf_config, entries=adapter_entries))


def merged(
    tensors: Iterable[tuple[str, Tensor]], adapters: Mapping[str, Tensor], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """Yields a model's tensors with scale x B A added to those that have adapters, summed in float32 or more."""
    for name, tensor in tensors:
        module = PREFIX + name.removesuffix(".weight")
        if module + A in adapters:
            high = torch.promote_types(tensor.dtype, torch.float32)
            a, b = adapters[module + A].to(high), adapters[module + B].to(high)
            tensor = torch.addmm(tensor.to(high), b, a, alpha=scale).to(tensor.dtype)
        yield name, tensor


def merging(
    models: Sequence[GPTModel], hf_config: PretrainedConfig, options: ModelConfig
) -> Callable[[Iterator[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]] | None:
    """Returns what adds a model's adapters to its tensors, for `save_folder`; None without adapters. Collective."""
    if not has_adapters(models):
        return None
    adapters, scale = adapter_tensors(models, hf_config), lora_scale(options)
    return lambda tensors: merged(tensors, adapters, scale)


def save_adapters(
    models: Sequence[GPTModel], hf_config: PretrainedConfig, options: ModelConfig, target: Path, force: bool = False
) -> None:
    """Writes the adapters as a PEFT folder; collective, rank 0 writes.

    Raises:
        UserError: see `check_target`, or the disk is full.
    """
    tensors = {stored(name, hf_config): tensor for name, tensor in adapter_tensors(models, hf_config).items()}
    if dist.get_rank() != 0:
        return
    aside = folder_aside(target)
    try:
        restore(target)
        check_target("--save-hf", target, force, filling=True)
        shutil.rmtree(aside, ignore_errors=True)
        with new_file(aside / WEIGHTS, "wb") as file:  # not `save_file`, whose files have mode 0600
            file.write(serialize({name: tensors[name] for name in sorted(tensors)}, {"format": "pt"}))
        places = outer_model_type(hf_config) is not None
        text = json.dumps(_folder_config(options, tensors, places), indent=2, sort_keys=True)
        write_text(aside / CONFIG, text + "\n")
        put_in_place(aside, target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            "write-failed",
            f"--save-hf {target}: {error.strerror or error}; the checkpoint of the run is complete, export it "
            "elsewhere",
        ) from None


def _folder_config(options: ModelConfig, tensors: Iterable[str], places: bool) -> dict[str, Any]:
    """Returns adapter_config.json; PEFT has defaults for what is not in it.

    Args:
        places: whether projections are named by their places in the model, because others have these names too (an
            encoder of images).
    """
    modules = {name.removesuffix(A).removeprefix(PREFIX) for name in tensors if name.endswith(A)}
    names = {name.rpartition(".")[2] for name in modules}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": options.hf_path,
        "r": options.lora_rank,
        "lora_alpha": alpha_of(options),
        "use_rslora": options.use_rslora,
        "lora_dropout": options.lora_dropout or 0.0,  # an older run has none
        "bias": "none",
        "target_modules": sorted(modules) if places else [name for name in (*PROJECTIONS, *MIXTRALS) if name in names],
        "inference_mode": True,
    }
