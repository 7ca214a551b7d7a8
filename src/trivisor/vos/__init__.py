"""The virtual operating system: what the programs in a machine see, shaped from outside."""
