"""Primitives of NumPyro inside a Weft model are refused. The message gives the Weft spelling."""

from __future__ import annotations

from typing import Any

from numpyro.distributions import Unit
from numpyro.primitives import Messenger

from .errors import ModelError


class refuse_numpyro(Messenger):
    """Make ``numpyro.sample`` and its like errors while a model is staged. Unhandled, they would vanish silently."""

    def process_message(self, msg: dict[str, Any]) -> None:
        kind, name = msg.get("type"), msg.get("name")
        if kind == "sample" and isinstance(msg.get("fn"), Unit):
            kind = "factor"
        spelling = {
            "sample": f"weft.sample({name!r}, d), and give data with model(...).given({{{name!r}: data}})",
            "factor": f"weft.factor({name!r}, log_weight)",
            "deterministic": f"weft.deterministic({name!r}, value)",
            "plate": "jax.vmap(f, axis_name=...)",
            "subsample": "minibatches from outside: fit(..., data=, batch_size=) and scale(model, {axis: N / B})",
            "param": "an argument of the model",
        }.get(str(kind), "Weft's own functions")
        if kind in ("control_flow", "prng_key"):
            return
        what = f"numpyro.{kind}" + (f" {name!r}" if name else "")
        raise ModelError(f"{what} inside a Weft model: write {spelling}")
