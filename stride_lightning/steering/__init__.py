"""STRIDE: steering operators, their measurements, and the recovery of scores."""
