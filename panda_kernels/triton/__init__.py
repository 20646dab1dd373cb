"""Triton kernels and their launchers, a module an op. Imported only once the triton backend has been found usable."""
