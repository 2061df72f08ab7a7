"""From a function to a jaxpr whose random choices are equations, and the interpreter that runs it."""
