"""Every option of a training run, once: its meaning, unit, default and section.

Names are Megatron's if Megatron has the option. `config_load` reads them. `config_checks` refuses contradictions,
options without effect, and missing options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from megatron_solopo.errors import UserError
from megatron_solopo.losses import registry
from megatron_solopo.losses.base import PreferenceLoss
from megatron_solopo.losses.registry import (
    LOSSES,
    aligns_with_reference,
    declared_options,
    defaults_in_words,
    reads,
    those_that,
)
from megatron_solopo.option import option
from megatron_solopo.parallel import context

AUTO = "auto"
"""Value of --max-tokens-per-rank until `planning.budget` resolves it at the start of a run."""


@dataclass
class ModelConfig:
    """The model: a Hugging Face folder, its precision, its implementation."""

    hf_path: str = option(None, "Hugging Face folder: config.json, tokenizer and (unless --random-init) weights")
    random_init: bool = option(
        False, "start from random weights, drawn by config.json and --seed, equal on every layout"
    )
    chat_template: str | None = option(None, "Jinja chat template to use instead of the tokenizer's")
    eos_token: str | None = option(
        None,
        "token that ends a turn, if it is not the one that the chat template writes there; the data commands need the "
        "same",
    )
    chat_template_kwargs: str | None = option(
        None,
        """JSON object of values for the chat template's variables, such as '{"enable_thinking": false}'; default: """
        "those of the folder's tokenizer_config.json; --save-hf writes them there",
        mapping=True,
    )
    chat_template_date: str | None = option(
        None,
        "YYYY-MM-DD: date in the prompts of a chat template that prints the date; default: that of the run that is "
        "resumed, of the token folder, of --hf-path or of the data, else today; --save-hf records it",
    )
    bf16: bool = option(False, "parameters and activations in bfloat16, optimizer and gradient sums in float32")
    rope_scaling: str | None = option(
        None,
        "TYPE:FACTOR:ORIGINAL, such as yarn:4:32768 or linear:2:4096: extend a model trained on ORIGINAL tokens to "
        "FACTOR times as many, in training and in --save-hf",
    )
    add_special_tokens: str | None = option(
        None,
        "TOKEN,TOKEN,...: special tokens to add, such as '<think>,</think>'; their rows start as the mean of the "
        "others', and --save-hf has them in weights and tokenizer",
    )
    lora_rank: int | None = option(
        None,
        "rank of LoRA's adapters; the model's own weights are frozen, without gradients and optimizer state; default: "
        "that of --lora-path, else all weights are trained",
        minimum=1,
    )
    lora_alpha: float | None = option(
        None, "LoRA's alpha: adapters are scaled by alpha / rank; default: --lora-rank, a scale of 1", minimum=0
    )
    use_rslora: bool = option(
        False, "rank-stabilised LoRA: adapters are scaled by alpha / sqrt(rank) (arXiv 2312.03732)"
    )
    lora_modules: str | None = option(
        None,
        "NAME,NAME,...: projections with adapters, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and "
        "down_proj, and of recurrent layers in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, in_proj_qkvz, in_proj_ba and "
        "out_proj; default: all that the model has, of one with experts those of attention (its experts have adapters "
        "where gate_proj,up_proj or down_proj are named)",
    )
    lora_dropout: float = option(
        0.0,
        "share of an adapter's inputs that are zeroed in training steps, below 1; drawn by --seed for each pack and "
        "projection",
        minimum=0,
    )
    lora_path: str | None = option(
        None, "PEFT folder (adapter_config.json, adapter_model.safetensors) of the adapters to start from"
    )
    transformer_impl: str = option(
        "portable",
        "portable: pure PyTorch, every platform; transformer_engine: Transformer Engine's layers and attention, needs "
        "CUDA and --bf16",
        ("portable", "transformer_engine"),
    )
    attention_backend: str = option(
        "auto",
        "attention kernels on CUDA; flash: flash attention; fused: cuDNN, in portable layers for prompts alone (their "
        "responses use flash); auto: fused, but in portable layers flash for prompts too where torch prefers it",
        ("auto", "fused", "flash"),
    )
    fp8_format: str | None = option(
        None,
        "matrix products of the layers in FP8 (not the output head's), e4m3: everywhere; hybrid: e4m3 forward, e5m2 "
        "for gradients",
        ("e4m3", "hybrid"),
    )
    fp8_recipe: str = option(
        "tensorwise",
        "how FP8 values are scaled; tensorwise: by the tensor's largest value; delayed: by those of earlier batches; "
        "blockwise: by blocks of 128 (Hopper); mxfp8: by blocks of 32 (Blackwell)",
        ("tensorwise", "delayed", "blockwise", "mxfp8"),
    )
    disable_parameter_transpose_cache: bool = option(
        False,
        "keep no FP8 copies of the weights (2 bytes each) between packs but quantize them in each forward pass; with "
        "--recompute-granularity full one layer has them at a time",
    )
    use_te_activation_func: bool = option(
        False, "SwiGLU by Transformer Engine's kernel; off: by this package's function of torch kernels"
    )
    rope_fusion: bool = option(True, "rotate queries and keys in Transformer Engine's layers by its kernel")
    moe_permute_fusion: bool = option(
        False, "order tokens by experts and back with Transformer Engine's kernels, in its layers"
    )
    gradient_accumulation_fusion: bool = option(
        True, "the product that computes a weight's gradient adds it to the float32 sum, on CUDA with --bf16"
    )
    mlp_tiles: str | None = option(
        None,
        "N or auto: compute the MLP of a layer in so many tiles of tokens, each again in backward: only a tile's gate, "
        "up and product exist, and a layer keeps the MLP's input alone; auto: tiles of as many tokens as the model is "
        "wide; default: the MLP at once, which keeps gate and up",
    )
    make_vocab_size_divisible_by: int = option(
        128, "the vocabulary is padded to a multiple of this; padding rows never count", minimum=1
    )
    logprob_chunk_size: int | None = option(
        None,
        "response tokens whose logits exist at one time; default: the power of two from 256 to 2,048 whose logits in "
        "float32 fit into 1 GiB, on the CPU into 512 MiB",
        minimum=1,
    )
    recompute_granularity: str | None = option(
        None,
        "what backward recomputes; full: layers, of which the inputs alone are kept; selective: --recompute-modules of "
        "every layer",
        ("full", "selective"),
    )
    recompute_modules: str | None = option(
        None,
        "MODULE,MODULE,...: parts of a layer that --recompute-granularity selective recomputes; core_attn: attention; "
        "mlp: the MLP; mlp_act: its activation; moe: router and experts; moe_act: the experts' activation; layernorm: "
        "norms, of Transformer Engine's layers with experts",
    )
    recompute_keep: str | None = option(
        None,
        "what --recompute-granularity full keeps besides the inputs of layers; core_attn: attention's output and "
        "log-sum-exps, so that its kernel is not computed again",
        ("core_attn",),
    )
    recompute_method: str = option(
        "uniform",
        "layers that --recompute-granularity full recomputes; uniform: all, in chunks; block: the first ones",
        ("uniform", "block"),
    )
    recompute_num_layers: int = option(
        1, "layers a recomputed chunk (uniform) or layers recomputed of a pipeline stage's chunk (block)", minimum=1
    )
    activation_offload: bool = option(
        False,
        "move what --recompute-granularity full keeps of layers to pinned host memory, and back before it is needed",
    )


