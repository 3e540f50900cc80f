"""What makes a checkpoint out of other files: GGUF, dense models, the embedded default."""
