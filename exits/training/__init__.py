"""The training core: objectives for early exits, the resumable loop, optimisers. Needs torch and safetensors only."""
