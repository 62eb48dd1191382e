"""Runs a case on the engine and on the reference."""

from __future__ import annotations

from dataclasses import replace

from parity.cases import Case
from parity.comparison import deviations
from parity.corpus import Corpus, PairCorpus
from parity.jobs import RankResult, train
from parity.pool import Pools
from parity.reference import Trajectory, train_reference


class Parity:
    """Cases on the workers, references here; a reference is computed once for all layouts it serves."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._corpora = {("gpt", True): Corpus(1024), **{("bert", padding): PairCorpus(1024, padding=padding) for padding in (True, False)}}
        self._references: dict[str, Trajectory] = {}

    def engine(self, case: Case, *, mutation: str | None = None, ops: str | None = None) -> list[RankResult]:
        """What each rank did."""
        return self._pools.run(case.world_size, train, case.run(), self.corpus(case), case.plan(), mutation, ops)

    def corpus(self, case: Case) -> Corpus | PairCorpus:
        """What the case trains on."""
        return self._corpora[case.model, case.padding]

    def reference(self, case: Case) -> Trajectory:
        """What the plain model does with the case's model, data and batch, in float64 whatever the case's precision."""
        run = case.run()
        # How the work is spread is not part of the question.
        training = replace(run.training, precision="fp64", initial_loss_scale=None, loss_scale_window=None)
        key = repr((replace(run, parallel=None, memory=None, training=training), case.plan(), case.padding))
        if key not in self._references:
            self._references[key] = train_reference(run, self.corpus(case), case.plan())
        return self._references[key]

    def deviations(self, case: Case, tolerance: float, *, mutation: str | None = None, ops: str | None = None) -> list[str]:
        """See `comparison.deviations`."""
        results = self.engine(case, mutation=mutation, ops=ops)
        return deviations(results, self.reference(case), tolerance, case.plan().overflows, case.scales())
