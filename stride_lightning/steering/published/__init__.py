"""The learned basis, as published, and the Trainer that fits it."""
