"""The gvisor wall: a kernel in user space, driven through runsc."""
