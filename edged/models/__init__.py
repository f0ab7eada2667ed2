"""Model folders: what may be in one, and whether it is what it claims to be."""
