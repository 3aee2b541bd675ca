"""Worker processes that start at once: forked from a server which has loaded the heavy libraries and nothing else.

Importing torch takes seconds; forking a process that has done so takes milliseconds, and is safe as long as that process
has no threads, no GPU and no open file. Imports nothing heavy itself, so that a tool can start the server before its own imports.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

LIBRARIES = ("torch", "h5py", "safetensors.torch")


def fork_server() -> ForkServerContext:
    """Where worker processes come from; the server starts with the first one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    return context


def start_fork_server() -> None:
    """Start it now: it loads the libraries on another core while this process loads its own."""
    fork_server()
    forkserver.ensure_running()
