"""Ready-made distributions, processes and networks."""
