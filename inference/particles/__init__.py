"""Sequential Monte Carlo: filters, tempering, particle Markov chains."""
