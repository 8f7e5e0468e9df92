"""What all tests share: the folder with real data, and which tests run where."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_solopo import progress

# Runs in this process and runs as a user starts them are compared bit for bit, and sums depend on the threads.
os.environ["OMP_NUM_THREADS"] = "1"
# Token ids that training makes of data files at first use; of all tests together, and of no user.
_cache = tempfile.TemporaryDirectory(prefix="solopo-cache-")
os.environ["SOLOPO_CACHE"] = _cache.name
# A test that reaches for a model hub must fail at once, not wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests follow each other without a pause, so that a line of progress could come up in any of them.
progress.INTERVAL = float("inf")

NO_DATA = "SOLOPO_DATA is not set; set it to the folder with the real data sets"


@pytest.fixture(scope="session")
def solopo_data() -> Path:
    """The folder named by SOLOPO_DATA; the test is skipped without it and fails when it does not exist."""
    folder = os.environ.get("SOLOPO_DATA")
    if not folder:
        pytest.skip(NO_DATA)
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"SOLOPO_DATA={folder}: no such folder")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by folder and fixture, and skips those whose data or device is not here."""
    for item in items:
        if "distributed" in item.path.relative_to(Path(__file__).parent).parts[:-1]:
            item.add_marker("distributed")
        if "solopo_data" in getattr(item, "fixturenames", ()):
            item.add_marker("real_data")
        if item.get_closest_marker("real_data") and not os.environ.get("SOLOPO_DATA"):
            item.add_marker(pytest.mark.skip(reason=NO_DATA))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Keeps objects that live from file to file, those of imports, out of later garbage collections: a run
    does two of them at its end, and they took a third of its time."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
