"""What a process of forked_runs.py has imported when it starts; the CPU's answers are installed only meanwhile."""

from megatron_solopo.parallel import cpu_shim

_undo = cpu_shim.install()

import convert_worker  # noqa: E402, F401
import worker  # noqa: E402, F401

import megatron_solopo.data.chat  # noqa: E402, F401
import megatron_solopo.losses.solopo  # noqa: E402, F401
import megatron_solopo.training.checkpoint  # noqa: E402, F401
import megatron_solopo.training.export  # noqa: E402, F401
import megatron_solopo.training.log  # noqa: E402, F401
import megatron_solopo.training.reference  # noqa: E402, F401
import megatron_solopo.training.run  # noqa: E402, F401

_undo()
