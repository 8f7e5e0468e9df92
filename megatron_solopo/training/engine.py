"""Model, optimizer and schedule of megatron-core, put together for one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from transformers import PretrainedConfig

from megatron_solopo.config import Config, TrainingConfig
from megatron_solopo.conversion.hf import load_weights
from megatron_solopo.model.build import build_model, rotary_frequencies
from megatron_solopo.model.forward import LogProbHead
from megatron_solopo.parallel.platform import Platform


@dataclass(frozen=True)
class Engine:
    """What one process trains with.

    Attributes:
        model: the GPTModel in megatron-core's DDP.
        head: what turns its hidden states into log-probs.
        dtype: of parameters and activations.
    """

    platform: Platform
    hf_config: PretrainedConfig
    model: DistributedDataParallel
    head: LogProbHead
    dtype: torch.dtype

    @property
    def gpt(self) -> GPTModel:
        """The model without its wrapper."""
        return self.model.module


def initialize_parallel(config: Config) -> None:
    """The process groups of megatron-core, and its random state."""
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    torch.manual_seed(config.training.seed)
    model_parallel_cuda_manual_seed(config.training.seed)


def build_engine(platform: Platform, hf_config: PretrainedConfig, config: Config) -> Engine:
    """Builds the model, loads its weights and wraps it; process groups must exist."""
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    gpt = build_model(hf_config, config, dtype)
    if not config.model.random_init:
        load_weights(gpt, hf_config, config.model.hf_path)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    model = DistributedDataParallel(gpt.config, ddp, gpt)
    gpt.config.finalize_model_grads_func = finalize_model_grads
    gpt.config.calculate_per_token_loss = False
    head = LogProbHead(hf_config.vocab_size, config.model.logprob_chunk_size, rotary_frequencies(hf_config))
    return Engine(platform, hf_config, model, head, dtype)


def build_optimizer(
    engine: Engine, training: TrainingConfig, steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam with the distributed optimizer, and its learning-rate schedule over ``steps`` steps."""
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
    )
    optimizer = get_megatron_optimizer(config, [engine.model])
    # The scheduler counts before each step, so that no step has a learning rate of 0: step k of w warm-up
    # steps trains at lr * k / w, and min_lr would come one step after the last.
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
    )
    return optimizer, scheduler


def gradients_are_finite(engine: Engine) -> bool:
    """Whether every gradient in the model's buffers is finite on every process; collective."""
    norms = [torch.linalg.vector_norm(b.grad_data) for b in engine.model.buffers + engine.model.expert_parallel_buffers]
    bad = (~torch.isfinite(torch.stack(norms))).any().float()
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bad.item()


def data_parallel() -> tuple[int, int]:
    """(rank, size) among the processes that hold different examples."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
