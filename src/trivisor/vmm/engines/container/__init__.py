"""The container wall: the host's kernel, through our own launcher."""
