"""The package's version, defined only here."""

__version__ = "0.2.0"
