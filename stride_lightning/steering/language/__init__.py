"""STRIDE for language models, token by token."""
