"""Turns the arguments of the loss into one checked Problem."""
