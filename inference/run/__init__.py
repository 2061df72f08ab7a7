"""How an algorithm runs: compiled chunks, progress, interruption, adaptation."""
