"""Releases: artifacts with the documents that go with them, signed, published, and fetched by hosts that build none."""
