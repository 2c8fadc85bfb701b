"""What comes out: scores and what can be done with them."""
