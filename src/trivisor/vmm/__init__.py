"""The life of machines."""
