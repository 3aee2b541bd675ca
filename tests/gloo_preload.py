"""Imported once by the fork server, so that pool processes start with everything loaded."""

import os

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import deepspeed.comm
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer  # the first engine imports it, and the whole of torch's compiler with it

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else its first use compiles for a minute: engine/world.py
