"""The nouns that users hold (models, programs, traces, targets), and their methods."""
