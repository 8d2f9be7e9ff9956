"""Token methods: one paper, one file."""
