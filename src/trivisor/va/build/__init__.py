"""Images built from Containerfiles, each step in a machine behind a wall of the user's choice."""
