"""Datasets and the loader: from token files to the batches a training step reads."""

from megactl.engine.data.batch import Batch, make_batch, make_pair_batch
from megactl.engine.data.bert import BertDataset, BlendedPairs, MockPairs, PairDataset
from megactl.engine.data.build import Datasets, build_datasets
from megactl.engine.data.datasets import BlendedDataset, GPTDataset, MockDataset, TokenDataset
from megactl.engine.data.loader import BatchLoader, Prefetcher

__all__ = [
    "Batch",
    "BatchLoader",
    "BertDataset",
    "BlendedDataset",
    "BlendedPairs",
    "Datasets",
    "GPTDataset",
    "MockDataset",
    "MockPairs",
    "PairDataset",
    "Prefetcher",
    "TokenDataset",
    "build_datasets",
    "make_batch",
    "make_pair_batch",
]
