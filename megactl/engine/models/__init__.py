"""Registry of models. A new model is one file here and one line in MODELS; the parity suite picks it up."""

from megactl.engine.models.bert import BERT
from megactl.engine.models.gpt import GPT
from megactl.engine.models.transformer import Transformer

MODELS: dict[str, type[Transformer]] = {"gpt": GPT, "bert": BERT}
