"""Which options contradict each other, and which would have no effect."""

from __future__ import annotations

from pathlib import Path

from megatron_solopo.config import Config, MethodConfig, ModelConfig, OutputConfig, flag
from megatron_solopo.config_unused import unused
from megatron_solopo.errors import UserError, nearest, require
from megatron_solopo.lora_options import modules_of
from megatron_solopo.losses.registry import (
    loss_class,
    preference_loss,
    those_that,
)
from megatron_solopo.parallel.context import method_of


def check(config: Config) -> None:
    """Raises UserError for the first option that is missing, contradictory or without effect."""
    _check_required(config)
    _check_method(config)
    _check_implementation(config)
    _check_lora(config)
    _check_unused(config)
    _check_loss_options(config.method)
    _check_parallel(config)
    _check_training(config)
    _check_stretch(config)
    _check_output(config)


def _check_required(config: Config) -> None:
    for name, value, what in (
        ("hf_path", config.model.hf_path, "the Hugging Face folder to start from"),
        (
            "train_data",
            config.data.train_data,
            "a file of training examples, or a folder of them or of tokenize-data",
        ),
        ("save", config.output.save, "the run folder"),
    ):
        if not value:
            raise UserError("option-missing", f"{flag(name)} is missing: set {what}")


def _check_method(config: Config) -> None:
    method = config.method
    if method.objective != "preference":
        if config.data.overlong == "cut":
            raise UserError(
                "option-conflict",
                "--overlong cut with --objective sft: conversations have no documents to cut; use --overlong drop",
            )
        return
    modes = loss_class(method.preference_loss).context_modes
    if method.context_mode not in modes:
        raise UserError(
            "option-conflict",
            f"--preference-loss {method.preference_loss} trains on the {' or '.join(modes)} context, not on "
            f"--context-mode {method.context_mode}; use --context-mode {modes[0]}",
        )
    if method.reference == "none" and loss_class(method.preference_loss).needs_reference:
        without = those_that(lambda kind: not kind.needs_reference)
        raise UserError(
            "option-conflict",
            f"--reference none with --preference-loss {method.preference_loss}: it compares with the starting weights; "
            f"use --reference cached or resident, or --preference-loss {without}",
        )
    if method.beta == 0:
        raise UserError(
            "option-value",
            f"--beta 0 with --preference-loss {method.preference_loss}: it scales every reward, so pairs would have no "
            "effect; set it above 0",
        )
    if method.label_smoothing >= 0.5:
        raise UserError(
            "option-value",
            f"--label-smoothing {method.label_smoothing}: must be below 0.5, where chosen and rejected are the same",
        )
    if method.pair_reduction == "plackett_luce":
        loss = method.preference_loss
        if not loss_class(loss).listwise:
            raise UserError(
                "option-conflict",
                f"--pair-reduction plackett_luce with --preference-loss {loss}, whose loss is one of pairs; use "
                f"{those_that(lambda kind: kind.listwise)}, or --pair-reduction mean",
            )
        if method.label_smoothing > 0:
            raise UserError(
                "option-conflict",
                "--label-smoothing with --pair-reduction plackett_luce: a list has no two labels to swap; use "
                "--pair-reduction mean",
            )
    if method.alignment_huber_delta == 0:
        raise UserError("option-value", "--alignment-huber-delta must be above 0")


def _check_loss_options(method: MethodConfig) -> None:
    """Refuses options that the loss itself rejects."""
    try:
        preference_loss(method)
    except ValueError as error:
        raise UserError("option-value", f"--preference-loss {method.preference_loss}: {error}") from None