@dataclass
class DataConfig:
    """The examples: preference groups, or conversations for --objective sft."""

    train_data: str = option(
        None,
        "preference groups, or conversations with --objective sft, in this project's or the hub's forms: JSONL, "
        "Parquet, a JSON array, CSV, a folder of these or of save_to_disk, hub:NAME[:CONFIG][:SPLIT], or a folder of "
        "tokenize-data",
    )
    valid_data: str | None = option(None, "data of evaluations during training, in the same forms as --train-data")
    eval_generate: str | None = option(
        None,
        "contexts file of prepare-data with held-out questions, which evaluations during training answer on their "
        "short and long contexts",
    )
    seq_length: int = option(8192, "largest length of a prompt plus response, in tokens", minimum=2)
    overlong: str = option(
        "refuse",
        "examples beyond --seq-length; refuse: the run; drop: leave them out and list them; cut: shorten their "
        "contexts by distractor text, list them, and drop what that cannot shorten enough",
        ("refuse", "drop", "cut"),
    )
    data_cache: str | None = option(
        None,
        "folder for the token ids of data files, which the first rank tokenizes at first use; default: $SOLOPO_CACHE, "
        "else megatron_solopo/ in $XDG_CACHE_HOME or ~/.cache",
    )
    share_prompts: bool = option(True, "compute a prompt once for all its responses")
    shuffle: bool = option(True, "train on the examples in a new order each epoch; off: in the file's order")
    stretch_positions: int | None = option(
        None,
        "LENGTH: in training, positions of long prompts (of conversations with --objective sft) jump at the boundaries "
        "of their documents by random gaps, so that a prompt with its response spans between its own length and LENGTH "
        "positions at the cost of its tokens; evaluation never stretches; the model must cover LENGTH",
        minimum=2,
    )
    stretch_fraction: float = option(
        1.0,
        "share of the examples that --stretch-positions stretches, each with this probability, at most 1; the others "
        "keep their positions",
        minimum=0,
    )


