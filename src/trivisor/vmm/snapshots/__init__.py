"""Snapshots, suspend and fork: what is kept of frozen machines, and how machines come back from it.

An engine freezes a machine into a folder that it alone understands (vmm/freezer.py). Here those folders are named, listed, counted,
verified, packed, and given to machines:

model       what is known of one
table       its row in the home's database
keeping     its folder: made aside, there while somebody needs it, gone after that
verbs       snapshot, restore, fork, suspend
thawing     the way back, as a part of a start
"""
