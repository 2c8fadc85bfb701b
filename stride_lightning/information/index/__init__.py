"""The vector index of information gain."""
