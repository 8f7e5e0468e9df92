"""TRL's side: DPOTrainer on the same pairs, at its best documented settings or as shipped."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_solopo.benchmark.flops import flops_of
from megatron_solopo.benchmark.jobs import Job, ceiling, synchronize, write_inputs
from megatron_solopo.benchmark.training import resident_gib, result
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import loads
from megatron_solopo.parallel.platform import Platform

VERSION = "1.16.0"
ATTENTION = "sdpa"
NEEDS_GPU = (
    'attn_implementation="kernels-community/flash-attn2" or "flash_attention_2"; use_liger_kernel or the Hub\'s '
    'kernels (model_init_kwargs={"use_kernels": True}); bf16 in tensor cores; activation_offloading. padding_free is '
    "switched off in TRL 1.16 itself"
)
"""Settings of TRL's documentation that are faster and need a GPU."""


def check_installed(flag: str) -> None:
    """Checks that TRL can be imported.

    Raises:
        UserError: names the version to install.
    """
    if importlib.util.find_spec("trl") is None:
        raise UserError("package-missing", f"{flag}: the package trl is not installed; pip install trl=={VERSION}")


def arguments(
    folder: Path, pairs: int, steps: int, recompute: bool, as_shipped: bool = False, **more: Any
) -> dict[str, Any]:
    """Returns the arguments of `DPOConfig`.

    Args:
        pairs: of a step, one a forward pass.
        as_shipped: reference log-probs and recomputation by TRL's defaults.
        more: of the comparison, such as the dtype.
    """
    chosen = {} if as_shipped else dict(precompute_ref_log_probs=True, gradient_checkpointing=recompute)
    return dict(
        output_dir=str(folder),
        loss_type=["sigmoid"],
        beta=0.1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=pairs,
        max_steps=steps,
        max_length=None,
        learning_rate=1e-6,
        optim="adamw_torch_fused",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **chosen,
        **more,
    )


def trainer_of(
    hf_config: PretrainedConfig,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    options: Mapping[str, Any],
    dtype: torch.dtype,
    device: str,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Returns TRL's trainer of a model with random weights; reference log-probs are computed here if they are cached.

    Args:
        rows: with prompt, chosen and rejected, texts or conversations.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=ATTENTION)
    # Without a model DPOTrainer loads the reference from a folder, and random weights have none.
    reference = None if options.get("precompute_ref_log_probs") else deepcopy(model)
    return DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def clock_of(begin: Callable[[int], None], end: Callable[[], None]) -> Any:
    """Returns a callback: ``begin`` is called with the steps done when one begins, ``end`` when one ends."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begin(state.global_step)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            end()

    return Clock()


def measure(job: Job) -> dict[str, Any]:
    """Trains a case and returns its figures, see `training.result`. A step is timed from the end of the one before, so
    that data and log are part of it, as on the package's side."""
    check_installed("--against trl")
    import trl as package
    from transformers import AutoConfig, AutoTokenizer

    setting, case = job.setting, job.case
    write_inputs(job)
    torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    platform = Platform(device.type, device, "", lambda: None)  # not started: TRL runs without our patches
    hf_config, tokenizer = AutoConfig.from_pretrained(job.model), AutoTokenizer.from_pretrained(job.model)
    importlib.import_module("trl.trainer.dpo_trainer")
    at_start = resident_gib()
    ends = list[tuple[float, float]]()

    def begin(done: int) -> None:
        if done == 0:
            platform.reset_peak_memory()

    def end() -> None:
        synchronize(device.type)
        ends.append((time.perf_counter(), time.process_time()))

    options = arguments(
        Path(job.folder) / "trl", setting.pairs, job.warm + job.steps, case.recompute, case.as_shipped,
        bf16=setting.bf16, use_cpu=setting.device == "cpu",
    )  # fmt: skip
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    trainer = trainer_of(hf_config, rows_of(job), tokenizer, options, dtype, setting.device, [clock_of(begin, end)])
    trainer.train()
    peak = platform.peak_allocated_gib() or platform.peak_memory_gib() - at_start
    sequences = [
        len(row["prompt_ids"]) + len(row[f"{side}_ids"])
        for row in trainer.train_dataset
        for side in ("chosen", "rejected")
    ]
    # A response's last token predicts nothing.
    flops = flops_of(hf_config, [(length - 1, 0) for length in sequences], len(sequences) * setting.response)
    shown = {name: value for name, value in options.items() if name != "output_dir"}
    seconds, cpu = (differences(times[job.warm - 1 :]) for times in zip(*ends, strict=True))
    return result(
        job, seconds, cpu, peak, ceiling(setting.bf16, setting.device),
        tokens=sum(sequences) - len(sequences),
        flops=[flops.products, flops.attention],
        parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        phases=None,
        costs=[],
        options=f"TRL {package.__version__}, attn_implementation {ATTENTION}, {dtype}, {shown}",
    )  # fmt: skip


def rows_of(job: Job) -> list[dict[str, Any]]:
    """Returns the job's pairs on the long context in TRL's form, as conversations."""
    groups = [loads(line) for line in job.data.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "prompt": group["long_messages"],
            **{side: [{"role": "assistant", "content": group[side][0]}] for side in ("chosen", "rejected")},
        }
        for group in groups
    ]


def differences(times: Sequence[float]) -> list[float]:
    """Returns what is between each two neighbours."""
    return [later - earlier for earlier, later in itertools.pairwise(times)]
