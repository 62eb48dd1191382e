"""What Hugging Face's models give for small inputs, in float64: made once, kept in golden/, and made anew where transformers is installed.

    python tests/engine/bert_golden.py      # writes golden/*.safetensors; needs transformers (made with 5.23.0)

A file holds the inputs, every parameter (`weight.NAME`), the outputs and every gradient (`grad.NAME`) under their names there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

GOLDEN = Path(__file__).parent / "golden"
LAYERS, HIDDEN, HEADS, FFN, VOCAB, POSITIONS, BATCH = 2, 12, 3, 20, 37, 10, 3
KINDS = ("bert", "megatron-bert", "openai-gpt")


def path_of(kind: str) -> Path:
    """The file of a kind."""
    return GOLDEN / f"{kind}.safetensors"


def make(kind: str, attention: str = "eager") -> dict[str, Tensor]:
    """Inputs, parameters, outputs and gradients of one model."""
    generator = torch.Generator().manual_seed(KINDS.index(kind) + 1)
    model = _model(kind, attention).double().eval()
    with torch.no_grad():
        # Biases and norms must not be 0 and 1, where a wrong mapping would not show; larger weights make attention uneven.
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
    found = _inputs(kind, generator)
    outputs = _forward(kind, model, found)
    loss = _loss(outputs, found)
    loss.backward()
    found |= {name: tensor.detach() for name, tensor in outputs.items()} | {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        found[f"weight.{name}"], found[f"grad.{name}"] = parameter.detach(), parameter.grad
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _model(kind: str, attention: str) -> torch.nn.Module:
    import transformers

    if kind == "openai-gpt":
        config = transformers.OpenAIGPTConfig(
            vocab_size=VOCAB, n_positions=POSITIONS, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, afn="gelu",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return transformers.OpenAIGPTLMHeadModel(config)
    options = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FFN,
        max_position_embeddings=POSITIONS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation=attention,
    )  # fmt: skip
    if kind == "bert":
        return transformers.BertForPreTraining(transformers.BertConfig(**options, hidden_act="gelu"))
    return transformers.MegatronBertForPreTraining(transformers.MegatronBertConfig(**options, hidden_act="gelu_new"))


def _inputs(kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (BATCH, POSITIONS)
    # Id 0 is padding, whose row gets no gradient there; here it is a row like any other, and data has it at padding alone.
    tokens, labels = (torch.randint(1, VOCAB, shape, generator=generator) for _ in range(2))
    if kind == "openai-gpt":
        return {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(shape, dtype=torch.float64)}
    positions, lengths = torch.arange(POSITIONS), torch.tensor([[POSITIONS], [6], [8]])
    padding_mask = positions < lengths
    loss_mask = (torch.rand(shape, generator=generator) < 0.4) & padding_mask
    return {
        "tokens": tokens * padding_mask,
        "labels": labels,
        "loss_mask": loss_mask.double(),
        "padding_mask": padding_mask,
        "token_types": (positions >= lengths // 2).long() * padding_mask,
        "sentence_labels": torch.tensor([0, 1, 1]),
    }


def _forward(kind: str, model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if kind == "openai-gpt":
        return {"logits": model(inputs["tokens"]).logits}
    out = model(inputs["tokens"], attention_mask=inputs["padding_mask"].long(), token_type_ids=inputs["token_types"])
    return {"logits": out.prediction_logits, "sentence_logits": out.seq_relationship_logits}


def _loss(outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Mean over counted tokens plus mean over sequences; their own losses are always made in fp32, and with labels inside the model."""
    tokens = F.cross_entropy(outputs["logits"].flatten(0, 1), inputs["labels"].flatten(), reduction="none")
    loss = (tokens * inputs["loss_mask"].flatten()).sum() / inputs["loss_mask"].sum()
    return loss + F.cross_entropy(outputs["sentence_logits"], inputs["sentence_labels"]) if "sentence_logits" in outputs else loss


if __name__ == "__main__":
    from safetensors.torch import save_file

    GOLDEN.mkdir(exist_ok=True)
    for name in KINDS:
        save_file(make(name), path_of(name))
        print(path_of(name), path_of(name).stat().st_size)
