"""Bases fitted once per model, over many images."""
