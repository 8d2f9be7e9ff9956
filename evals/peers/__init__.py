"""Other ways to code all tokens of a cache, as baselines: one paper, one file."""
