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
"""Part of a name -> the option that it sets; each multiplies the processes of a copy of the model."""

WITHIN = {
    "vpp": "num_virtual_stages_per_pipeline_rank",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
"""The same, of options that take no further process."""

PARTS = OPTIONS | WITHIN

KEPT = ("device", "distributed_timeout_minutes", "overlap_grad_reduce", "overlap_param_gather", "ddp_bucket_size")
"""What a layout leaves as it is."""


@dataclass(frozen=True)
class Layout:
    """A parallel layout.

    Attributes:
        name: as it was written.
        options: fields of ParallelConfig that differ from one process.
        copies: data-parallel copies of the model.
    """

    name: str
    options: dict[str, int | bool] = field(default_factory=dict)
    copies: int = 1

    @property
    def processes(self) -> int:
        return self.copies * math.prod(self.options.get(option, 1) for option in OPTIONS.values())

    def applied(self, parallel: ParallelConfig) -> ParallelConfig:
        """This layout with the options of ``parallel`` that are not about who holds what."""
        kept = {name: getattr(parallel, name) for name in KEPT}
        return dataclasses.replace(ParallelConfig(), **kept, **self.options)


def parse_layout(name: str) -> Layout:
    """The layout of a name.

    Raises:
        UserError: a part that is none, or one that is given twice.
    """
    options: dict[str, int | bool] = {}
    copies = 1
    for part in name.split():
        found = re.fullmatch(r"([a-z]*)(\d*)", part)
        kind, size = (found[1], found[2]) if found else ("", "")
        if kind == "sp" and not size and "sequence_parallel" not in options:
            options["sequence_parallel"] = True
        elif kind == "dp" and int(size or 0) and copies == 1:
            copies = int(size)
        elif kind in PARTS and int(size or 0) and PARTS[kind] not in options:
            options[PARTS[kind]] = int(size)
        elif part != "1":
            raise UserError(
                f"layout {name!r}: {part!r} is no part of a layout or is given twice; parts are sp, dp2, "
                + ", ".join(f"{kind}2" for kind in PARTS)
                + " and so on, or 1 for one process"
            )
    return Layout(name, options, copies)
