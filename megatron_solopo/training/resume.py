"""How a run starts: new, from a checkpoint of --load, or with --auto-resume from the latest one of --save."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_solopo.atomic import write_text
from megatron_solopo.config import OWNER, Config, OutputConfig, ParallelConfig, flag, names_of
from megatron_solopo.conversion.manifest import (
    find_checkpoint,
    latest_iteration,
    read_manifest,
    write_latest,
)
from megatron_solopo.conversion.places import check_apart, check_target, holds_model, named_folder
from megatron_solopo.data.tokenized.batches import Schedule
from megatron_solopo.data.tokenized.stretch import reference_is_stretched
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.fields import mathematics
from megatron_solopo.parallel.platform import agreed
from megatron_solopo.training.reference import cache_folder, has_cache, shared

type Progress = dict[str, Any]
"""A run's identity in its checkpoints: options by name, `MATHEMATICS`, `REFERENCE_WEIGHTS`, ``tokens`` (the data set's
fingerprint), ``steps``, ``total`` (examples of all steps) and, as read, ``iteration``."""

EXPORT = "export.json"
"""The file of a run folder that records what --save-hf holds, or is about to hold."""

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


def check_shared_folder(folder: Path, patience: float = 5.0) -> None:
    """Refuses a run folder that a rank does not share with rank 0, because all ranks write into one checkpoint;
    collective, where there are processes.

    Args:
        patience: seconds to wait; a network file system may show a new file late.

    Raises:
        UserError: names the rank and its machine.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    probe, added = shared(lambda: _probe(folder), "folders")

    def look() -> None:
        start = time.monotonic()
        while probe and not (folder / probe).exists():
            if time.monotonic() - start > patience:
                raise UserError(
                    "folder-not-shared",
                    f"--save {folder}: is not rank 0's folder there, and all ranks write into one checkpoint; use a "
                    "folder on a disk that all nodes share",
                )
            time.sleep(0.1)

    try:
        agreed(look, "folders")
    finally:
        # No rank continues before: one that looks at the folder meanwhile sees it disappear.
        shared(lambda: _remove_probe(folder, probe, added), "folders")


def _probe(folder: Path) -> tuple[str | None, list[Path]]:
    """Returns the name of a new file in a folder, and the folders created for it; (None, []) where it cannot be
    written, which other checks report."""
    added = [path for path in (folder, *folder.parents) if not path.exists()]
    name = f".shared-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError:
        return None, []
    return name, added


def _remove_probe(folder: Path, probe: str | None, added: list[Path]) -> None:
    if probe:
        with contextlib.suppress(OSError):
            (folder / probe).unlink()
            for path in added:
                path.rmdir()


APART = (
    "save",
    "load",
    "hf_path",
    "chat_template",
    "train_data",
    "valid_data",
    "eval_generate",
    "tensorboard_dir",
    "wandb_save_dir",
)
"""Options with paths that --save-hf must not replace."""


def check_folders(config: Config) -> None:
    """Refuses to overwrite an earlier run or an exported model before any work is done.

    Raises:
        UserError: a folder is in use, missing or not a folder.
    """
    output = config.output
    save, load = Path(output.save), output.load
    if save.exists() and not save.is_dir():
        raise UserError("not-a-folder", f"--save {save}: is not a folder; choose another name")
    has_checkpoint = latest_iteration(save) is not None
    if load is None and has_checkpoint and not output.auto_resume:
        raise UserError(
            "run-exists",
            f"--save {save}: holds checkpoints of an earlier run; resume it with --load {save} or --auto-resume, "
            "or choose another folder",
        )
    if load is not None and not _same_folder(load, save) and has_checkpoint:
        raise UserError(
            "run-exists",
            f"--save {save}: holds checkpoints of another run than --load {load}; "
            f"resume with --save {load}, or choose an empty folder",
        )
    if load is not None and not Path(load).is_dir():
        raise UserError("folder-missing", f"--load {load}: no such folder; leave --load out to start a new run")
    if load is not None and output.ckpt_step is None and latest_iteration(load) is None:
        find_checkpoint(load, None)
    if output.save_hf is not None:
        target = named_folder(flag("save_hf"), output.save_hf)
        others = {flag(name): config.value(name) for name in APART}
        if has_cache(config.method):
            others[flag("reference_cache")] = cache_folder(config)
        check_apart(flag("save_hf"), target, others, run=save)
        if not (output.auto_resume and has_checkpoint):
            # With --auto-resume the run may have exported, and been killed before its first checkpoint.
            resumes = output.auto_resume or (load is not None and _same_folder(load, save))
            check_target(flag("save_hf"), target, output.overwrite, filling=resumes and output.save_hf_interval > 0)


