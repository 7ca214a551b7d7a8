"""System calls, shaped from Python: rules, handlers and traces, behind every wall that can."""
