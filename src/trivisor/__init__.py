"""Trivisor gives a Python program computers."""
