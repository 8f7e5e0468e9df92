"""Which options a run would not read."""

from __future__ import annotations

from megatron_solopo.config import OWNER, Config, MethodConfig, flag, names_of
from megatron_solopo.lora_options import OF_FOLDER
from megatron_solopo.losses.registry import aligns_with_reference, has, loss_class, reads, those_that

PROFILE = ("use_pytorch_profiler", "profile_step_start", "profile_step_end", "profile_ranks")

EVALUATED = ("eval_interval", "eval_on_start", "save_best")

Rule = tuple[str, bool, str]
"""(option, whether the run reads it, what it needs)."""


def unused(config: Config) -> dict[str, str]:
    """Returns options that this run would not read, and what each needs."""
    model, training, output = config.model, config.training, config.output
    staged = config.parallel.pipeline_model_parallel_size > 1, "needs --pipeline-model-parallel-size above 1"
    overlapped = config.parallel.overlap_grad_reduce, "needs --overlap-grad-reduce"
    stops = output.exit_signal_handler or output.exit_duration_in_mins is not None
    evaluated = config.data.valid_data is not None or config.data.eval_generate is not None
    rules = [
        *_method_rules(config.method),
        ("recompute_method", model.recompute_granularity == "full", "needs --recompute-granularity full"),
        ("recompute_num_layers", model.recompute_granularity == "full", "needs --recompute-granularity full"),
        ("recompute_keep", model.recompute_granularity == "full", "needs --recompute-granularity full"),
        (
            "activation_offload",
            model.recompute_granularity == "full",
            "needs --recompute-granularity full (else layers keep more than a host link moves while they compute)",
        ),
        ("recompute_modules", model.recompute_granularity == "selective", "needs --recompute-granularity selective"),
        (
            "stretch_positions",
            config.method.objective == "sft" or config.method.context_mode != "short",
            "needs --context-mode solo or long, or --objective sft (short contexts keep their positions)",
        ),
        ("stretch_fraction", config.data.stretch_positions is not None, "needs --stretch-positions"),
        *((name, evaluated, "needs --valid-data or --eval-generate") for name in EVALUATED),
        ("eval_max_new_tokens", config.data.eval_generate is not None, "needs --eval-generate"),
        ("early_stop", output.save_best is not None, "needs --save-best"),
        (
            "sequence_parallel",
            config.parallel.tensor_model_parallel_size > 1,
            "needs --tensor-model-parallel-size above 1",
        ),
        (
            "attention_backend",
            model.bf16 and config.parallel.device != "cpu",
            "needs --bf16 and a CUDA device (float32 and the CPU have one kernel each)",
        ),
        ("fp8_format", model.transformer_impl == "transformer_engine", "needs --transformer-impl transformer_engine"),
        ("fp8_recipe", model.fp8_format is not None, "needs --fp8-format"),
        ("disable_parameter_transpose_cache", model.fp8_format is not None, "needs --fp8-format"),
        *(
            (name, model.transformer_impl == "transformer_engine", "needs --transformer-impl transformer_engine")
            for name in ("use_te_activation_func", "rope_fusion", "moe_permute_fusion")
        ),
        (
            "gradient_accumulation_fusion",
            model.bf16 and config.parallel.device != "cpu" and training.main_grads_dtype == "fp32",
            "needs --bf16, a CUDA device and --main-grads-dtype fp32 (elsewhere gradients are never fused)",
        ),
        ("cp_comm_type", config.parallel.context_parallel_size > 1, "needs --context-parallel-size above 1"),
        ("num_virtual_stages_per_pipeline_rank", *staged),
        ("decoder_first_pipeline_num_layers", *staged),
        ("decoder_last_pipeline_num_layers", *staged),
        ("overlap_param_gather", *overlapped),
        ("ddp_bucket_size", *overlapped),
        ("ckpt_step", output.load is not None, "needs --load"),
        (
            "override_opt_param_scheduler",
            output.load is not None or output.auto_resume,
            "needs --load or --auto-resume (a new run has no other schedule)",
        ),
        (
            "keep_last",
            output.save_interval > 0 or stops or output.save_best is not None,
            "needs --save-interval, --save-best, --exit-signal-handler or --exit-duration-in-mins (else there is one "
            "checkpoint)",
        ),
        ("save_retain_interval", output.save_interval > 0, "needs --save-interval"),
        ("async_save", output.save_interval > 0, "needs --save-interval (the last save is always waited for)"),
        *(
            (name, model.lora_rank is not None, "needs --lora-rank or --lora-path")
            for name in (*OF_FOLDER, "lora_dropout", "lora_export")
        ),
        ("lora_export", output.save_hf is not None, "needs --save-hf"),
        ("tensorboard_log_interval", output.tensorboard_dir is not None, "needs --tensorboard-dir"),
        ("tensorboard_queue_size", output.tensorboard_dir is not None, "needs --tensorboard-dir"),
        ("wandb_exp_name", output.wandb_project is not None, "needs --wandb-project"),
        ("wandb_save_dir", output.wandb_project is not None, "needs --wandb-project"),
        ("save_hf_interval", output.save_hf is not None, "needs --save-hf"),
        ("overwrite", config.output.save_hf is not None, "needs --save-hf"),
        *((name, output.profile, "needs --profile") for name in PROFILE),
        ("min_lr", training.lr_decay_style != "constant", "needs a --lr-decay-style that decays"),
        *(
            (name, training.use_precision_aware_optimizer, "needs --use-precision-aware-optimizer")
            for name in ("exp_avg_dtype", "exp_avg_sq_dtype", "store_param_remainders")
        ),
        (
            "store_param_remainders",
            not training.optimizer_cpu_offload or training.optimizer_offload_fraction < 1,
            "needs a part of the state on the device (on the host main parameters are in fp32)",
        ),
        ("optimizer_offload_fraction", training.optimizer_cpu_offload, "needs --optimizer-cpu-offload"),
        ("overlap_cpu_optimizer_d2h_h2d", training.optimizer_cpu_offload, "needs --optimizer-cpu-offload"),
    ]
    idle: dict[str, str] = {}
    for name, used, why in rules:
        if not used:
            idle.setdefault(name, why)
    return idle


