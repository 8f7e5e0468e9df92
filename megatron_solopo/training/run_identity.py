"""What a run is: the options and data that its checkpoints record, and that may not change when it resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.config import OWNER, Config, OutputConfig, ParallelConfig, flag, names_of
from megatron_solopo.conversion.manifest import read_manifest
from megatron_solopo.data.tokenized.batches import Schedule
from megatron_solopo.data.tokenized.stretch import reference_is_stretched
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.fields import mathematics

type Progress = dict[str, Any]
"""A run's identity in its checkpoints: options by name, `MATHEMATICS`, `REFERENCE_WEIGHTS`, ``tokens`` (the data set's
fingerprint), ``steps``, ``total`` (examples of all steps) and, as read, ``iteration``."""

MATHEMATICS = "mathematics"
"""Key of a checkpoint's progress: `fields.mathematics` of the model."""

REFERENCE_WEIGHTS = "reference_weights"
"""Key of a checkpoint's progress, where the loss has a reference or adapters are trained: the `starting_weights`."""

SCHEDULE = frozenset({"lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "weight_decay"})
"""Options of Megatron's optimizer-parameter scheduler, besides the number of steps: part of a run's identity, unless
--override-opt-param-scheduler allows changes."""

IDENTITY = frozenset(
    SCHEDULE
    | {
        *("random_init", "bf16", "fp8_format", "fp8_recipe", "rope_scaling", "add_special_tokens"),
        *("lora_rank", "lora_alpha", "use_rslora", "lora_modules", "lora_dropout"),
        *("make_vocab_size_divisible_by", "shuffle", "global_batch_size", "seed"),
        *("stretch_positions", "stretch_fraction"),
        *("adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "moe_aux_loss_coeff"),
        *("exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype"),
    }
)
"""Options that are part of a run's identity, besides those of the method: see `identity`."""

DRAWS = frozenset({"reference"})
"""Options that are part of a run's identity where --stretch-positions changes what the reference scores: a cache has
one draw of the positions, a resident reference that of each epoch."""

LENGTH = frozenset({"train_iters", "train_epochs"})
"""Options that are compared by the resulting steps and examples."""

EXAMPLES = frozenset(
    {
        *("train_data", "chat_template", "chat_template_kwargs", "chat_template_date", "eos_token"),
        *("seq_length", "overlong"),
    }
)
"""Options that are compared by the resulting token ids."""

START = frozenset({"hf_path", "lora_path"})
"""Options that are compared by the layers of config.json, and where the loss has a reference by the weight files."""

FREE = frozenset(
    {
        *(spec.name for section in (ParallelConfig, OutputConfig) for spec in dataclasses.fields(section)),
        # How a step is computed.
        *("transformer_impl", "attention_backend", "logprob_chunk_size", "recompute_granularity", "recompute_method"),
        *("recompute_modules", "recompute_keep", "activation_offload"),
        *("disable_parameter_transpose_cache", "use_te_activation_func", "rope_fusion", "moe_permute_fusion"),
        *("use_precision_aware_optimizer", "store_param_remainders", "optimizer_cpu_offload"),
        *("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"),
        *("gradient_accumulation_fusion", "mlp_tiles"),
        "deterministic_mode",
        *("recompute_num_layers", "share_prompts", "micro_batch_size", "max_tokens_per_rank"),
        *("reference", "reference_cache"),
        "data_cache",
        # Validation, monitoring, and the handling of a failed step.
        *("valid_data", "eval_interval", "eval_on_start", "on_nonfinite", "spike_factor"),
        *("eval_generate", "eval_max_new_tokens", "early_stop"),
        "override_opt_param_scheduler",
    }
)
"""Options that may change when a run resumes. Each option is in one of these sets, or one of the method."""


def identity() -> frozenset[str]:
    """Returns the options of a run's identity: saved in every checkpoint, and refused by name where they change. All
    options of the method are among them, with those of each loss."""
    return IDENTITY | (frozenset(names_of("method")) - FREE)


def read_progress(source: Path) -> Progress:
    """Reads ``progress`` and ``iteration`` of a complete checkpoint, without its tensors.

    Raises:
        UserError: it is a Megatron folder of convert-checkpoint.
    """
    document = read_manifest(source)
    if not document["progress"]:
        raise UserError(
            "checkpoint-weights-only",
            f"{source}: holds weights only, and no run to resume; start a new run with --hf-path {source.parent}",
        )
    return document["progress"] | {"iteration": document["iteration"]}


def progress_of(schedule: Schedule, train: TokenDataset, config: Config, hf_config: PretrainedConfig) -> Progress:
    """Returns a run's identity, which determines the model, the order of the examples and each optimizer step."""
    return {
        MATHEMATICS: mathematics(hf_config),
        "tokens": train.fingerprint,
        "steps": schedule.steps,
        "total": schedule.total,
        **{name: config.value(name) for name in sorted(identity() | EXAMPLES | DRAWS)},
    }


def check_same_run(before: Progress, now: Progress, config: Config) -> None:
    """Refuses to resume as another run: with other examples, another order, method or schedule.

    Args:
        before: progress of the checkpoint; options that an earlier version did not save are not compared.
        now: progress of this start, see `progress_of`.

    Raises:
        UserError: names the first option that differs, and both values.
    """

    def changed(names: frozenset[str]) -> str | None:
        """Describes the first option that differs, with both values, and names the others, which may follow from it."""
        differ = [name for name in OWNER if name in names and name in before and before[name] != now[name]]
        if not differ:
            return None
        first, *others = differ
        also = f" (also {', '.join(map(flag, others))})" if others else ""
        return f"{flag(first)}: the checkpoint's run has {_shown(before[first])}, this one {_shown(now[first])}{also}"

    same = identity() - SCHEDULE | (DRAWS if reference_is_stretched(config) else frozenset())
    remedy = "keep it as before, or start a new run with another --save"
    override = config.training.override_opt_param_scheduler
    if differs := changed(same):
        raise UserError("checkpoint-other-run", f"{differs}; {remedy}")
    for name, value in now[MATHEMATICS].items():
        if (earlier := before.get(MATHEMATICS, {}).get(name, value)) != value:
            raise UserError(
                "checkpoint-other-run",
                f"--hf-path {config.model.hf_path}: its config.json has {name} {_shown(value)}, that of the "
                f"checkpoint's run {_shown(earlier)}; {remedy}",
            )
    if before["tokens"] != now["tokens"]:
        raise UserError(
            "checkpoint-other-data",
            f"{changed(EXAMPLES) or flag('train_data')}: the checkpoint was trained on other examples (data, tokenizer "
            f"or template changed); {remedy}",
        )
    if not override and (differs := changed(SCHEDULE)):
        raise UserError(
            "checkpoint-other-run", f"{differs}; {remedy}, or change it from now on with --override-opt-param-scheduler"
        )
    length = next(name for name in sorted(LENGTH) if config.value(name) is not None)
    option = f"{flag(length)} {config.value(length)}"
    steps = now["steps"]
    if override and steps < before["iteration"]:
        done = before["iteration"]
        raise UserError("steps-already-done", f"{option}: is {steps} steps, the checkpoint is of step {done}; raise it")
    if not override and before["steps"] != steps:
        raise UserError(
            "checkpoint-other-run",
            f"{option}: the checkpoint's run has {before['steps']} steps, this one {steps}; {remedy}, or extend the "
            f"run with --override-opt-param-scheduler (the learning rate then follows the schedule of {steps} steps)",
        )
    if not override and before.get("total", now["total"]) != now["total"]:
        raise UserError(
            "checkpoint-other-run",
            f"{option}: the steps of the checkpoint's run have {before['total']} examples, those of this one "
            f"{now['total']}; {remedy}",
        )


def _shown(value: object) -> str:
    return {None: "none", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else f"{value}"


def new_schedule(before: Progress, now: Progress, config: Config) -> str | None:
    """Describes in a line what --override-opt-param-scheduler changes of a resumed run; None where nothing changes."""
    changes = [
        f"{flag(name)} {before[name]} -> {now[name]}"
        for name in sorted(SCHEDULE)
        if name in before and before[name] != now[name]
    ]
    if before["steps"] != now["steps"]:
        changes.insert(0, f"{before['steps']} -> {now['steps']} steps")
    if not (config.training.override_opt_param_scheduler and changes):
        return None
    done = before["iteration"] * config.training.global_batch_size
    left_out = done - before.get("total", done)
    return (
        f"--override-opt-param-scheduler: {', '.join(changes)}; the learning rate follows the new schedule from step "
        f"{before['iteration'] + 1} on"
        + (f"; {left_out} examples that the short last step left out are not trained on later" if left_out > 0 else "")
    )


def check_reference(before: Progress, weights: str, config: Config) -> None:
    """Refuses to resume with another reference; checkpoints of earlier versions do not record theirs.

    Args:
        weights: see `starting_weights`.

    Raises:
        UserError: the folder of --hf-path has other files than when the run started.
    """
    if before.get(REFERENCE_WEIGHTS) not in (None, weights):
        raise UserError(
            "checkpoint-other-reference",
            f"--hf-path {config.model.hf_path}: its files are not those that the run started from, "
            f"{_role_of_weights(config)}; restore the folder, or start a new run",
        )


def _role_of_weights(config: Config) -> str:
    if config.model.lora_rank is not None:
        return "whose adapters it trained"
    return f"the reference of {config.method.preference_loss}"
