"""What algorithms return: draws and weighted points, their diagnostics, summaries and files."""
