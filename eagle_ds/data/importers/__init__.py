"""Other projects' hidden-state files, read one sample at a time into what the store holds.

`iter_source` finds the samples, `SourceItem.load` reads, checks and completes one, `Rejected` says why one cannot be had.
"""

from eagle_ds.data.importers.completion import Completer, FinalNorm
from eagle_ds.data.importers.formats import RawSample
from eagle_ds.data.importers.hdf5_files import Hdf5Map
from eagle_ds.data.importers.masks import ConversationMasks
from eagle_ds.data.importers.rejected import Reason, Rejected
from eagle_ds.data.importers.sources import SourceItem, iter_source

__all__ = ["Completer", "ConversationMasks", "FinalNorm", "Hdf5Map", "RawSample", "Reason", "Rejected", "SourceItem", "iter_source"]