NO_REFERENCE = ("reference", "none")


def _method_rules(method: MethodConfig) -> list[Rule]:
    """Rules of the method's options, from the declarations of the losses."""
    preference = method.objective == "preference"
    solo = preference and method.context_mode == "solo"
    loss = loss_class(method.preference_loss)
    added = method.sft_weight > 0 and "sft_weight" in loss.reads
    no_sft_weight = those_that(lambda kind: kind.holds_likelihood, "and")

    of_losses = [name for name in names_of("method") if OWNER[name].of_loss]
    instead = ", ".join(flag(name) for name in of_losses if has(name)(loss))

    def takes(option: str) -> str:
        return f"needs --preference-loss {those_that(reads(option))}"

    references = f"needs --preference-loss {those_that(lambda kind: kind.needs_reference)}"
    # Without a reference "none" is the truth.
    pairs = [name for name in names_of("method") if name != "objective" and (name, method.reference) != NO_REFERENCE]
    return [
        *((name, preference, "needs --objective preference") for name in pairs),
        *((name, has(name)(loss), f"needs --preference-loss {those_that(has(name))}") for name in of_losses),
        ("beta", reads("beta")(loss), takes("beta") + (f"; {method.preference_loss} has {instead}" if instead else "")),
        ("label_smoothing", reads("label_smoothing")(loss), takes("label_smoothing")),
        ("label_smoothing_form", method.label_smoothing > 0, "needs --label-smoothing above 0"),
        ("sft_weight", reads("sft_weight")(loss), f"{takes('sft_weight')} ({no_sft_weight} hold this term)"),
        (
            "sft_normalization",
            added or reads("sft_normalization")(loss),
            f"needs --sft-weight above 0, or --preference-loss {those_that(reads('sft_normalization'))}",
        ),
        (
            "alignment_huber_delta",
            solo and method.alignment_distance == "huber",
            "needs --context-mode solo and --alignment-distance huber",
        ),
        (
            "alignment_reference",
            solo and aligns_with_reference(loss),
            f"needs --context-mode solo and --preference-loss {those_that(aligns_with_reference)} (other rewards have "
            "no reference)",
        ),
        *((name, solo, "needs --context-mode solo") for name in names_of("method") if name.startswith("alignment_")),
        *(
            (name, loss.needs_reference, f"{references} (other losses have no reference)")
            for name in pairs
            if name in ("reference", "reference_cache")
        ),
        ("reference_cache", method.reference == "cached", "needs --reference cached"),
    ]
