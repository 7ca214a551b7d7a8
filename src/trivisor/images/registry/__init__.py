"""Registries: pull and push over HTTP, after the OCI distribution specification 1.1 (docs/decisions/0009-registry-client.md)."""
