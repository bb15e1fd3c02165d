"""Sources of conversations -> a mixture -> samples -> batches."""

from train.data.dataset import COUNTED, ConversationDataset, collate, collate_counted, collate_flat
from train.data.measure import sample_lengths
from train.data.sources import RecordSet, load_records, load_tables, read_sources
from train.data.stream import ConversationStream, stream_loader
from train.data.turns import RecordError
from train.data.usable import dropped_findings, unread_columns, usable_records

__all__ = [
    "COUNTED",
    "ConversationDataset",
    "ConversationStream",
    "RecordError",
    "RecordSet",
    "collate",
    "collate_counted",
    "collate_flat",
    "dropped_findings",
    "load_records",
    "load_tables",
    "read_sources",
    "sample_lengths",
    "stream_loader",
    "unread_columns",
    "usable_records",
]
