"""One self-contained HTML page of queries with their proponents and opponents."""
