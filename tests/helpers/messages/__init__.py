"""Every message of the package, with a call that brings it: read from the source, provoked by tests, kept in a file."""
