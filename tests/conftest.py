"""Before anything imports torch: one thread a process, no network, DeepSpeed on the CPU where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


SLOW = ("test_bench_layouts.py", "test_recipes.py", "test_resume.py", "test_sigterm.py", "test_steps.py", "parallel", "tools", "engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start many processes go first, so that the last ones to run are short and no worker waits for another.
    Tests marked gpu are skipped, with the reason, where there is no CUDA device."""
    items.sort(key=lambda item: next((n for n, name in enumerate(SLOW) if name in item.path.parts), len(SLOW)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def embedded_target() -> Path:
    """The embedded target, fetched once and kept where the demo keeps it."""
    from eagle_ds.capture.embedded import DEFAULT_FOLDER, ensure_embedded_target

    try:
        return ensure_embedded_target(Path(__file__).resolve().parents[1] / DEFAULT_FOLDER)
    except ValueError as error:
        pytest.skip(f"no embedded target: {error}")
