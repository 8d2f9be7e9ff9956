"""Bases fitted to a prompt: one paper, one file."""
