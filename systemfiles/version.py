"""The release of this package; recorded in every artifact it makes."""

__version__ = "0.1.0"
