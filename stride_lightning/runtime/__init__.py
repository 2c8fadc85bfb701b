"""The ground of every room: processes, threads, random numbers, progress, cost."""
