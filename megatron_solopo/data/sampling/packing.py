"""Linear layers of a model that computes on a CPU in float32, with weights in the blocks that oneDNN multiplies by.

PyTorch multiplies by a float32 weight through the BLAS it was built with, MKL in its x86 wheels. For the few rows of a
decoding step, oneDNN with weights packed once was about 1.7 times as fast on the AMD processor where it was measured.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


class PackedLinear(torch.nn.Module):
    """A linear layer without gradients.

    Args:
        linear: its weight is on the CPU, in float32.
        rows: the number of input rows for which the blocks are chosen; any number is computed.
    """

    def __init__(self, linear: torch.nn.Linear, rows: int) -> None:
        super().__init__()
        self.bias = linear.bias
        # What torch.compile makes of a linear layer that is frozen on a CPU; there is no public function for it.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy [outputs, inputs], for a model that uses the weight otherwise."""
        return self._packed.to_dense()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")


def pack_linears(model: PreTrainedModel, rows: int) -> None:
    """Replaces the float32 linear layers of a model on an x86 CPU with AVX2 by `PackedLinear`, one after the other.

    A subclass of ``torch.nn.Linear`` has a forward function of its own and is kept. A weight that is not also an
    embedding is freed, so that one layer's weight at most exists twice.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return
    cpu = torch.device("cpu")
    for name in [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]:
        linear = model.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        if (linear.weight.device, linear.weight.dtype) == (cpu, torch.float32):
            model.set_submodule(name, PackedLinear(linear, rows))
