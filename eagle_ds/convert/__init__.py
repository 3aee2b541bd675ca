"""Other projects' hidden-state files, read one sample at a time into what the store holds.

`iter_source` finds the samples, `SourceItem.load` reads, checks and completes one, `Rejected` says why one cannot be had.
"""

from eagle_ds.convert.completion import Completer, FinalNorm
from eagle_ds.convert.formats import RawSample
from eagle_ds.convert.hdf5_files import Hdf5Map
from eagle_ds.convert.masks import ConversationMasks
from eagle_ds.convert.rejected import Reason, Rejected
from eagle_ds.convert.sources import SourceItem, iter_source

__all__ = ["Completer", "ConversationMasks", "FinalNorm", "Hdf5Map", "RawSample", "Reason", "Rejected", "SourceItem", "iter_source"]
