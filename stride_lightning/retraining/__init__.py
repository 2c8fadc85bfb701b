"""Ground truth: many models trained at once, with and without examples."""
