"""What lies on disk: token files, tokenizers, preprocessing, sample indices, checkpoints. No torch."""
