"""Faces that users of other packages already know. Each is thin: the work is done in ``media`` and ``engine``."""
