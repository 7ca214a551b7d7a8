"""Content-addressed blobs, pins and garbage collection."""
