"""Kernels in C (and what calls them) for what torch does not do well."""
