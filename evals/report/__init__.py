"""One page out of the stored results."""
