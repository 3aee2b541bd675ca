"""Imported once by the fork server of GlooPool: its processes start with everything loaded."""

import os

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import deepspeed.comm
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer  # needed by the first engine; loads torch's compiler

# Without this its first use compiles for a minute, see training/world.py.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
