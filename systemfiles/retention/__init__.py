"""What is kept, for whom, and what goes: pins, leases of kernels and initrds, restoring, collection."""
