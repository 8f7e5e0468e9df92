"""Names of parallel layouts: "tp2 sp cp2 pp2 dp2" for sixteen processes, "1" for one."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field

from megatron_solopo.config import ParallelConfig
from megatron_solopo.errors import UserError

OPTIONS = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
}
"""Part of a name -> the option that it sets; each multiplies the ranks of a model replica."""

WITHIN = {
    "vpp": "num_virtual_stages_per_pipeline_rank",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
"""Part of a name -> the option that it sets, of options that add no ranks."""

PARTS = OPTIONS | WITHIN

KEPT = ("device", "distributed_timeout_minutes", "overlap_grad_reduce", "overlap_param_gather", "ddp_bucket_size")
"""Options that a layout does not change."""


@dataclass(frozen=True)
class Layout:
    """A parallel layout.

    Attributes:
        name: the layout's name as written.
        options: fields of ParallelConfig that differ from those of one process.
        copies: data-parallel replicas of the model.
    """

    name: str
    options: dict[str, int | bool] = field(default_factory=dict)
    copies: int = 1

    @property
    def processes(self) -> int:
        return self.copies * math.prod(self.options.get(option, 1) for option in OPTIONS.values())

    def applied(self, parallel: ParallelConfig) -> ParallelConfig:
        """Returns this layout with the options `KEPT` of ``parallel``."""
        kept = {name: getattr(parallel, name) for name in KEPT}
        return dataclasses.replace(ParallelConfig(), **kept, **self.options)


def parse_layout(name: str) -> Layout:
    """Parses the name of a layout.

    Raises:
        UserError: a part is unknown or occurs twice.
    """
    options: dict[str, int | bool] = {}
    copies = 1
    for part in name.split():
        match = re.fullmatch(r"([a-z]*)(\d*)", part)
        kind, size = (match[1], match[2]) if match else ("", "")
        if kind == "sp" and not size and "sequence_parallel" not in options:
            options["sequence_parallel"] = True
        elif kind == "dp" and int(size or 0) and copies == 1:
            copies = int(size)
        elif kind in PARTS and int(size or 0) and PARTS[kind] not in options:
            options[PARTS[kind]] = int(size)
        elif part != "1":
            raise UserError(
                "layout-name",
                f"layout {name!r}: {part!r} is unknown or occurs twice; parts are sp, dp2, "
                + ", ".join(f"{kind}2" for kind in PARTS)
                + " and so on, or 1 for one process",
            )
    return Layout(name, options, copies)
