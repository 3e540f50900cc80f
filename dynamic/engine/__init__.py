"""The engine: scheduler, pages, runner, sampler."""
