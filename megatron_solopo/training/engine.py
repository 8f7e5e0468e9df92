"""Model, optimizer and learning-rate schedule of megatron-core on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer, shard_buffer
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor, nn
from transformers import PretrainedConfig

from megatron_solopo.config import Config, ParallelConfig, TrainingConfig
from megatron_solopo.conversion.adapters import start_adapters
from megatron_solopo.conversion.random_start import draw_start
from megatron_solopo.conversion.start import load_start
from megatron_solopo.model.build import build_model, offload_activations, rotary_frequencies
from megatron_solopo.model.families.fields import logit_cap
from megatron_solopo.model.forward import LogProbHead
from megatron_solopo.model.hf_config import padded_vocab_size
from megatron_solopo.model.log_probs import chunk_size
from megatron_solopo.model.offload import Offload
from megatron_solopo.parallel.cpu_shim import adam_class
from megatron_solopo.parallel.platform import Platform
from megatron_solopo.training.adam import adam_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Names of dtypes in options."""


@dataclass(frozen=True)
class Engine:
    """The model on one rank.

    Attributes:
        chunks: the GPTModels of this pipeline stage, each in megatron-core's DDP; one without virtual stages.
        head: turns the last chunk's hidden states into log-probs.
        dtype: dtype of parameters and activations.
        offload: what moves activations to the host, with --activation-offload.
    """

    platform: Platform
    hf_config: PretrainedConfig
    chunks: list[DistributedDataParallel]
    head: LogProbHead
    dtype: torch.dtype
    offload: Offload | None = None

    @property
    def models(self) -> list[GPTModel]:
        """The chunks without their wrappers."""
        return [chunk.module for chunk in self.chunks]  # pyright: ignore[reportReturnType]  # DDP annotates any Module

    def train(self) -> None:
        """Prepares for training steps. With --overlap-param-gather forward passes gather the parameters they need."""
        for chunk in self.chunks:
            chunk.train()
            if chunk.ddp_config.overlap_param_gather and not _gathers_in_forward(chunk):
                chunk.enable_forward_pre_hook()

    def eval(self) -> None:
        """Prepares for forward passes without communication; gathers the parameters that the last step updated
        (collective)."""
        for chunk in self.chunks:
            chunk.eval()
            if _gathers_in_forward(chunk):
                chunk.disable_forward_pre_hook()

    def gather_parameters(self) -> None:
        """Gathers the parameters before anything but a forward pass reads them; collective.

        With --overlap-param-gather the optimizer's step updates only a rank's own part of the parameters.
        """
        for chunk in self.chunks:
            if _gathers_in_forward(chunk):
                chunk.start_param_sync(force_sync=True)

    def own_parameters(self) -> list[Tensor]:
        """Returns the parts of the parameters that the distributed optimizer updates on this rank, flat and in the
        model's memory; the other ranks that share the parameters gather them."""
        groups = [
            group for chunk in self.chunks for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        ]
        return [
            shard_buffer(bucket.param_data, group.intra_distributed_optimizer_instance_size)[
                group.intra_distributed_optimizer_instance_rank
            ]
            for group in groups
            for bucket in group.buckets
            if bucket.param_data is not None  # of the distributed optimizer all have one
        ]

    def own_parameters_changed(self) -> None:
        """Gathers the parameters after `own_parameters` were written: now, or where forward passes gather, in the next
        one; collective."""
        for chunk in self.chunks:
            if _gathers_in_forward(chunk):
                chunk.reset_param_sync_dispatch_state()
            else:
                with torch.no_grad():
                    chunk.start_param_sync(force_sync=True)

    def zero_gradients(self) -> None:
        """Zeroes the gradient buffers before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def close(self) -> None:
        """Releases the process groups; call it before `platform.end_model_parallel`.

        megatron-core's token dispatchers keep the last forward pass's graph, which keeps the parameters' hooks and so
        the groups, in a cycle through C++ that Python's garbage collector does not see.
        """
        for dispatcher in (getattr(m, "token_dispatcher", None) for model in self.models for m in model.modules()):
            if dispatcher is not None:
                dispatcher.probs = None


def gradient_buffers(chunk: DistributedDataParallel) -> list[_ParamAndGradBuffer]:
    """Returns the gradient buffers of a chunk, those of experts last."""
    dense: Any = chunk.buffers  # DDP overrides a method of nn.Module by a list
    return [*dense, *chunk.expert_parallel_buffers]


def _gathers_in_forward(chunk: DistributedDataParallel) -> bool:
    return bool(chunk.remove_forward_pre_hook_handles)


def initialize_parallel(config: Config) -> None:
    """Initializes the process groups of megatron-core, and its random state."""
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=_chunks(parallel) if _chunks(parallel) > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,  # pyright: ignore[reportArgumentType]  # mcore multiplies it
        # They are for checkpoint formats that are not used here, and fail on a host whose name does not resolve.
        create_gloo_process_groups=False,
    )
    torch.manual_seed(config.training.seed)
    model_parallel_cuda_manual_seed(config.training.seed)


def seed_pack(seed: int, step: int, pack: int, chunk: int) -> None:
    """Seeds the generators of --lora-dropout, before a chunk's forward pass of a pack.

    So what is drawn follows from --seed, the step and the pack, and a resumed run draws what it would have drawn.
    Copies of the model, context-parallel ranks and pipeline stages have seeds of their own; of tensor-parallel ranks
    megatron-core's tracker has a generator for each, beside the one that they share.

    Args:
        step, pack: counted from 0; pack: in the step, of this rank; chunk: of the virtual stages.
    """
    place = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    drawn = np.random.SeedSequence([seed, step, pack, chunk, *place]).generate_state(1, np.uint64)
    number = int(drawn[0] >> 2)  # to which megatron-core adds small numbers
    torch.manual_seed(number)
    model_parallel_cuda_manual_seed(number)


def _chunks(parallel: ParallelConfig) -> int:
    return parallel.num_virtual_stages_per_pipeline_rank


def build_chunks(hf_config: PretrainedConfig, config: Config, dtype: torch.dtype) -> list[GPTModel]:
    """Builds the model chunks of this rank, one without virtual stages; their weights are not loaded."""
    chunks = _chunks(config.parallel)
    return [build_model(hf_config, config, dtype, stage) for stage in (range(chunks) if chunks > 1 else (None,))]


def build_engine(
    platform: Platform, hf_config: PretrainedConfig, config: Config, dtype: torch.dtype | None = None
) -> Engine:
    """Builds the model, loads or draws its weights and wraps it in DDP; process groups must exist.

    Args:
        dtype: dtype of parameters and activations; default by --bf16. float64 has no optimizer, only gradients.
    """
    dtype = dtype or (torch.bfloat16 if config.model.bf16 else torch.float32)
    parallel = config.parallel
    models = build_chunks(hf_config, config, dtype)
    _release_parameters(models)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype != torch.float64 and config.training.main_grads_dtype == "fp32",
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=parallel.overlap_param_gather and len(models) > 1,
        bucket_size=parallel.ddp_bucket_size,
    )
    # A later chunk's communication is overlapped with the other chunks, so it needs no buckets of its own.
    chunks = [
        DistributedDataParallel(model.config, ddp, model, disable_bucketing=number > 0)
        for number, model in enumerate(models)
    ]
    if config.model.random_init:
        draw_start(models, hf_config, config.training.seed)
    else:
        load_start(models, hf_config, config.model.hf_path, config.model.add_special_tokens)
    if config.model.lora_rank is not None:
        start_adapters(models, hf_config, config.model, config.training.seed)
    _set_schedule_functions(chunks, ddp)
    frequencies = rotary_frequencies(hf_config).to(platform.device)
    rows = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
    chunk = config.model.logprob_chunk_size
    if chunk is None:
        chunk = chunk_size(rows // parallel.tensor_model_parallel_size, platform.name == "cuda")
    head = LogProbHead(hf_config.vocab_size, chunk, frequencies, logit_cap(hf_config))
    offload = offload_activations(models) if config.model.activation_offload else None
    if platform.return_pages is not None:
        return_pages_after_layers(models, platform.return_pages)
    engine = Engine(platform, hf_config, chunks, head, dtype, offload)
    if ddp.overlap_param_gather:
        for chunk in chunks:  # until `train`: nothing needs a gather, and the reference pass must not communicate
            chunk.disable_forward_pre_hook(param_sync=False)
    return engine


LARGE = 2**20
"""Bytes of a layer's result from which memory that it freed is worth the time to return it, some milliseconds."""


