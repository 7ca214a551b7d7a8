"""Virtualised applications: built, deployed and managed on machines."""
