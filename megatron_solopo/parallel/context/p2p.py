"""Keys and values go around a ring of ranks, in Transformer Engine's kernels."""

from __future__ import annotations

from megatron_solopo.parallel.engine_method import EngineMethod


class Ring(EngineMethod):
    about = "around a ring, Transformer Engine's, with --no-share-prompts"


METHOD = Ring()
