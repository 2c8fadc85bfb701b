"""Reading data: examples in fixed order, where they come from, and one loop that reads them."""
