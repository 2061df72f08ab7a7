"""Laws that correct samplers obey, as checks."""
