"""Makes checkpoints out of other files: GGUF, dense models, the embedded default."""
