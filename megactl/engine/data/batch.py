"""From samples to the tensors of one micro-batch: a pure function, so that resuming needs only the number of consumed samples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from megactl.engine.data.bert import PairDataset
from megactl.engine.data.datasets import TokenDataset
from megactl.errors import DataError


class Batch(NamedTuple):
    """One micro-batch of b sequences of s tokens, on the CPU.

    tokens, labels, position_ids int64 [b, s]; loss_mask float32 [b, s], 0 where a label does not count;
    segments int64 [b, s], the number of the document inside the sequence, or None where attention may cross documents.
    Only for encoders (None otherwise): token_types int64 [b, s], 0 in the first part of a sentence pair and 1 in the second;
    padding_mask bool [b, s], True where there is a token; sentence_labels int64 [b], 1 where the second part does not follow the first.
    Only where a rank holds some tokens of each sequence (None otherwise): rows int64 [b, s], the index of each token within the
    [samples, sequence] of the global batch; segments and padding_mask are those of whole sequences; block_segments stands in place of
    segments where attention makes its masks block by block.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor | None
    token_types: torch.Tensor | None = None
    padding_mask: torch.Tensor | None = None
    sentence_labels: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    block_segments: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where a copy to the GPU does not block."""
        return Batch(*(tensor.pin_memory() if tensor is not None else None for tensor in self))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; the copy is asynchronous from pinned memory."""
        return Batch(*(tensor.to(device, non_blocking=True) if tensor is not None else None for tensor in self))


def make_batch(
    dataset: TokenDataset,
    first_sample: int,
    count: int,
    *,
    eod: int | None,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    eod_mask_loss: bool = False,
) -> Batch:
    """Samples [first_sample, first_sample + count) as a batch.

    A document ends with its `eod` token; the token after it starts the next one. `eod_mask_loss` takes out the loss where the INPUT is the
    end-of-document token (Megatron's rule): what follows it cannot be predicted from the finished document.
    Raises DataError beyond the dataset's end, for ids outside the vocabulary, and where a document option is on but `eod` is None.
    """
    options = {"reset-position-ids": reset_position_ids, "reset-attention-mask": reset_attention_mask, "eod-mask-loss": eod_mask_loss}
    wanted = [name for name, on in options.items() if on]
    if wanted and eod is None:
        raise DataError(f"--{wanted[0]}: the tokenizer has no known end-of-document token", "name the --tokenizer the data was made with")
    check_range(dataset, first_sample, count)
    rows = np.stack([dataset.tokens(first_sample + i) for i in range(count)])
    tokens, labels = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
    loss_mask = np.ones(tokens.shape, np.float32)
    if eod_mask_loss:
        loss_mask[tokens == eod] = 0.0
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy()
    segments = None
    if reset_position_ids or reset_attention_mask:
        starts = _document_starts(tokens, eod)
        if reset_position_ids:
            positions -= np.maximum.accumulate(np.where(starts, positions, 0), axis=1)
        if reset_attention_mask:
            segments = torch.from_numpy(np.cumsum(starts, axis=1, dtype=np.int64))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(loss_mask), torch.from_numpy(positions), segments)


def make_pair_batch(dataset: PairDataset, first_sample: int, count: int) -> Batch:
    """Samples [first_sample, first_sample + count) of an encoder's dataset as a batch; labels are 0 where `loss_mask` is.

    Raises DataError beyond the dataset's end, and for ids outside the vocabulary.
    """
    check_range(dataset, first_sample, count)
    samples = [dataset.sample(first_sample + i) for i in range(count)]
    tokens, types, labels, loss_mask = (torch.from_numpy(np.stack([sample[field] for sample in samples])) for field in range(4))
    positions = torch.arange(dataset.seq_length).expand(count, -1).contiguous()
    lengths = torch.tensor([sample.length for sample in samples])
    flags = torch.tensor([int(sample.flag) for sample in samples]) if dataset.pair else None
    return Batch(tokens, labels, loss_mask, positions, None, types, positions < lengths[:, None], flags)


def check_range(dataset: TokenDataset | PairDataset, first_sample: int, count: int) -> None:
    """Raise DataError unless the dataset has samples [first_sample, first_sample + count)."""
    if first_sample < 0 or first_sample + count > len(dataset):
        rule = f"{dataset.name} has {len(dataset)}"
        raise DataError(
            f"samples {first_sample} to {first_sample + count}: {rule}", "ask for as many samples as the run consumes (iterations, batch)"
        )


def _document_starts(tokens: np.ndarray, eod: int | None) -> np.ndarray:
    """bool [b, s]: true after each end-of-document token. The first token of a sequence continues whatever it is cut from."""
    starts = np.zeros(tokens.shape, bool)
    starts[:, 1:] = tokens[:, :-1] == eod
    return starts
