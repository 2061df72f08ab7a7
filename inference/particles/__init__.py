"""Sequential Monte Carlo: filters, tempering, particle Markov chain Monte Carlo."""