def _check_implementation(config: Config) -> None:
    model, method = config.model, config.method
    engine = model.transformer_impl == "transformer_engine"
    if engine and not model.bf16:
        raise UserError(
            "option-conflict",
            "--transformer-impl transformer_engine needs --bf16: its attention kernels take 16 bits",
        )
    if engine and config.parallel.device == "cpu":
        raise UserError(
            "option-conflict",
            "--transformer-impl transformer_engine with --device cpu: it needs a CUDA device; use portable",
        )
    if config.training.deterministic_mode and model.attention_backend == "fused" and not engine:
        raise UserError(
            "option-conflict",
            "--deterministic-mode with --attention-backend fused: torch's cuDNN attention sums in no fixed order; "
            "use flash or auto",
        )
    if config.parallel.moe_token_dispatcher_type == "flex" and (not model.bf16 or config.parallel.device == "cpu"):
        raise UserError(
            "option-conflict",
            "--moe-token-dispatcher-type flex needs --bf16 and a CUDA device, which DeepEP's kernels are for; use "
            "alltoall",
        )
    method_of(config.parallel.context_parallel_size, config.parallel.cp_comm_type).check(config)
    _check_recompute(config)
    _check_tiles(model)
    compared = method.objective == "preference" and loss_class(method.preference_loss).needs_reference
    if model.fp8_format is not None and model.fp8_recipe == "delayed" and compared:
        without = those_that(lambda kind: not kind.needs_reference)
        raise UserError(
            "option-conflict",
            f"--fp8-recipe delayed with {method.preference_loss}: it scales by earlier batches, and the reference is "
            f"computed before the first one; use tensorwise, or {without}",
        )


RECOMPUTED = ("core_attn", "layernorm", "mlp", "mlp_act", "moe", "moe_act")
"""Values of --recompute-modules, which are Megatron's, but for mlp_act, the moe_act of layers without experts."""

NOT_RECOMPUTED = {
    "mla_up_proj": "no model here has multi-latent attention",
    "gdn_norm_out": "no model here has gated delta nets",
    "shared_experts": "no model here has shared experts",
}
"""Other values of Megatron's option, and why they are refused."""


def recomputed_modules(model: ModelConfig) -> tuple[str, ...]:
    """Returns the parts of --recompute-modules.

    Raises:
        UserError: a part is unknown, or no layer has it.
    """
    parts = tuple(part.strip() for part in (model.recompute_modules or "").split(",") if part.strip())
    for part in parts:
        if part not in RECOMPUTED:
            why = NOT_RECOMPUTED.get(part, f"{part!r} is not one of {', '.join(RECOMPUTED)}{nearest(part, RECOMPUTED)}")
            raise UserError("option-value", f"--recompute-modules {model.recompute_modules}: {why}")
    return parts


def _check_recompute(config: Config) -> None:
    model, parallel = config.model, config.parallel
    modules = recomputed_modules(model)
    engine = model.transformer_impl == "transformer_engine"
    if (
        model.recompute_keep
        and engine
        and method_of(parallel.context_parallel_size, parallel.cp_comm_type).kernels_of_layers
    ):
        raise UserError(
            "option-conflict",
            "--recompute-keep core_attn with --transformer-impl transformer_engine: its attention kernels are not "
            "torch's operators, whose results are kept; use portable, or leave it out",
        )
    if model.recompute_granularity == "selective" and not modules:
        raise UserError(
            "option-missing",
            f"--recompute-granularity selective needs --recompute-modules: {', '.join(RECOMPUTED)}, with commas",
        )
    for part in modules:
        if part == "moe_act" and not engine:
            raise UserError(
                "option-conflict",
                "--recompute-modules moe_act with --transformer-impl portable: products of its experts keep their "
                "input; use moe",
            )
        if part == "mlp_act" and engine:
            raise UserError(
                "option-conflict",
                "--recompute-modules mlp_act with --transformer-impl transformer_engine: its matrices keep their "
                "input; use mlp",
            )
        if part == "layernorm" and model.transformer_impl == "portable":
            raise UserError(
                "option-conflict",
                "--recompute-modules layernorm with --transformer-impl portable: megatron-core's needs "
                "Transformer Engine; leave it out",
            )
    if "mlp_act" in modules and (model.lora_rank is not None or "mlp" in modules):
        other = "--lora-rank, whose adapters keep the input of matrices" if model.lora_rank is not None else "mlp"
        raise UserError("option-unused", f"--recompute-modules mlp_act would have no effect with {other}; leave it out")
    if model.mlp_tiles is not None and {"mlp", "mlp_act"} & {*modules}:
        raise UserError(
            "option-unused",
            f"--recompute-modules {model.recompute_modules} with --mlp-tiles: tiles compute the MLP again already; "
            "leave one of them out",
        )
    if model.activation_offload and model.recompute_method == "block":
        raise UserError(
            "option-conflict",
            "--activation-offload with --recompute-method block: layers that are not recomputed keep more than a host "
            "link moves while they compute; use uniform",
        )
    scaled = [part for part in modules if part in ("layernorm", "moe_act")]
    if scaled and model.fp8_format is not None and model.fp8_recipe == "delayed":
        raise UserError(
            "option-conflict",
            f"--recompute-modules {scaled[0]} with --fp8-recipe delayed: Transformer Engine would scale what is "
            "recomputed by later batches; use another recipe",
        )


