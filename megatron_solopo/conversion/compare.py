"""Compares a Megatron model with transformers on the same weights, by token and by layer."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn
from transformers import PretrainedConfig

from megatron_solopo.data.files.records import read_text
from megatron_solopo.data.text.tokenizer import read_tokenizer
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.errors import UserError
from megatron_solopo.model.build import rotary_frequencies
from megatron_solopo.model.families.fields import logit_cap
from megatron_solopo.model.forward import LogProbHead, device_pack, segment_log_probs
from megatron_solopo.model.hf_config import whole_config
from megatron_solopo.pack import Context, Segments, Side
from megatron_solopo.progress import ProgressBar, reporting

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. A train from the one to the other takes about "
    "eleven hours, with a change in Milan or in Zurich.",
    "def mean(numbers):\n    total = 0.0\n    for number in numbers:\n        total += number\n"
    "    return total / len(numbers)",
    "Es war einmal ein König, der hatte drei Söhne. 从前有一位国王。 Il était une fois 1,234.56 € — 7 × 8 = 56.",
)
"""Prose; code; other languages with digits and signs."""


@dataclass
class Comparison:
    """Differences between the two models.

    Attributes:
        prompts: (tokens, largest difference of a token's log-prob in nats, its place) of each prompt.
        layers: relative difference of the hidden states after each layer (the last: after the final norm); the
            maximum over all prompts.
    """

    prompts: list[tuple[int, float, int]] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """The largest difference; nan if any is nan, which torch's max keeps and Python's may lose."""
        return torch.tensor([difference for _, difference, _ in self.prompts], dtype=torch.float64).max().item()

    @property
    def worst_layer(self) -> int:
        """The layer, counted from 0, that adds the most to the difference."""
        return int(torch.tensor([0.0, *self.layers]).diff().argmax())


def read_prompts(path: str | None, folder: str | Path, hf_config: PretrainedConfig) -> list[list[int]]:
    """Token ids of the lines of a file, or of the built-in prompts.

    Without a usable tokenizer the ids are random, which tests a conversion as well as text does.

    Raises:
        UserError: no such file, not UTF-8, or a line of fewer than two tokens.
    """
    lines: Sequence[str] = PROMPTS
    if path is not None:
        if not Path(path).is_file():
            raise UserError("file-missing", f"--prompts {path}: no such file; set a text file with one prompt per line")
        lines = [line for line in read_text("--prompts", path).splitlines() if line.strip()]
    longest = hf_config.max_position_embeddings
    try:
        tokenizer = read_tokenizer(folder)
        prompts = [list(tokenizer(line)["input_ids"])[:longest] for line in lines]
    except Exception as error:  # transformers raises many kinds
        if path is not None:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError("tokenizer-unreadable", f"--prompts {path}: needs the tokenizer: {reason}") from None
        prompts = []
    usable = bool(prompts) and all(len(ids) > 1 and max(ids) < hf_config.vocab_size for ids in prompts)
    if path is None and not usable:
        generator = torch.Generator().manual_seed(0)
        shape = (3, min(64, longest))
        prompts = torch.randint(0, hf_config.vocab_size, shape, generator=generator).tolist()
    for number, ids in enumerate(prompts, start=1):
        if len(ids) < 2:
            raise UserError(
                "prompt-too-short", f"{path}:{number}: a prompt of {len(ids)} tokens; the comparison needs two or more"
            )
        if max(ids) >= hf_config.vocab_size:
            raise UserError(
                "token-beyond-vocabulary",
                f"{path}:{number}: token id {max(ids)} is beyond vocab_size {hf_config.vocab_size} of {folder}; the "
                "tokenizer is not this model's",
            )
    if not prompts:
        raise UserError("data-empty", f"--prompts {path}: holds no text")
    return prompts


@torch.no_grad()
def compare(
    model: GPTModel, hf_config: PretrainedConfig, folder: str | Path, prompts: Sequence[Sequence[int]]
) -> Comparison | None:
    """Runs both models on prompts; collective over the processes that share the Megatron model.

    Args:
        model: all layers, in float32 or bfloat16.
        hf_config: of both, with the run's --rope-scaling.
        folder: the Hugging Face folder whose weights transformers loads, in the same dtype.

    Returns:
        The comparison on rank 0, None on other ranks.
    """
    parameter = next(model.parameters())
    first = dist.get_rank() == 0
    theirs = None
    if first:
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        with reporting(f"loading {folder}"):
            kind, whole = whole_config(folder, hf_config)
            theirs = kind.from_pretrained(str(folder), config=whole, local_files_only=True, dtype=parameter.dtype)
        theirs = theirs.eval().to(parameter.device)
        if parameter.dtype == torch.float32:
            theirs.float()  # transformers dequantises MXFP4 in bfloat16, which holds it exactly
    frequencies = rotary_frequencies(hf_config).to(parameter.device)
    head = LogProbHead(hf_config.vocab_size, 256, frequencies, logit_cap(hf_config))
    model.eval()
    comparison, layers = Comparison(), []
    for ids in ProgressBar(prompts, desc="comparing", unit="prompt", leave=False):
        log_probs, states = _ours(model, head, ids, parameter)
        if theirs is None:
            continue
        output = theirs(torch.tensor([ids], device=parameter.device), output_hidden_states=True)
        scores = output.logits[0, :-1].float().log_softmax(-1)
        expected = scores[range(len(ids) - 1), ids[1:]]
        difference = (log_probs - expected).abs()
        comparison.prompts.append((len(ids), difference.max().item(), int(difference.argmax()) + 1))
        # One less: the last token predicts nothing and is not computed.
        others = [other[0, :-1].float() for other in output.hidden_states[1:]]
        layers.append(
            [(ours.float() - other).norm() / other.norm() for ours, other in zip(states, others, strict=True)]
        )
    if not first:
        return None
    comparison.layers = torch.tensor(layers).amax(0).tolist()
    return comparison


def _ours(model: GPTModel, head: LogProbHead, ids: Sequence[int], parameter: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns ([n - 1] log-probs of the tokens after the first, the hidden states [n - 1, H] after each layer)."""
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        states.append(hidden[: len(ids) - 1, 0])

    modules = [*model.decoder.layers[:-1], model.decoder.final_layernorm]
    hooks = [module.register_forward_hook(keep) for module in modules]
    group = TokenGroup("prompt", (Prompt(Context.SHORT, list(ids[:1]), (Completion(Side.PLAIN, list(ids[1:])),)),))
    multiple = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
    pack = build_pack([group], [0], False, multiple)
    # The head sums log-probs by segment, so each token is a segment.
    each = Segments.of([(0, Context.SHORT, Side.PLAIN, place, 1) for place in range(len(ids) - 1)], 1)
    pack = dataclasses.replace(pack, segments=torch.arange(len(ids) - 1), scored=each)
    try:
        log_probs = segment_log_probs(model, device_pack(pack, model.config, parameter.device), head, parameter.dtype)
    finally:
        for hook in hooks:
            hook.remove()
    return log_probs, states


def report(comparison: Comparison, dtype: str, bound: float | None) -> int:
    """Prints a comparison. Returns 1 if the largest difference is above the bound or nan, else 0."""
    for number, (tokens, difference, place) in enumerate(comparison.prompts, start=1):
        print(f"prompt {number}: {tokens} tokens, log-probs differ by up to {difference:.2e} nats (token {place})")
    worst = comparison.worst_layer
    if all(difference == 0 for difference in comparison.layers):
        print(f"no layer differs ({len(comparison.layers)} compared)")
    else:
        print(
            f"worst layer: {worst} of {len(comparison.layers)} "
            f"(hidden states differ by {comparison.layers[worst]:.2e} after it)"
        )
    good = math.isfinite(comparison.largest) if bound is None else comparison.largest <= bound
    limit = f"bound {bound:g}" if bound is not None else "no bound"
    print(f"{'agrees' if good else 'DIFFERS'} in {dtype}: {comparison.largest:.2e} nats, {limit}")
    return 0 if good else 1
