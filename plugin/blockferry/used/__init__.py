"""Which blocks of a volume are in use: one module a filesystem, and the kernel for mounted ones."""
