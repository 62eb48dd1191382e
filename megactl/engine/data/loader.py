"""Which samples a data-parallel rank reads for each micro-batch, and reading them ahead in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType

from megactl.engine.data.batch import Batch, make_batch, make_pair_batch
from megactl.engine.data.bert import PairDataset
from megactl.engine.data.datasets import TokenDataset


class BatchLoader:
    """The micro-batches of one data-parallel rank.

    Micro-batch `index` of a step is `micro_batch_size` samples from consumed + (index x data_parallel_size + rank) x micro_batch_size on
    (Megatron's "single" sampler). The order of samples over a run thus does not depend on the layout.
    """

    def __init__(
        self,
        dataset: TokenDataset | PairDataset,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        *,
        eod: int | None,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
    ) -> None:
        assert micro_batch_size > 0 and 0 <= data_parallel_rank < data_parallel_size
        self.dataset, self.micro_batch_size = dataset, micro_batch_size
        self._rank, self._ranks, self._eod = data_parallel_rank, data_parallel_size, eod
        self._options = {
            "reset_position_ids": reset_position_ids,
            "reset_attention_mask": reset_attention_mask,
            "eod_mask_loss": eod_mask_loss,
        }

    def first_sample(self, consumed_samples: int, index: int) -> int:
        """The first sample of micro-batch `index` in the step that starts after `consumed_samples`."""
        return consumed_samples + (index * self._ranks + self._rank) * self.micro_batch_size

    def micro_batch(self, consumed_samples: int, index: int) -> Batch:
        """Micro-batch `index` of that step, on the CPU. Raises DataError as `make_batch` and `make_pair_batch` do."""
        if isinstance(self.dataset, PairDataset):
            # The document options are about running text; the settings refuse them for pairs.
            assert not any(self._options.values())
            return make_pair_batch(self.dataset, self.first_sample(consumed_samples, index), self.micro_batch_size)
        return make_batch(self.dataset, self.first_sample(consumed_samples, index), self.micro_batch_size, eod=self._eod, **self._options)

    def prefetch(self, schedule: Iterable[tuple[int, int]], *, depth: int = 4, pin_memory: bool = False) -> Prefetcher:
        """Iterate over the batches of (consumed_samples, index) pairs, up to `depth` of them made ahead. Use it in a `with`."""
        return Prefetcher(self, schedule, depth, pin_memory)


class Prefetcher:
    """An iterator over batches made by one background thread. An error in the thread is raised by the `next` in its batch's place."""

    def __init__(self, loader: BatchLoader, schedule: Iterable[tuple[int, int]], depth: int, pin_memory: bool) -> None:
        assert depth > 0
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
        self._stop = threading.Event()
        self._finished = False
        # A daemon: an exception that skips `close` must not keep the process alive.
        self._thread = threading.Thread(target=self._work, args=(loader, iter(schedule), pin_memory), name="batch-prefetch", daemon=True)
        self._thread.start()

    def _work(self, loader: BatchLoader, schedule: Iterator[tuple[int, int]], pin_memory: bool) -> None:
        last: BaseException | None = None
        try:
            for consumed, index in schedule:
                batch = loader.micro_batch(consumed, index)
                if not self._put(batch.pin_memory() if pin_memory else batch):
                    return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, item: Batch | BaseException | None) -> bool:
        """Wait for room; False once the consumer has closed. The timeout is what lets a waiting thread notice."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._finished:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, Batch):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop the thread and drop what it made. May be called twice, and by the consumer alone."""
        self._finished = True
        self._stop.set()
        while self._thread.is_alive():
            self._thread.join(0.05)
        while not self._queue.empty():
            self._queue.get_nowait()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
