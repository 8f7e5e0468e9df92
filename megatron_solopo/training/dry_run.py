"""What a run would do, without doing it."""

from __future__ import annotations

import os

import yaml

from megatron_solopo.config import Config
from megatron_solopo.data.batches import make_schedule
from megatron_solopo.losses.solopo import needs_reference, reference_roles, roles
from megatron_solopo.model.build import padded_vocab_size, parameter_count
from megatron_solopo.parallel.platform import choose
from megatron_solopo.training.checkpoint import LATEST, checkpoint_folder
from megatron_solopo.training.reference import cache_folder
from megatron_solopo.training.run import check_folders, check_model, check_vocabulary, load_data


def describe(config: Config) -> str:
    """The resolved configuration, ranks, parameters, steps and files of a run; nothing is written.

    Raises:
        UserError: whatever the run itself would refuse before its first step.
    """
    check_folders(config)
    device = choose(config.parallel.device)
    hf_config = check_model(config)
    data = load_data(config)
    check_vocabulary(data, hf_config.vocab_size)
    training, output = config.training, config.output
    schedule = make_schedule(
        len(data.train.groups),
        training.global_batch_size,
        training.train_iters,
        training.train_epochs,
        training.seed,
        config.data.shuffle,
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    counts = parameter_count(hf_config)
    padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
    tokens = sum(group.tokens(config.data.share_prompts) for group in data.train.groups)
    separate = sum(group.separate_tokens() for group in data.train.groups)
    lines = [
        "# resolved configuration",
        yaml.safe_dump(config.as_dict(), sort_keys=False).rstrip(),
        "",
        f"# ranks ({processes} process{'es' if processes > 1 else ''} on {device})",
        "rank  tensor  context  pipeline  data   role",
        *(
            f"{rank:>4}  {0:>6}  {0:>7}  {0:>8}  {rank:>4}   the whole model, 1/{processes} of each step's examples"
            for rank in range(processes)
        ),
        "",
        "# model",
        f"{hf_config.model_type}: {counts['total']:,} parameters ({counts['embedding']:,} in the embedding), "
        f"vocabulary {hf_config.vocab_size:,} padded to {padded:,}",
        "",
        "# data",
        f"train: {len(data.train.groups):,} examples, {tokens:,} tokens a pass ({tokens / separate:.2f} of laying every prompt out for each response), "
        f"longest {max(group.longest for group in data.train.groups):,}, dropped {len(data.train.dropped)}",
        *([f"valid: {len(data.valid.groups):,} examples, dropped {len(data.valid.dropped)}"] if data.valid else []),
        f"scored responses: {', '.join(roles(config.method))}"
        + (f"; by the reference: {', '.join(reference_roles(config.method))}" if data.reference else ""),
        "",
        "# steps",
        f"{schedule.steps} steps of {schedule.global_batch_size} examples, {schedule.total:,} in all ({schedule.total / schedule.examples:.2f} epochs)",
        "",
        "# files",
        f"{output.save}/metrics.jsonl, config.yaml, versions.yaml",
        f"{checkpoint_folder(output.save, schedule.steps)}/ and {output.save}/{LATEST}"
        + (f" (also every {output.save_interval} steps)" if output.save_interval else ""),
    ]
    if needs_reference(config.method):
        lines.append(f"{cache_folder(config)}/: reference log-probs")
    if output.tensorboard_dir:
        lines.append(f"{output.tensorboard_dir}/: TensorBoard events")
    if output.save_hf:
        lines.append(f"{output.save_hf}/: the trained model in Hugging Face format")
    return "\n".join(lines)