@dataclass
class MethodConfig:
    """The objective; docs/method.md has the formulas."""

    objective: str = option(
        "preference",
        "what is optimized; preference: a preference loss; sft: the negative log-likelihood of assistant messages",
        ("preference", "sft"),
    )
    preference_loss: str = option(
        "dpo",
        "preference loss and its reward, or module:CLASS for a user's loss (docs/method.md)",
        LOSSES,
    )
    context_mode: str = option(
        "solo",
        "solo: pairs on the short context, chosen aligned to the long; "
        "short, long: plain preference optimization there",
        ("solo", "short", "long"),
    )
    beta: float | None = option(
        None,
        f"reward scale; default {defaults_in_words('beta')}; ipo's margin aims at 1 / (2 beta) nats per token",
        minimum=0,
    )
    label_smoothing: float = option(
        0.0,
        f"probability that a pair's labels are swapped, below 0.5, for {those_that(reads('label_smoothing'), 'and')}",
        minimum=0,
    )
    label_smoothing_form: str = option(
        "conservative",
        "formula of --label-smoothing, with l(m) = -log sigmoid(m) and e the probability; conservative: "
        "(1 - e) l(m) + e l(-m), as TRL's CPO trainer; robust: ((1 - e) l(m) - e l(-m)) / (1 - 2 e), as "
        "TRL's DPO trainer's loss type robust",
        ("conservative", "robust"),
    )
    sft_weight: float = option(
        0.0,
        "weight of the chosen answer's negative log-likelihood, on the context of the preference loss (solo: short), "
        f"added to {those_that(reads('sft_weight'))}; TRL's rpo_alpha, cpo_alpha and loss type sft, RPO's alpha",
        minimum=0,
    )
    sft_normalization: str = option(
        "sequence",
        f"mean of the likelihood of --sft-weight and {those_that(reads('sft_normalization'))}; sequence: the mean "
        "over each answer's tokens, every group the same "
        "(RPO); token: the mean over the chosen tokens of the global batch (TRL)",
        ("sequence", "token"),
    )
    pair_reduction: str = option(
        "mean",
        "how a group with several chosen or rejected responses becomes one loss; mean: the mean over all pairs of a "
        "chosen and a rejected one; plackett_luce: each chosen one against all rejected ones at once, "
        "-log (e^r_w / (e^r_w + sum of e^r_l)), and the mean over the chosen ones, for "
        f"{those_that(lambda kind: kind.listwise, 'and')}",
        ("mean", "plackett_luce"),
    )
    alignment_weight: float | None = option(
        None,
        f"alpha, the weight of the short-to-long alignment; default {defaults_in_words('alignment_weight')}",
        minimum=0,
    )
    alignment_target: str = option("chosen", "which responses are aligned", ("chosen", "both"))
    alignment_distance: str = option(
        "l1",
        "distance of two rewards that differ by d; l1: |d|; l2: d^2; huber: d^2 / 2 up to --alignment-huber-delta, "
        "delta (|d| - delta / 2) beyond",
        ("l1", "l2", "huber"),
    )
    alignment_huber_delta: float = option(1.0, "difference beyond which huber is linear, in reward units", minimum=0)
    alignment_stop_short_gradient: bool = option(False, "the alignment has no gradient through the short reward")
    alignment_reference: str = option(
        "per_context",
        f"context of the reference log-prob in the long reward of {those_that(aligns_with_reference, 'and')}; "
        "per_context: the long one; short: the short one",
        ("per_context", "short"),
    )
    reference: str = option(
        "cached",
        "the reference of losses that compare with the starting weights; cached: its log-probs are computed once, "
        "before the first step, and kept on disk; resident: its weights stay on the host and score the groups of each "
        "step, for data that streams or changes; none: there is none",
        ("cached", "resident", "none"),
    )
    reference_cache: str | None = option(
        None, "folder of cached reference log-probs; default: reference/ beside the run folder"
    )
    loss_options: dict[str, Any] = field(default_factory=dict)
    """Options of the preference loss itself, which its class in losses/ declares."""


