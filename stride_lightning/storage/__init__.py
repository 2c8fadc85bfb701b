"""Records and results on disk."""
