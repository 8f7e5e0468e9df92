"""What a process of the tests has imported when it starts; the CPU's answers are installed only meanwhile."""

import gc

from megatron_solopo.parallel import cpu_shim

_undo = cpu_shim.install()

import megatron_solopo.conversion.hf  # noqa: E402
import megatron_solopo.conversion.megatron_folder  # noqa: E402
import megatron_solopo.conversion.start  # noqa: E402
import megatron_solopo.data.building.second_pass  # noqa: E402
import megatron_solopo.data.sampling.sample_responses  # noqa: E402
import megatron_solopo.data.sampling.server  # noqa: E402
import megatron_solopo.data.tokenized.tokenize_data  # noqa: E402
import megatron_solopo.losses.solopo  # noqa: E402
import megatron_solopo.planning.workers  # noqa: E402
import megatron_solopo.training.checkpoint  # noqa: E402
import megatron_solopo.training.convert_weights  # noqa: E402
import megatron_solopo.training.engine  # noqa: E402
import megatron_solopo.training.export  # noqa: E402
import megatron_solopo.training.log  # noqa: E402
import megatron_solopo.training.reference  # noqa: E402
import megatron_solopo.training.trainer  # noqa: E402, F401

_undo()
# Every end of a run collects garbage, which these modules' half a million objects are not.
gc.freeze()
