"""Training: the trainable decoder, text, recipes, export. The loop itself is in ``exits.training``."""
