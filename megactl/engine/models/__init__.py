"""Registry of models. A new model is one file here and one line in MODELS; the parity suite picks it up."""

from megactl.engine.models.gpt import GPT

MODELS = {"gpt": GPT}
