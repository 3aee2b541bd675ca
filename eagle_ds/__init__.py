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

__version__ = "0.1.0"
