"""One folder a wall."""
