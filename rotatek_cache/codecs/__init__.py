"""How states are stored: one interface, one file a way."""
