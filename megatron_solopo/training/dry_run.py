"""Describes what a run would do, without doing it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from transformers import PretrainedConfig

from megatron_solopo.config import Config, OutputConfig, ParallelConfig
from megatron_solopo.conversion.manifest import LATEST, MANIFEST, checkpoint_folder
from megatron_solopo.data.tokenized.batches import above_the_token_limit
from megatron_solopo.losses.solopo import policy_scores, reference_scores
from megatron_solopo.model.families.fields import attention_window, windowed_layers
from megatron_solopo.model.hf_config import padded_vocab_size
from megatron_solopo.model.rope import reach, rope_of
from megatron_solopo.pack import names_of_scored
from megatron_solopo.parallel.context import method_of
from megatron_solopo.parallel.platform import resolve
from megatron_solopo.parallel.topology import (
    data_parallel_size,
    expert_place,
    layers_of_stage,
    place_of,
    world_size,
)
from megatron_solopo.training.answers import answers_file
from megatron_solopo.training.best import FILE as BEST
from megatron_solopo.training.parameters import describe_parameters, parameter_count
from megatron_solopo.training.preflight import Preflight, RunData, preflight
from megatron_solopo.training.reference import cache_folder, has_cache
from megatron_solopo.training.run_identity import new_schedule


def describe(config: Config, memory: Callable[[Preflight, str], list[str]] | None = None) -> str:
    """Describes the resolved configuration, ranks, parameters, steps and files of a run; writes nothing.

    Args:
        memory: makes the lines about its memory, of what was checked and the device (``cuda`` or ``cpu``).

    Raises:
        UserError: the run would be refused before its first step.
    """
    plan = preflight(config, dry_run=True)
    device, processes = resolve(config.parallel.device), world_size()
    unfit = plan.inputs.unfit
    sections = {
        "resolved configuration": [yaml.safe_dump(config.as_dict(), sort_keys=False).rstrip()],
        f"ranks ({processes} process{'es' if processes > 1 else ''} on {device})": [
            *_rank_table(config.parallel, plan.inputs.hf_config.num_hidden_layers, processes),
            *([f"warning: this machine cannot run it: {unfit}"] if unfit else []),
            *(
                ["torch sees no GPU here; --device cuda describes the run of GPUs"]
                if config.parallel.device != device == "cpu"
                else []
            ),
        ],
        "model": _model(plan.inputs.hf_config, config),
        "data": _data(plan.inputs.data, config, device),
        "steps": _steps(plan, config),
        **({"memory": memory(plan, device)} if memory is not None and not plan.nothing_left else {}),
        "files": _files(plan.inputs.schedule.steps, config),
    }
    return "\n\n".join("\n".join([f"# {title}", *lines]) for title, lines in sections.items())


def _model(hf_config: PretrainedConfig, config: Config) -> list[str]:
    counts, window = parameter_count(hf_config), attention_window(hf_config)
    windowed, rope = windowed_layers(hf_config), rope_of(hf_config)
    padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
    return [
        f"{hf_config.model_type}: {counts['total']:,} parameters ({counts['embedding']:,} in the embedding), "
        f"vocabulary {hf_config.vocab_size:,} padded to {padded:,}",
        describe_parameters(hf_config, config.model),
        f"positions: {reach(hf_config.max_position_embeddings, rope):,} (RoPE {rope['rope_type']})"
        + (f", sliding window {window:,} in {sum(windowed)} of {len(windowed)} layers" if window else ""),
    ]


def _data(data: RunData, config: Config, device: str) -> list[str]:
    train, valid = data.train, data.valid
    tokens = sum(group.tokens(config.data.share_prompts) for group in train.groups)
    separate = sum(group.separate_tokens() for group in train.groups)
    crowded = [
        (split, above_the_token_limit(dataset.groups, config, device))
        for split, dataset in (("train", train), ("valid", valid))
        if dataset is not None
    ]
    return [
        f"train: {len(train.groups):,} examples, {tokens:,} tokens a pass "
        f"({tokens / separate:.2f} of laying every prompt out for each response), "
        f"longest {max(group.longest for group in train.groups):,}, dropped {len(train.dropped)}, "
        f"cut {len(train.report.cut)}",
        *([f"positions: {train.stretch}"] if train.stretch else []),
        *([f"valid: {len(valid.groups):,} examples, dropped {len(valid.dropped)}"] if valid else []),
        *([f"held out: {len(data.held_out.prompts):,} prompts to answer"] if data.held_out else []),
        *(f"warning: {split}: {above}" for split, above in crowded if above),
        f"scored responses: {names_of_scored(policy_scores(config.method))}"
        + (f"; by the reference: {names_of_scored(reference_scores(config.method))}" if data.reference else ""),
    ]


def _steps(plan: Preflight, config: Config) -> list[str]:
    schedule = plan.inputs.schedule
    changed = new_schedule(plan.before, plan.progress, config) if plan.source else None
    return [
        f"{schedule.steps} steps of {schedule.global_batch_size} examples, {schedule.total:,} in all "
        f"({schedule.total / schedule.examples:.2f} epochs)",
        *([f"resumes after step {plan.resumed}, from {plan.source}"] if plan.source and not plan.nothing_left else []),
        *([changed] if changed else []),
        *([plan.budget] if plan.budget else []),
        *([f"all are done and saved in {config.output.save}; nothing is left"] if plan.nothing_left else []),
    ]


def _files(steps: int, config: Config) -> list[str]:
    output = config.output
    lines = [
        f"{output.save}/metrics.jsonl, config.yaml, versions.yaml",
        f"{checkpoint_folder(output.save, steps)}/ ({MANIFEST} last) and {output.save}/{LATEST}"
        + (f" (also every {output.save_interval} steps)" if output.save_interval else "")
        + _kept(output),
    ]
    if config.data.eval_generate is not None:
        lines.append(f"{answers_file(Path(output.save), steps).parent}/: answers to the held-out questions, by step")
    if output.save_best is not None:
        lines.append(f"{output.save}/{BEST}: the step with the best {output.save_best}, whose checkpoint is kept")
    if has_cache(config.method):
        lines.append(f"{cache_folder(config)}/: reference log-probs")
    if output.wandb_project:
        lines.append(f"{output.wandb_save_dir or output.save}/wandb/: Weights & Biases, project {output.wandb_project}")
    if output.tensorboard_dir:
        lines.append(f"{output.tensorboard_dir}/: TensorBoard events")
    if output.save_hf:
        lines.append(f"{output.save_hf}/: the trained model in Hugging Face format")
    if output.save_hf and output.save_hf_interval:
        lines.append(
            f"{checkpoint_folder(output.save_hf, output.save_hf_interval)}/ and so on, every {output.save_hf_interval} "
            "steps: the model so far in Hugging Face format"
        )
    return lines


def _kept(output: OutputConfig) -> str:
    """Describes which checkpoints are kept, where not all are."""
    if output.keep_last is None and output.save_retain_interval is None:
        return ""
    retained = f" and multiples of {output.save_retain_interval}" if output.save_retain_interval else ""
    return f"; the last {output.keep_last or 1}{retained} are kept"


def _rank_table(parallel: ParallelConfig, num_layers: int, processes: int) -> list[str]:
    """Returns one line for each rank; long tables are cut in the middle, where they only repeat."""
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    method = method_of(context, parallel.cp_comm_type)
    replicas = data_parallel_size(parallel, processes)
    lines = []
    for rank in range(processes):
        place = place_of(rank, parallel, processes)
        layers = layers_of_stage(place.pipeline, num_layers, parallel)
        part = (
            "the whole model"
            if tensor * stages == 1
            else " of ".join(
                [
                    *([f"1/{tensor} of each matrix"] if tensor > 1 else []),
                    *([f"stage {place.pipeline} ({_named(layers)})"] if stages > 1 else []),
                ]
            )
        )
        experts = parallel.expert_model_parallel_size
        if experts > 1:
            part += f", part {expert_place(rank, parallel) + 1} of {experts} of the experts"
        share = f", 1/{replicas} of each step's examples" if replicas > 1 else ""
        if context > 1:
            share += f", {method.share(place.context, context)}"
        lines.append(
            f"{rank:>4}  {place.tensor:>6}  {place.context:>7}  {place.pipeline:>8}  {place.data:>4}   {part}{share}"
        )
    if len(lines) > 64:
        lines = [*lines[:32], f"      ... {len(lines) - 64} more", *lines[-32:]]
    return ["rank  tensor  context  pipeline  data   role", *lines]


def _named(layers: list[range]) -> str:
    """``[range(0, 2), range(4, 5)]`` -> ``layers 0-1, 4``."""
    spans = [f"{chunk.start}-{chunk.stop - 1}" if len(chunk) > 1 else str(chunk.start) for chunk in layers]
    return ("layers " if len(spans) > 1 or len(layers[0]) > 1 else "layer ") + ", ".join(spans)
