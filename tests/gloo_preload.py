"""Imported once by the fork server, so that pool processes start with everything loaded."""

import os

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import deepspeed.comm  # noqa: E402, F401
import torch  # noqa: E402, F401

import eagle_ds.loss  # noqa: E402, F401
import eagle_ds.model.draft  # noqa: E402, F401
