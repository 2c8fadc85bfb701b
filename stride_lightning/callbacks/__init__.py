"""What a Trainer sees."""
