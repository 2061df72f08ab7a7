"""What users hold: models, programs, traces, targets, and what is asked of them."""
