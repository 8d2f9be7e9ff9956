"""Which visual tokens are kept."""