def _check_lora(config: Config) -> None:
    model = config.model
    if model.lora_rank is None:
        return
    modules_of(model)
    if model.lora_alpha == 0:
        raise UserError("option-value", "--lora-alpha 0: adapters would have no effect; set it above 0")
    if model.lora_dropout >= 1:
        raise UserError("option-value", f"--lora-dropout {model.lora_dropout}: must be below 1")
    if model.transformer_impl == "transformer_engine":
        raise UserError(
            "option-conflict",
            "--lora-rank with --transformer-impl transformer_engine: its matrices contain the norms before them, whose "
            "output adapters need; use portable",
        )
    if config.method.reference == "resident":
        raise UserError(
            "option-conflict",
            "--lora-rank with --reference resident: the reference is the frozen model; use cached",
        )
    if model.add_special_tokens is not None:
        raise UserError(
            "option-conflict",
            "--lora-rank with --add-special-tokens: the rows of new tokens would be frozen, and a PEFT folder does not "
            "hold them; leave the tokens out, or train all weights",
        )


def _check_tiles(model: ModelConfig) -> None:
    tiles = model.mlp_tiles
    if tiles is None:
        return
    if tiles != "auto" and not (tiles.isascii() and tiles.isdigit() and int(tiles) > 0):
        raise UserError("option-value", f"--mlp-tiles {tiles}: must be auto or a number from 1")
    if model.fp8_format is not None:
        raise UserError(
            "option-conflict",
            "--mlp-tiles with --fp8-format: Transformer Engine scales by whole tensors and keeps one FP8 copy of a "
            "weight for all tiles, whose transpose the forward pass of a tile does not make; leave one of them out",
        )
    if model.transformer_impl == "transformer_engine" and not model.gradient_accumulation_fusion:
        raise UserError(
            "option-conflict",
            "--mlp-tiles with --no-gradient-accumulation-fusion: Transformer Engine would round the gradient of each "
            "tile; leave one of them out",
        )


def _check_unused(config: Config) -> None:
    """Refuses options that the user set and that the run would not read."""
    for name, why in unused(config).items():
        if name in config.explicit:
            raise UserError("option-unused", f"{flag(name)} would have no effect: it {why}")


def _check_parallel(config: Config) -> None:
    if config.parallel.device == "cuda":
        check_on_cuda(config)


def check_on_cuda(config: Config) -> None:
    """Refuses options that only the CPU supports; called again once --device auto is resolved."""
    method_of(config.parallel.context_parallel_size, config.parallel.cp_comm_type).check_on_cuda(config)


def _check_training(config: Config) -> None:
    training = config.training
    if training.train_iters is None and training.train_epochs is None:
        raise UserError("option-missing", "--train-iters or --train-epochs: set one of them")
    if training.train_iters is not None and training.train_epochs is not None:
        raise UserError("option-conflict", "--train-iters and --train-epochs: set one of them, not both")
    if training.train_epochs is not None and training.train_epochs <= 0:
        raise UserError("option-value", f"--train-epochs must be above 0, found {training.train_epochs}")
    if training.lr <= 0:
        raise UserError("option-value", "--lr must be above 0")
    if training.min_lr > training.lr:
        raise UserError("option-conflict", f"--min-lr {training.min_lr} is above --lr {training.lr}; set it below")
    if training.lr_warmup_fraction >= 1:
        raise UserError("option-value", f"--lr-warmup-fraction {training.lr_warmup_fraction}: must be below 1")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(training, name) >= 1:
            raise UserError("option-value", f"{flag(name)} {getattr(training, name)}: must be below 1")
    if training.adam_eps == 0:
        raise UserError("option-value", "--adam-eps must be above 0: a weight without gradient would become 0 / 0")
    _check_optimizer(config)
    if training.seed >= 2**63:
        raise UserError("option-value", f"--seed {training.seed}: must be below 2^63")
    most, longest, ranks = training.max_tokens_per_rank, config.data.seq_length, config.parallel.context_parallel_size
    if isinstance(most, int) and most * ranks < longest:
        times = f" x --context-parallel-size {ranks}" if ranks > 1 else ""
        raise UserError(
            "option-conflict",
            f"--max-tokens-per-rank {most}{times} is below --seq-length {longest}: "
            "one example might not fit; raise it or lower --seq-length",
        )