FP8_MULTIPLES = {"tensorwise": 16, "delayed": 16, "mxfp8": 32, "blockwise": 128}
"""--fp8-recipe -> what its kernels require: tokens of a process and widths of its matrices are multiples of this."""

MAX_SHARD_SIZE = "5GB"
"""Default of convert-checkpoint --max-shard-size: the largest weight file of a Hugging Face folder."""


@dataclass
class ParallelConfig:
    """Processes and devices."""

    device: str = option("auto", "device to compute on", ("auto", "cuda", "cpu"))
    tensor_model_parallel_size: int = option(1, "processes that share each layer", minimum=1)
    pipeline_model_parallel_size: int = option(1, "stages that the layers are spread over", minimum=1)
    num_virtual_stages_per_pipeline_rank: int = option(
        1, "model chunks a stage holds, whose layers interleave with the other stages' (a smaller bubble)", minimum=1
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "layers of the first stage; default: as many as every other", minimum=1
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "layers of the last stage; default: as many as every other", minimum=1
    )
    expert_model_parallel_size: int = option(
        1, "processes that the experts of a layer are spread over; each computes different examples", minimum=1
    )
    expert_tensor_parallel_size: int | None = option(
        None, "processes that share each expert; default: --tensor-model-parallel-size", minimum=1
    )
    moe_token_dispatcher_type: str = option(
        "alltoall",
        "how tokens reach their experts; alltoall: each goes to the processes of its experts; allgather: processes "
        "gather all tokens (they must share their packs, in one pipeline stage); flex: DeepEP's kernels, where its "
        "package deep_ep is installed",
        ("alltoall", "allgather", "flex"),
    )
    sequence_parallel: bool = option(
        False, "processes that share a layer also share its norms and residuals, by tokens"
    )
    context_parallel_size: int = option(1, "processes that share each sequence", minimum=1)
    cp_comm_type: str = option(
        context.DEFAULT,
        f"how processes that share a sequence exchange keys and values; {context.about()}",
        context.choices(),
    )
    overlap_grad_reduce: bool = option(False, "sum gradients over copies of the model during backward")
    overlap_param_gather: bool = option(False, "gather updated parameters during the next forward pass")
    ddp_bucket_size: int | None = option(
        None,
        "parameters of a bucket, the unit of overlapped communication; default: the larger of 40 million and "
        "1 million x copies of the model",
        minimum=1,
    )
    distributed_timeout_minutes: float = option(
        30.0, "how long a collective waits for a slow process, minutes", minimum=0.1
    )


