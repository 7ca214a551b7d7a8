"""The verbs, one file each; the four shortest of a machine's life share one."""
