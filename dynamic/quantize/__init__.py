"""Quantisation with calibration: GPTQ, AWQ and SmoothQuant, layer by layer, into checkpoints that others can read."""
