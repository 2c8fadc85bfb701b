"""A convex readout that is refit on the features of a network; STRIDE steers it, gradient methods borrow it."""