@dataclass
class TrainingConfig:
    """Steps, batches, optimizer."""

    train_iters: int | None = option(None, "optimizer steps; either this or --train-epochs", minimum=1)
    train_epochs: float | None = option(None, "passes over the training examples", minimum=0)
    global_batch_size: int = option(32, "examples a step, over all processes", minimum=1)
    micro_batch_size: int = option(8, "most examples packed into one forward pass of a process", minimum=1)
    max_tokens_per_rank: int | str | None = option(
        None,
        "examples are packed together up to so many tokens of a process (a pack holds --context-parallel-size times as "
        "many); an example, with both contexts and all responses, is never split: a larger one is a separate pack, "
        "which the start reports; auto: the most that fits into memory by a rehearsal; default: no limit beyond "
        "--micro-batch-size",
        minimum=1,
        word=AUTO,
    )
    lr: float = option(1e-6, "peak learning rate", minimum=0)
    min_lr: float = option(0.0, "learning rate after the decay", minimum=0)
    lr_decay_style: str = option("cosine", "decay of the learning rate after warm-up", ("cosine", "linear", "constant"))
    lr_warmup_fraction: float = option(
        0.1, "fraction of the steps in which the learning rate rises linearly from 0", minimum=0
    )
    weight_decay: float = option(0.0, "decoupled weight decay; biases and norms are exempt", minimum=0)
    adam_beta1: float = option(0.9, "decay rate of Adam's first moment", minimum=0)
    adam_beta2: float = option(0.95, "decay rate of Adam's second moment", minimum=0)
    adam_eps: float = option(1e-8, "Adam's epsilon, added to the denominator", minimum=0)
    use_precision_aware_optimizer: bool = option(
        False,
        "Adam with a smaller state, of --bf16 weights: 6 instead of 12 bytes a parameter with moments in bf16; by "
        "Transformer Engine's kernel where that is installed; nothing is rounded stochastically",
    )
    exp_avg_dtype: str = option("fp32", "dtype of Adam's first moment between steps", ("fp32", "bf16"))
    exp_avg_sq_dtype: str = option("fp32", "dtype of Adam's second moment between steps", ("fp32", "bf16"))
    store_param_remainders: bool = option(
        True,
        "keep 16 bits beside each bf16 weight, 2 bytes, instead of its main parameter in fp32, 4 bytes; exact, but a "
        "weight as near to two values is rounded away from 0 instead of to the even one",
    )
    main_grads_dtype: str = option(
        "fp32",
        "dtype of the sums of gradients over packs and processes; bf16 halves them and rounds each addition to 8 bits, "
        "so small gradients of many packs are lost, and again where --clip-grad scales them",
        ("fp32", "bf16"),
    )
    optimizer_cpu_offload: bool = option(
        False,
        "Adam's main parameters and moments in host memory, 12 bytes a parameter, updated by the host's cores "
        "(OMP_NUM_THREADS of them); gradients and weights pass through pinned buffers",
    )
    optimizer_offload_fraction: float = option(
        1.0, "part of the optimizer's state that --optimizer-cpu-offload keeps on the host, at most 1", minimum=0
    )
    overlap_cpu_optimizer_d2h_h2d: bool = option(
        False, "copy gradients to the host and weights to the device while the host computes, on streams of their own"
    )
    moe_aux_loss_coeff: float = option(
        0.0,
        "weight of the loss that balances the experts' load, in each layer and micro-batch; preference training needs "
        "none",
        minimum=0,
    )
    clip_grad: float = option(1.0, "largest global gradient norm; 0 switches clipping off", minimum=0)
    on_nonfinite: str = option(
        "stop",
        "action at a step whose loss or gradient is not finite; stop: end the run; skip: skip and count it",
        ("stop", "skip"),
    )
    spike_factor: float = option(
        10.0, "warn of a loss or gradient norm above this many times its usual value; 0: never", minimum=0
    )
    override_opt_param_scheduler: bool = option(
        False,
        "when resuming, read steps, learning rate, its warm-up and decay, and weight decay from these options "
        "instead of the checkpoint; extends a finished run by a larger --train-iters or --train-epochs",
    )
    deterministic_mode: bool = option(
        False,
        "sums in a fixed order on CUDA, by slower kernels: the same run gives the same bits, resumed or not; the CPU's "
        "are always in order",
    )
    seed: int = option(1234, "random seed of the order of the examples and of --random-init", minimum=0)
    eval_interval: int = option(
        0,
        "steps between evaluations on --valid-data and --eval-generate; 0: only before the first step and after the "
        "last",
        minimum=0,
    )
    eval_on_start: bool = option(True, "evaluate before the first step too, so that a run shows what it changed")
    eval_max_new_tokens: int = option(64, "an answer of --eval-generate is cut after so many tokens", minimum=1)
    early_stop: int | None = option(
        None, "end the run after so many evaluations in a row without a better --save-best", minimum=1
    )

    @property
    def precision_aware(self) -> bool:
        """Whether `training.adam` has the main parameters, and not megatron-core's distributed optimizer."""
        return self.use_precision_aware_optimizer or self.optimizer_cpu_offload


