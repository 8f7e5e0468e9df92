"""The engine in one process, for tests that build real megatron-core models."""

import pytest


@pytest.fixture(scope="module")
def engine():
    """megatron-core on CPU with one process; undone afterwards, so that other tests see plain torch."""
    from megatron_solopo.parallel import platform

    here = platform.start("cpu")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    yield here
    platform.stop(here)
