"""Conversion: other projects' hidden-state files, read one sample at a time into a store.

    run.py           the whole conversion: survey, workers, manifest, rejected files, deletion of sources
    options.py       what the user asked for; the store's info and the completion rules that follow from it
    survey.py        looks at a few files first; predicts the size and time of the conversion
    sources.py       finds the files, and the samples in them
    formats.py       RawSample: what every reader returns. Rejected: why a file cannot be converted
    torch_files.py   reads .ckpt and .pt files
    hdf5_files.py    reads HDF5 files
    completion.py    checks a RawSample and adds what its format lacks
    masks.py         makes loss masks from conversations
    worker.py        converts one sample, in this process or in several

`iter_source` finds the samples, `SourceItem.load` reads, checks and completes one, `Rejected` says why it
cannot.
"""

# ruff: noqa: F401 - these names are the package's interface
from eagle_ds.convert.completion import Completer, FinalNorm
from eagle_ds.convert.formats import RawSample, Reason, Rejected
from eagle_ds.convert.hdf5_files import Hdf5Map
from eagle_ds.convert.masks import ConversationMasks
from eagle_ds.convert.sources import SourceItem, iter_source
