"""Options of Megatron that ask for what this package cannot do: each is refused by its name, with the reason."""

from __future__ import annotations

_PACKED = (
    "FP8 attention of Transformer Engine 2.20 takes no packed sequences (fused_attn.cpp: BSHD or SBHD alone), and a "
    "pack of examples is one; leave it out: attention stays in bfloat16"
)

REFUSED = {
    "tp_comm_overlap": "Transformer Engine's buffers for it (initialize_ub) hold one fixed number of tokens, and packs "
    "differ in length; leave it out",
    "fp8_param_gather": "weights would exist in FP8 alone, and so would what the reference is scored with and what "
    "--save-hf and checkpoints hold, which are bfloat16 here; leave it out: --fp8-format quantizes copies",
    "keep_fp8_transpose_cache": "it belongs to Megatron's FSDP, which is not used here; FP8 copies are kept, with "
    "their transposes, unless --disable-parameter-transpose-cache is set",
    "fp8_dot_product_attention": _PACKED,
    "fp8_multi_head_attention": _PACKED,
    "moe_enable_deepep": "use --moe-token-dispatcher-type flex, which is DeepEP",
    "moe_flex_dispatcher_backend": "--moe-token-dispatcher-type flex is DeepEP here; leave it out",
    "main_params_dtype": "main parameters have the values of float32, which --use-precision-aware-optimizer keeps in "
    "the weights and 16 bits beside each; leave it out",
    "grad_reduce_in_bf16": "use --main-grads-dtype bf16, in which gradients are summed and reduced",
    "accumulate_allreduce_grads_in_fp32": "gradients are summed and reduced in float32 unless --main-grads-dtype bf16 "
    "is set; leave it out",
    "use_torch_optimizer_for_cpu_offload": "--optimizer-cpu-offload always uses torch's fused AdamW; leave it out",
    "pin_cpu_grads": "gradients pass through pinned buffers with --optimizer-cpu-offload; leave it out",
    "pin_cpu_params": "weights pass through pinned buffers with --optimizer-cpu-offload; leave it out",
    "optimizer_cuda_graph": "packs differ in length, so steps are not captured in CUDA graphs; leave it out",
    "log_straggler": "the copies of the model are always compared, every --log-interval steps; leave it out",
    "moe_router_fusion": "the router is this package's, whose softmax keeps float64 and which does not count padding; "
    "leave it out",
}
"""Name with underscores -> reason and remedy, for megatron-core 0.19.2."""
