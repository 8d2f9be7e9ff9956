"""Storage and the attention that reads it: torch alone, no policy."""
