"""Batches: shapes, document boundaries, samplers, and reading ahead."""

import threading
import time

import numpy as np
import pytest
import torch

from megactl.engine.data import BatchLoader, MockDataset, make_batch
from megactl.errors import DataError

EOD = 9


class Fixed:
    """A dataset of given rows."""

    name, vocab_size = "fixed", 10

    def __init__(self, rows):
        self.rows = np.array(rows, np.int64)
        self.seq_length = self.rows.shape[1] - 1

    def __len__(self):
        return len(self.rows)

    def tokens(self, index):
        return self.rows[index]


ROWS = Fixed([[1, 2, EOD, 3, 4, EOD, EOD, 5, 6], [EOD, 1, 2, 3, 4, 5, 6, 7, EOD]])


def test_plain_batch():
    batch = make_batch(ROWS, 0, 2, eod=EOD)
    assert batch.tokens.tolist() == ROWS.rows[:, :-1].tolist() and batch.labels.tolist() == ROWS.rows[:, 1:].tolist()
    assert batch.loss_mask.tolist() == [[1.0] * 8] * 2 and batch.position_ids.tolist() == [list(range(8))] * 2
    assert batch.segments is None
    assert [t.dtype for t in batch[:4]] == [torch.int64, torch.int64, torch.float32, torch.int64]
    assert all(t.is_contiguous() for t in batch[:4])


def test_positions_restart_after_each_document():
    batch = make_batch(ROWS, 0, 2, eod=EOD, reset_position_ids=True)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert batch.segments is None


def test_segments_number_the_documents():
    batch = make_batch(ROWS, 0, 2, eod=EOD, reset_attention_mask=True)
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1, 1]]
    assert batch.segments.dtype == torch.int64 and batch.position_ids.tolist() == [list(range(8))] * 2


def test_no_loss_where_the_input_ends_a_document():
    batch = make_batch(ROWS, 0, 2, eod=EOD, eod_mask_loss=True)
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1, 1]]


def segments_by_hand(row):
    out, number = [], 0
    for token in row[:-1]:
        out.append(number)
        number += token == EOD
    return out


def test_random_rows_against_a_loop():
    rows = np.random.default_rng(4).choice([1, 2, 3, EOD], size=(50, 21))
    batch = make_batch(Fixed(rows), 0, 50, eod=EOD, reset_attention_mask=True, reset_position_ids=True)
    for row, segments, positions in zip(rows, batch.segments.tolist(), batch.position_ids.tolist(), strict=True):
        expected = segments_by_hand(row.tolist())
        assert segments == expected
        assert positions == [i - expected.index(segment) for i, segment in enumerate(expected)]


@pytest.mark.parametrize("option", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_document_options_need_an_end_of_document(option):
    with pytest.raises(DataError, match=option.replace("_", "-")):
        make_batch(ROWS, 0, 1, eod=None, **{option: True})


@pytest.mark.parametrize("first, count", [(0, 3), (2, 1), (-1, 1)])
def test_beyond_the_end_is_an_error(first, count):
    with pytest.raises(DataError, match="fixed has 2"):
        make_batch(ROWS, first, count, eod=EOD)


def numbered(count):
    return Fixed([[i // 1000, i // 100 % 10, i // 10 % 10, i % 10, 0] for i in range(count)])


def read(loader, consumed, index):
    return [int("".join(map(str, row))) for row in loader.micro_batch(consumed, index).tokens.tolist()]


@pytest.mark.parametrize("micro, ranks, steps", [(1, 1, 12), (2, 3, 2), (3, 2, 2), (1, 4, 3), (6, 1, 2)])
def test_every_layout_reads_the_same_samples_in_a_step(micro, ranks, steps):
    data = numbered(100)
    loaders = [BatchLoader(data, micro, rank, ranks, eod=None) for rank in range(ranks)]
    got = [sample for index in range(steps) for loader in loaders for sample in read(loader, 24, index)]
    assert got == list(range(24, 24 + micro * ranks * steps))


def test_resume_is_the_number_of_consumed_samples():
    data = numbered(200)
    whole = [read(BatchLoader(data, 2, 1, 2, eod=None), step * 8, index) for step in range(10) for index in range(2)]
    resumed = [read(BatchLoader(data, 2, 1, 2, eod=None), step * 8, index) for step in range(6, 10) for index in range(2)]
    assert whole[12:] == resumed


def test_prefetch_gives_the_same_batches_in_order():
    loader = BatchLoader(numbered(100), 2, 0, 1, eod=None, reset_position_ids=False)
    schedule = [(step * 8, index) for step in range(5) for index in range(4)]
    with loader.prefetch(schedule, depth=3) as batches:
        found = [batch.tokens.tolist() for batch in batches]
    assert found == [loader.micro_batch(*place).tokens.tolist() for place in schedule]


def test_prefetch_raises_in_the_consumer_and_in_place():
    loader = BatchLoader(numbered(5), 2, 0, 1, eod=None)
    with loader.prefetch([(0, 0), (0, 1), (0, 2), (0, 3)]) as batches:
        assert len([next(batches), next(batches)]) == 2
        with pytest.raises(DataError, match="fixed has 5"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)


class Counting(Fixed):
    """Counts the samples that were read."""

    def __init__(self):
        super().__init__([[1, 2]] * 1000)
        self.read = 0

    def tokens(self, index):
        self.read += 1
        return self.rows[index]


def test_prefetch_is_bounded_and_closes_while_its_thread_waits():
    before, data = threading.active_count(), Counting()
    batches = BatchLoader(data, 1, 0, 1, eod=None).prefetch([(i, 0) for i in range(1000)], depth=3)
    next(batches)
    deadline = time.monotonic() + 5
    while data.read < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    # One given out, three in the queue, one in the thread's hands.
    assert data.read == 5
    batches.close()
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


def test_a_batch_learns_nothing_from_where_it_is_made():
    loader = BatchLoader(
        MockDataset(64, seq_length=32, vocab_size=50, eod=3), 4, 0, 2, eod=3, reset_attention_mask=True, eod_mask_loss=True
    )
    first, again = loader.micro_batch(16, 1), loader.micro_batch(16, 1)
    assert all(one is two is None or torch.equal(one, two) for one, two in zip(first, again, strict=True))
    moved = first.to("cpu")
    assert torch.equal(moved.tokens, first.tokens) and moved.segments is not None
