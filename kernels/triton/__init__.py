"""The GPU backend: Triton kernels, their launches, plans and tuning."""