def find_start(config: Config) -> Path | None:
    """Returns the checkpoint to resume from, after its files were checked, or None for a new run.

    Raises:
        UserError: see `find_checkpoint`.
    """
    output = config.output
    if output.load is not None:
        return find_checkpoint(output.load, output.ckpt_step)
    if output.auto_resume and latest_iteration(output.save) is not None:
        return find_checkpoint(output.save, None, "--save")
    return None


def nothing_left(config: Config, resumed: int, steps: int) -> bool:
    """Whether an earlier start of the same command did all its work.

    Raises:
        UserError: --save-hf holds a model of another run.
    """
    output = config.output
    if not (output.auto_resume and resumed):
        return False
    if not output.save_hf:
        return resumed == steps
    state = _noted_export(config)
    exported = state == _noted(config, steps, complete=True) and holds_model(Path(output.save_hf))
    if exported and resumed == steps:
        return True
    if resumed == steps and state is None and not output.overwrite and holds_model(Path(output.save_hf)):
        raise UserError(
            "folder-exists",
            f"--save-hf {output.save_hf}: exists already, and {Path(output.save) / EXPORT} does not record it as this "
            "run's export; choose another folder, or overwrite it with --overwrite",
        )
    check_target(flag("save_hf"), Path(output.save_hf), output.overwrite or state is not None, filling=True)
    return False


def export_folder(config: Config) -> Path:
    """Returns --save-hf of a run that has it."""
    assert config.output.save_hf is not None
    return Path(config.output.save_hf)


def begin_export(config: Config, steps: int) -> None:
    """Records in the run folder that --save-hf is about to be this run's model, so that a start after a kill can
    distinguish it from an older model there.

    Raises:
        UserError: --save-hf holds another run's model.
    """
    of_this_run = _noted_export(config) is not None
    check_target(flag("save_hf"), export_folder(config), config.output.overwrite or of_this_run, filling=True)
    write_text(Path(config.output.save) / EXPORT, json.dumps(_noted(config, steps, complete=False)) + "\n")


def export_is_complete(config: Config, steps: int) -> None:
    """Records that --save-hf is the model of the run's last step."""
    write_text(Path(config.output.save) / EXPORT, json.dumps(_noted(config, steps, complete=True)) + "\n")


def forget_export(config: Config) -> None:
    """Deletes the record of an export, which is not the model that this start will train."""
    (Path(config.output.save) / EXPORT).unlink(missing_ok=True)


def _noted(config: Config, steps: int, complete: bool) -> dict[str, str | int]:
    return {"save_hf": str(export_folder(config).resolve()), "step": steps, "complete": complete}


def _noted_export(config: Config) -> dict[str, str | int] | None:
    """Returns the record of --save-hf, or None where there is none or it is of another folder."""
    try:
        note = json.loads((Path(config.output.save) / EXPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    of_folder = isinstance(note, dict) and note.get("save_hf") == _noted(config, 0, complete=False)["save_hf"]
    return note if of_folder else None


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


def go_back(config: Config) -> None:
    """Removes what the run folder records beyond the checkpoint that this start resumes from."""
    output = config.output
    if output.load is None:
        return  # --auto-resume resumes from the latest
    if not _same_folder(output.load, output.save):
        forget_export(config)  # of a run whose checkpoints are gone
    elif output.ckpt_step is not None:
        forget_export(config)
        write_latest(Path(output.save), output.ckpt_step)


def _same_folder(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()
