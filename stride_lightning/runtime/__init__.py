"""What every room runs on: processes, threads, random numbers, progress, cost."""
