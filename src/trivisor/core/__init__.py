"""Small values and tools: errors, specs, states, events, units, processes, undo, paths. Imports nothing of ours."""
