"""EAGLE-3 draft training on long sequences, offline, under DeepSpeed.

Shape legend, used in names and docstrings everywhere:

    B   batch                     H    target hidden size       U  Ulysses degree
    S   tokens of a sample        D    draft hidden size        R  ring degree
    N   trained (query) rows      A    aux layers (3)           P  U * R, sequence-parallel size
    M   rows held or read here    Hq   query heads              T  TTT steps (7)
    V   target vocabulary         Hkv  key/value heads
    Vd  draft vocabulary          d    head dimension

A name ending in ``_local`` holds this rank's share only.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

NEEDED = ("h5py", "numpy", "pydantic", "safetensors", "torch")
ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv/bin/python"  # `make venv` makes it


def _require_packages() -> None:
    """Check that the needed packages are installed.

    If not, a tool starts again with the Python of ``.venv``, so the environment need not be activated. If
    there is no ``.venv``, or it lacks packages too, the tool exits with one sentence that says how to install
    them. Other programs get an ImportError.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return
    fix = f"run `make venv`, then `source .venv/bin/activate`, in {ROOT}"
    sentence = f"{sys.executable} has no {', '.join(missing)}; {fix}"
    started = getattr(sys.modules.get("__main__"), "__file__", None)
    if started and Path(started).resolve().parent == ROOT / "tools":
        if os.access(VENV_PYTHON, os.X_OK) and Path(sys.executable).parent != VENV_PYTHON.parent:
            os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])
        sys.exit(f"error: {sentence}")
    raise ImportError(sentence)


_require_packages()
