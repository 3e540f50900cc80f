"""Text: tokenizer, chat template, incremental detokeniser, prompt files, corpora."""