@dataclass
class OutputConfig:
    """The run folder and what goes into it."""

    save: str = option(None, "run folder: checkpoints, metrics.jsonl, config.yaml")
    load: str | None = option(None, "run folder from whose last checkpoint to resume")
    ckpt_step: int | None = option(None, "iteration of --load to resume from; default: the latest", minimum=1)
    auto_resume: bool = option(
        False, "resume from --save if it holds a checkpoint, else start a new run; for commands that are repeated"
    )
    save_interval: int = option(0, "steps between checkpoints; 0: only after the last step", minimum=0)
    keep_last: int | None = option(
        None, "complete checkpoints to keep; older ones are deleted once a new one is complete", minimum=1
    )
    save_best: str | None = option(
        None,
        "metric of evaluations, such as accuracy or sub_em_long: the checkpoint of its best step is saved too and "
        "always kept, and best.json of the run folder names it",
    )
    save_retain_interval: int | None = option(
        None, "checkpoints at multiples of this are kept; without --keep-last only the last other one is", minimum=1
    )
    async_save: bool = option(False, "train on while another process writes the checkpoint")
    exit_signal_handler: bool = option(False, "on SIGTERM or SIGUSR1 finish the step, save, and exit with 0")
    exit_duration_in_mins: float | None = option(
        None, "after so many minutes finish the step, save, and exit with 0", minimum=0
    )
    save_hf: str | None = option(None, "folder for the trained model in Hugging Face format")
    save_hf_interval: int = option(
        0, "steps between Hugging Face folders iter_0000100 and so on inside --save-hf; 0: none", minimum=0
    )
    lora_export: str = option(
        "merged",
        "what --save-hf holds after LoRA; merged: the model, with the adapters added to its matrices; adapter: the "
        "adapters alone, as a PEFT folder",
        ("merged", "adapter"),
    )
    overwrite: bool = option(False, "overwrite an existing --save-hf folder")
    tensorboard_dir: str | None = option(None, "write TensorBoard events there")
    tensorboard_log_interval: int = option(1, "steps between those written to TensorBoard", minimum=1)
    tensorboard_queue_size: int = option(
        1000, "values that TensorBoard's writer holds before it writes them; it writes every two minutes too", minimum=1
    )
    wandb_project: str | None = option(None, "log to this Weights & Biases project (WANDB_MODE=offline: to files)")
    wandb_exp_name: str | None = option(None, "name of the Weights & Biases run; default: the run folder's name")
    wandb_save_dir: str | None = option(None, "folder for Weights & Biases' files; default: the run folder")
    log_interval: int = option(10, "steps between printed lines where no progress bar is shown", minimum=1)
    profile: bool = option(
        False,
        "profile some steps; on CUDA start and stop the CUDA profiler, for nsys profile --capture-range "
        "cudaProfilerApi; on the CPU as --use-pytorch-profiler",
    )
    use_pytorch_profiler: bool = option(False, "write traces of torch's profiler into profile/ of the run folder")
    profile_step_start: int = option(10, "steps before the first profiled one", minimum=0)
    profile_step_end: int = option(12, "the last profiled step", minimum=1)
    profile_ranks: str = option("0", "RANK,RANK,...: the processes that are profiled")
    nvtx: bool = option(
        False, "name data, forward, head, backward, reduce and optimizer of each step in profiles, on CUDA by NVTX"
    )


