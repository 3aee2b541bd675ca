"""Set, before torch is imported: one thread per process, no network, DeepSpeed on the CPU without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# A busy machine may take any time for one example; pytest's own time limit catches hangs.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

TESTS = Path(__file__).parent
# Files and folders whose tests start process groups or whole commands. `make quick` leaves them out.
SLOW = (
    *("tools", "test_recipes.py", "parallel/test_layouts.py", "bench/test_step.py", "training"),
    *("evaluation/test_acceptance.py", "evaluation/test_batched.py", "bench", "data/test_read_pool.py"),
    "bench/test_embedded_target.py",
    *("kernels/test_interpreted.py", "store/test_store_damage.py", "estimate/test_memory.py"),
)


def _slow_rank(path: Path) -> int:
    """Index in SLOW of the first entry that names the file or a folder above it; len(SLOW) for fast tests."""
    own = path.relative_to(TESTS)
    names = {str(own), *map(str, own.parents)}
    return next((index for index, name in enumerate(SLOW) if name in names), len(SLOW))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests, run their files first, and skip tests marked gpu where there is no CUDA device.

    Slow files go first so that both workers of `make test` finish at about the same time.
    """
    items.sort(key=lambda item: _slow_rank(item.path))
    for item in items:
        if _slow_rank(item.path) < len(SLOW):
            item.add_marker(pytest.mark.slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def embedded_target() -> Path:
    """Return the folder of the embedded target, fetched once and kept where the demo keeps it."""
    from eagle_ds.bench.embedded_target import DEFAULT_FOLDER, ensure_embedded_target

    try:
        return ensure_embedded_target(TESTS.parent / DEFAULT_FOLDER)
    except ValueError as error:
        pytest.skip(f"no embedded target: {error}")