def _check_stretch(config: Config) -> None:
    if config.data.stretch_fraction > 1:
        raise UserError(
            "option-value", f"--stretch-fraction {config.data.stretch_fraction}: is a share; set it from 0 to 1"
        )


def _check_optimizer(config: Config) -> None:
    training = config.training
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(training, name) and not config.model.bf16:
            raise UserError(
                "option-conflict", f"{flag(name)} needs --bf16: weights in float32 are their own main parameters"
            )
    if training.main_grads_dtype == "bf16" and not training.precision_aware:
        raise UserError(
            "option-conflict",
            "--main-grads-dtype bf16 needs --use-precision-aware-optimizer or --optimizer-cpu-offload: the plain "
            "optimizer would copy the sums into float32, which takes more memory than they save",
        )
    for moment, beta in (("exp_avg_dtype", "adam_beta1"), ("exp_avg_sq_dtype", "adam_beta2")):
        if getattr(training, moment) == "bf16" and getattr(training, beta) > 1 - 2**-8:
            raise UserError(
                "option-conflict",
                f"{flag(moment)} bf16 with {flag(beta)} {getattr(training, beta)}: a moment that decays by less than "
                f"{2**-8:.4f} of itself is rounded to what it was, and never falls; lower {flag(beta)}, or use fp32",
            )
    if not 0 < training.optimizer_offload_fraction <= 1:
        raise UserError(
            "option-value",
            f"--optimizer-offload-fraction {training.optimizer_offload_fraction}: must be above 0 and at most 1",
        )


def _check_output(config: Config) -> None:
    output = config.output
    if Path(output.save).resolve() == Path(config.model.hf_path).resolve():
        raise UserError(
            "folder-overlap",
            f"--save {output.save}: is --hf-path too, and a checkpoint there would pass for the weights to start from; "
            "choose another folder",
        )
    if output.auto_resume and output.load:
        raise UserError(
            "option-conflict",
            "--auto-resume resumes from --save, --load from another folder: set one of them"
            " (--load and --ckpt-step once to go back, --auto-resume afterwards)",
        )
    if output.wandb_project:
        require("--wandb-project", "wandb", "wandb")
    if output.tensorboard_dir:
        require("--tensorboard-dir", "tensorboard", "tensorboard")
    if output.exit_duration_in_mins == 0:
        raise UserError("option-value", "--exit-duration-in-mins must be above 0")
    if output.profile_step_start >= output.profile_step_end:
        raise UserError(
            "option-conflict",
            f"--profile-step-end {output.profile_step_end}: must be above --profile-step-start "
            f"{output.profile_step_start}",
        )
    profiled_ranks(output)
    retained, every = output.save_retain_interval, output.save_interval
    if retained and every and retained % every:
        raise UserError(
            "option-conflict", f"--save-retain-interval {retained}: must be a multiple of --save-interval {every}"
        )


def profiled_ranks(output: OutputConfig) -> set[int]:
    """Returns the ranks of --profile-ranks.

    Raises:
        UserError: a part is not a rank.
    """
    parts = [part.strip() for part in output.profile_ranks.split(",")]
    wrong = next((part for part in parts if not (part.isascii() and part.isdigit())), None)
    if wrong is not None:
        raise UserError(
            "option-value", f"--profile-ranks {output.profile_ranks}: {wrong!r} is no rank; use numbers such as 0,8"
        )
    return set(map(int, parts))