@dataclass
class Config:
    """A resolved run: the options of ``solopo train``, by section.

    Make one with `load` or `from_options`, which check it.

    Attributes:
        explicit: names of the options that somebody set, in the file, on the command line or in Python.
        groups: the examples of --train-data and --valid-data that are lists and not paths, by the option's name.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    explicit: set[str] = field(default_factory=set)
    groups: dict[str, Sequence[Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """Returns the options of a YAML file, as ``solopo train --config PATH`` reads it.

        Args:
            overrides: words of the command line that override the file: ``["--lr=3e-6", "--no-shuffle"]``.

        Raises:
            UserError: an option is unknown, contradicts another or would have no effect; in one line.
        """
        from megatron_solopo.config_load import load  # which reads this module

        return load(["--config", str(path), *overrides], command=False)[0]

    @classmethod
    def from_options(cls, **options: Any) -> Config:
        """Returns options by their names, with the defaults, types and checks of the command line.

            Config.from_options(hf_path="models/qwen", train_data=groups, save="runs/solo", train_epochs=1, lr=3e-6)

        Args:
            options: those of ``solopo train --help``, with underscores; ``config`` names a YAML file whose options the
                others replace. ``train_data`` and ``valid_data`` are paths, or lists of `PreferenceGroup` or of records
                as a file holds them, which `train` writes into the run folder. ``preference_loss`` is a name,
                ``"module:CLASS"``, or a subclass of `PreferenceLoss`.

        Raises:
            UserError: an option is unknown, contradicts another or would have no effect; in one line.
        """
        from megatron_solopo.config_load import from_options  # which reads this module

        return from_options(options)

    def value(self, name: str) -> Any:
        """Returns the value of an option; the default, if the option is of another preference loss than the run's."""
        option = OWNER[name]
        section = getattr(self, option.section)
        return section.loss_options.get(name, option.spec.default) if option.of_loss else getattr(section, name)

    def assign(self, name: str, value: Any) -> None:
        """Sets an option; one of the preference loss itself is kept in ``method.loss_options``."""
        option = OWNER[name]
        section = getattr(self, option.section)
        if option.of_loss:
            section.loss_options[name] = value
        else:
            setattr(section, name, value)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section, as written to config.yaml."""
        return {section: {name: self.value(name) for name in names_of(section)} for section in SECTIONS}


class Option(NamedTuple):
    """Where an option is declared.

    Attributes:
        section: its section in a YAML file.
        spec: the field, with the metadata of `option`.
        kind: the dataclass it is a field of.
    """

    section: str
    spec: dataclasses.Field
    kind: type

    @property
    def of_loss(self) -> bool:
        """Whether a preference loss declares it."""
        return self.kind is not SECTIONS[self.section]


SECTIONS: dict[str, type] = {
    name: kind
    for name, kind in get_type_hints(Config).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}

OWNER: dict[str, Option] = {
    spec.name: Option(section, spec, kind)
    for section, kind in SECTIONS.items()
    for spec in dataclasses.fields(kind)
    if spec.metadata
} | {spec.name: Option("method", spec, kind) for kind in LOSSES.values() for spec in declared_options(kind)}
"""Every option by name; those of a user's loss once `load_loss` read it."""

RESERVED = frozenset(
    {
        *("help", "config", "dry_run", "mock_data"),
        *("mathematics", "tokens", "steps", "total", "iteration", "reference_weights"),
    }
)
"""Names that no option may have: flags of the command line, and keys of a checkpoint beside the options."""


def names_of(section: str) -> list[str]:
    """Returns the options of a section, in order."""
    return [name for name, option in OWNER.items() if option.section == section]


def load_loss(loss: str | type[PreferenceLoss], where: str) -> str:
    """Makes a user's loss and its options known; of the name of another loss nothing is done.

    Args:
        loss: ``module:CLASS``, or the class itself.
        where: what names it: a flag, or a place in a file.

    Returns:
        The value of --preference-loss that names it.

    Raises:
        UserError: there is no such loss, it is not complete, or one of its options has the name of another.
    """
    if isinstance(loss, str) and ":" not in loss:
        return loss
    try:
        kind = registry.loss_class(loss) if isinstance(loss, str) else registry.add(loss)
        earlier = [
            name
            for name, option in OWNER.items()
            if getattr(option.kind, "name", None) == kind.name and option.kind is not kind
        ]
        for spec in declared_options(kind):
            taken = spec.name in OWNER and spec.name not in earlier and OWNER[spec.name].spec is not spec
            if spec.name in RESERVED or taken:
                raise ValueError(f"{kind.name}: its option {spec.name} has a name that is taken; choose another")
    except ValueError as error:
        raise UserError("loss-invalid", f"{where}: {error}") from None
    for name in earlier:  # a notebook defines a class anew each time that its cell runs
        del OWNER[name]
    for spec in declared_options(kind):
        OWNER.setdefault(spec.name, Option("method", spec, kind))  # an inherited option stays that of its loss
    return kind.name


def flag(name: str) -> str:
    """``seq_length`` -> ``--seq-length``."""
    return "--" + name.replace("_", "-")
