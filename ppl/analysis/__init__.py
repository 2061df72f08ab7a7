"""What can be read off a jaxpr: dependence, constants, equality of code."""
