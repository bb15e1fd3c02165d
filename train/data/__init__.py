"""Sources of conversations -> a mixture -> samples -> batches."""

from train.data.dataset import COUNTED, ConversationDataset, RecordError, collate, collate_flat
from train.data.lengths import sample_lengths
from train.data.sources import RecordSet, load_records, load_tables, read_sources
from train.data.stream import ConversationStream, stream_loader
from train.data.usable import dropped_report, usable_records

__all__ = [
    "COUNTED",
    "ConversationDataset",
    "ConversationStream",
    "RecordError",
    "RecordSet",
    "collate",
    "collate_flat",
    "dropped_report",
    "load_records",
    "load_tables",
    "read_sources",
    "sample_lengths",
    "stream_loader",
    "usable_records",
]
