"""The meaning of a batch: inputs, outputs, targets and losses."""
