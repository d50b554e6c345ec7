"""systemfiles: versioned guest kernels and initrds for microVM hosts."""
