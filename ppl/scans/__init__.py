"""A model taken apart at its scan: what comes before, one step, what comes after."""
