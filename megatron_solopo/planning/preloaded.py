"""What processes that rehearse have imported when they start; only their fork server imports this module.

megatron-core finds no Transformer Engine while it is imported, as behind the start of a rehearsal (`fake.rehearsal`).
"""

from megatron_solopo.parallel import cpu_shim
from megatron_solopo.planning.workers import begin

begin()
_undo = cpu_shim.install()

import megatron_solopo.training.engine  # noqa: E402
import megatron_solopo.training.resident  # noqa: E402
import megatron_solopo.training.step  # noqa: E402, F401

_undo()
