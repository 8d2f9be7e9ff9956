"""Everything that meets transformers."""
