"""Disk images: in from other hypervisors, and out to them."""
