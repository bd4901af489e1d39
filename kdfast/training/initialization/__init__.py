"""Solved starts of a run."""
