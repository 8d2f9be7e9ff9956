"""The command `rotatek`."""
