"""The Hydra configuration tree: one file per command, and groups of presets."""
