"""A model: its description, its families, its decoder, and how it is loaded."""
