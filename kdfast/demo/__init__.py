"""Toy text and toy models, made on this machine."""
