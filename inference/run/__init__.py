"""How algorithms run: compiled chunks, progress, interruption, adaptation."""
