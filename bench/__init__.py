"""One question a file, each run beside its peer. docs/benches.md says how to read them."""