def return_pages_after_layers(models: Sequence[GPTModel], return_pages: Callable[[], object]) -> None:
    """Calls a function after the forward pass of each layer whose result has `LARGE` bytes or more: what the layer
    keeps is made then, and what else it made is freed."""

    def after(layer: nn.Module, arguments: object, result: tuple[Tensor, object]) -> None:
        if result[0].nbytes >= LARGE:
            return_pages()

    for model in models:
        for layer in model.decoder.layers:
            layer.register_forward_hook(after)


def _release_parameters(models: Sequence[GPTModel]) -> None:
    """Frees the parameters' memory before DDP copies them into its flat buffers; weights are loaded afterwards.

    Copied with their values they would be in memory twice, beside the gradients. A tensor with strides of 0 has every
    shape and one element. Frozen parameters, which those buffers do not hold, keep their memory.
    """
    for model in models:
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.data = parameter.new_empty_strided(parameter.shape, (0,) * parameter.dim())


def _set_schedule_functions(chunks: list[DistributedDataParallel], ddp: DistributedDataParallelConfig) -> None:
    """Sets DDP's functions for the pipeline schedule, which reads the first chunk's config, as Megatron's training loop
    does."""
    settings = chunks[0].config
    settings.finalize_model_grads_func = finalize_model_grads
    settings.calculate_per_token_loss = False

    def one_or_list(functions: list[Callable[..., Any]]) -> Any:  # mcore takes both and annotates one
        return functions if len(functions) > 1 else functions[0]

    if ddp.overlap_grad_reduce:
        settings.no_sync_func = one_or_list([chunk.no_sync for chunk in chunks])
        settings.grad_sync_func = one_or_list([chunk.start_grad_sync for chunk in chunks])
    if ddp.align_param_gather:
        settings.param_sync_func = one_or_list([chunk.start_param_sync for chunk in chunks])


