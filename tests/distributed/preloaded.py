"""What a process of the tests has imported when it starts; the CPU's answers are installed only meanwhile."""

import gc

from megatron_solopo.parallel import cpu_shim

_undo = cpu_shim.install()

import megatron_solopo.data.chat  # noqa: E402, F401
import megatron_solopo.losses.solopo  # noqa: E402, F401
import megatron_solopo.training.checkpoint  # noqa: E402, F401
import megatron_solopo.training.export  # noqa: E402, F401
import megatron_solopo.training.log  # noqa: E402, F401
import megatron_solopo.training.reference  # noqa: E402, F401
import megatron_solopo.training.run  # noqa: E402, F401

_undo()
# Every end of a run collects garbage, which these modules' half a million objects are not.
gc.freeze()
