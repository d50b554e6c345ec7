"""Releases: built twice, published, signed, fetched, and tampered with."""
