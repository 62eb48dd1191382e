"""megactl: the command-line toolkit for pre-training GPT models on many GPUs."""

__version__ = "0.1.0"
