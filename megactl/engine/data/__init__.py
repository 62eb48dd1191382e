"""Datasets and the loader: from token files to the batches a training step reads."""

from megactl.engine.data.batch import Batch, make_batch
from megactl.engine.data.build import Datasets, build_datasets
from megactl.engine.data.datasets import BlendedDataset, GPTDataset, MockDataset, TokenDataset
from megactl.engine.data.loader import BatchLoader, Prefetcher

__all__ = [
    "Batch",
    "BatchLoader",
    "BlendedDataset",
    "Datasets",
    "GPTDataset",
    "MockDataset",
    "Prefetcher",
    "TokenDataset",
    "build_datasets",
    "make_batch",
]
