"""The embedded target, fetched once and kept where the demo keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle_ds.capture.embedded import DEFAULT_FOLDER, ensure_embedded_target


@pytest.fixture(scope="session")
def embedded_target() -> Path:
    try:
        return ensure_embedded_target(Path(__file__).resolve().parents[2] / DEFAULT_FOLDER)
    except ValueError as error:
        pytest.skip(f"no embedded target: {error}")
