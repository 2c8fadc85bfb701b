"""A readout refit on a network's features."""
