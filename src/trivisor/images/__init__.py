"""Images: from archives and distributions to root file systems."""
