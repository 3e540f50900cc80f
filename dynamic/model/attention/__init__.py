"""Kinds of attention: one file for each, found by name in the registry."""
