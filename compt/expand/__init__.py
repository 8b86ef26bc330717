"""Inverse weight initialization: the first weights of a larger model, computed from a smaller trained one."""
