"""The run-time type checker that `conftest.py` puts on every function of Weft when asked to."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for pyright
