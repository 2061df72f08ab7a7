"""Results of algorithms: draws and weighted points, their diagnostics, summaries and files."""
