"""Memory of a machine, from outside: copied, read, written, searched, and understood as far as its kernel's own symbols and types say."""
