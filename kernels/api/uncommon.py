"""Names of what only some models compute, so that only these depend on how it is computed."""

CAPS = "capped scores and logits"
FLOAT32_NORMS = "norms with float32 weights"
LAYER_NORMS = "layer norms"
LATENTS = "latent attention"
ROUTING = "routing beyond plain rules"
SHARED_EXPERTS = "shared experts"
UNGATED = "experts without gates"