def build_optimizer(
    engine: Engine, training: TrainingConfig, steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Builds Adam with the distributed optimizer, and its learning-rate schedule over ``steps`` steps."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=engine.dtype == torch.bfloat16,
        params_dtype=engine.dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=engine.chunks[0].ddp_config.overlap_param_gather,
    )
    adam = None
    if training.precision_aware:
        # After its construction, which asks for Transformer Engine.
        vars(config).update(
            use_precision_aware_optimizer=True,
            use_precision_aware_optimizer_no_fp8_or_ds_fp8=True,
            exp_avg_dtype=DTYPES[training.exp_avg_dtype],
            exp_avg_sq_dtype=DTYPES[training.exp_avg_sq_dtype],
        )
        adam = adam_of(training, engine.platform.device)
    with adam_class(adam):
        optimizer = get_megatron_optimizer(config, [*engine.chunks], use_gloo_process_groups=False)
    if adam is None and not HAVE_APEX_OR_TE:
        fuse_adam(optimizer)
    # The scheduler advances before each step, so that no step has a learning rate of 0: step k of w warm-up steps
    # trains at lr * k / w, and min_lr would be reached one step after the last.
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.lr if training.lr_decay_style == "constant" else training.min_lr,
        lr_warmup_steps=round(training.lr_warmup_fraction * steps),
        lr_decay_steps=steps + 1,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # A checkpoint has the same values, unless they may differ (`run_identity.check_same_run`).
        use_checkpoint_opt_param_scheduler=not training.override_opt_param_scheduler,
        override_opt_param_scheduler=training.override_opt_param_scheduler,
    )
    return optimizer, scheduler


def fuse_adam(optimizer: MegatronOptimizer) -> None:
    """Makes torch's AdamW use its fused kernel; call it before the first step.

    By default a step on CUDA needs temporaries as large as the parameters, and on the CPU it rounds otherwise than the
    pieces of `adam`. Apex and Transformer Engine have their own Adam.
    """
    for part in _parts(optimizer):
        for group in part.param_groups:
            group |= {"fused": True, "foreach": False}


def squared_gradient_norm(optimizer: MegatronOptimizer) -> Tensor:
    """Returns [] this rank's part of the squared gradient norm, which is the sum over all ranks.

    It is that of the optimizer's shards, without the copies of tensor parallelism and tied embeddings, as
    `ChainedOptimizer.step` computes it (megatron-core 0.19.2, optimizer.py:1760); without Transformer Engine and Apex
    that function reads the device once for each parameter. Afterwards gradients are ready for `update`.
    """
    optimizer.prepare_grads()
    gradients = [gradient for part in _parts(optimizer) for gradient in part.get_grads_for_grad_norm()]
    if not gradients:  # all parameters of this stage are shards of other ranks
        return torch.zeros((), device=torch.cuda.current_device())
    if gradients[0].dtype == torch.bfloat16:  # whose norms would be rounded
        gradients = torch.ops.aten._foreach_norm(gradients, 2, dtype=torch.float32)
    return torch.nn.utils.get_total_norm(gradients) ** 2


def total_norm(parts: Sequence[float]) -> float:
    """Returns the gradient norm from all ranks' `squared_gradient_norm`; float32 sums, as in megatron-core."""
    return float(np.sum(parts, dtype=np.float32)) ** 0.5


def update(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clips the gradients by their norm, where --clip-grad is set, and updates the weights.

    This is the part of `ChainedOptimizer.step` after `squared_gradient_norm`.
    """
    for part in _parts(optimizer):
        parameters: list[Tensor] = [*part.get_parameters()]
        if parameters and part.config.clip_grad > 0:
            decoupled = part.config.use_precision_aware_optimizer
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, decoupled)
    optimizer.step_with_ready_grads()


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Returns the optimizers of dense layers and of experts."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer]


def weights_not_finite(engine: Engine) -> int:
    """Counts the weights that are not finite on all ranks, copies included; collective."""
    engine.gather_parameters()
    parameters = [parameter.detach() for model in engine.models for parameter in model.parameters()]
    count = torch.stack([(~torch.isfinite(parameter)).sum() for parameter in parameters]).sum()
    dist.all_reduce(count)
    return int(count.item())


def data_parallel() -> tuple[int, int]:
    """Returns (rank, size) in the group of ranks that have different examples."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
