"""The reference itself: torch's arithmetic alone, the same for any cut of the batch, and settings that all have an effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megactl.engine import functional
from megactl.engine.data import make_batch
from megactl.engine.models.layers import MicroBatch
from parity.cases import MICRO_BATCH, Case, with_settings
from parity.corpus import EOD, Corpus
from parity.harness import Parity
from parity.reference import batch_losses, build_model, canonical_parameters, same_document, torch_arithmetic

CASE = Case(micro_batches=3, dropout=0.1, documents="eod")


def test_one_forward_of_the_batch_is_the_sum_of_its_micro_batches():
    run, corpus = CASE.run(), Corpus(64)
    model = build_model(run.model, run.training.seed)
    with torch_arithmetic():
        whole = batch_losses(model, run, corpus, iteration=2, start=6, size=6)
        total, count = 0.0, 0.0
        for index in range(3):
            first = index * MICRO_BATCH
            batch = make_batch(corpus, 6 + first, MICRO_BATCH, eod=EOD, eod_mask_loss=True)
            key = torch.tensor([run.training.seed, 2, first])
            logits = model(batch.tokens, MicroBatch(key, batch.position_ids))
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            total, count = total + (losses * batch.loss_mask.flatten()).sum(), count + batch.loss_mask.sum()
    assert whole.item() == pytest.approx((total / count).item(), rel=1e-13)


def test_no_hand_written_function_takes_part(monkeypatch: pytest.MonkeyPatch, parity: Parity):
    def forbidden(*arguments, **options):
        raise AssertionError("the reference called a hand-written function")

    for name in ("_Linear", "_LayerNorm", "_Embedding", "_CrossEntropy", "_Bias"):
        monkeypatch.setattr(getattr(functional, name), "apply", forbidden)
    assert parity.reference(with_settings(CASE, micro_batches=2)).losses


def test_document_mask_by_hand():
    allowed = same_document(torch.tensor([[0, 0, 1]]))[0, 0]
    assert allowed.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_a_tied_weight_is_there_once():
    tied, untied = (canonical_parameters(build_model(Case(tied=tied).run().model, 1)) for tied in (True, False))
    assert untied.keys() - tied.keys() == {"head.weight"}
    assert all(p.dtype == torch.float64 and torch.isfinite(p).all() for p in untied.values())


SETTINGS = {
    "tied": False,
    "dropout": 0.0,
    "documents": "plain",
    "clip": 0.0,
    "micro_batches": 2,
    "gelu": "erf",
    "ramp": True,
    "overflow": True,
    "seed": 1,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_changes_what_is_compared(parity: Parity, name: str):
    one, other = parity.reference(CASE), parity.reference(with_settings(CASE, **{name: SETTINGS[name]}))
    assert not np.allclose(one.weights["embedding.positions.weight"], other.weights["embedding.positions.weight"], rtol=1e-6)


def test_documents_and_clipping_are_exercised(parity: Parity):
    eod, reset = (parity.reference(with_settings(CASE, documents=documents)) for documents in ("eod", "reset"))
    assert eod.losses[0] != reset.losses[0]
    assert all(norm > CASE.clip for norm in eod.norms)
    corpus = Corpus(64)
    counted = [make_batch(corpus, i, MICRO_BATCH, eod=EOD, eod_mask_loss=True).loss_mask.sum().item() for i in range(0, 12, MICRO_BATCH)]
    assert len(set(counted)) > 3 and 0.0 in counted, "micro-batches must differ in their number of unmasked tokens, down to none"


def test_every_gradient_is_worth_comparing(parity: Parity):
    # Against a floor of RMS x sqrt(n), a tensor far below it would be compared with nothing. The key's bias, inside qkv, has no gradient.
    for arrays in parity.reference(CASE).gradients:
        rms = np.sqrt(sum(np.square(a).sum() for a in arrays.values()) / sum(a.size for a in arrays.values()))
        weak = [name for name, a in arrays.items() if np.linalg.norm(a) < 0.01 * rms * a.size**0.5]
        assert weak == []
