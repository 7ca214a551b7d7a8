"""The vm wall: QEMU, with KVM where it truly works and TCG elsewhere."""
