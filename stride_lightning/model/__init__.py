"""The user's model, borrowed: weights, layers and gradients of single examples."""
