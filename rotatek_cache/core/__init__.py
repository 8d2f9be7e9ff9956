"""What is stored and how attention reads it: torch alone, no policy."""
