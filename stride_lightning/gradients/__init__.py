"""The gradient family: features of gradients, a curvature, and checkpoints."""
