"""Checkpoints that are complete or not there, and runs that resume from them however they ended."""
