"""Primitives of another language inside a Weft model are refused, with the Weft spelling."""

from __future__ import annotations

from typing import Any

from numpyro.primitives import Messenger

from .errors import ModelError


class refuse_numpyro(Messenger):
    """While a model is staged, ``numpyro.sample`` and its like are errors: unhandled, they would vanish silently."""

    def process_message(self, msg: dict[str, Any]) -> None:
        kind, name = msg.get("type"), msg.get("name")
        spelling = {
            "sample": f"weft.sample({name!r}, d), and give data with model(...).given({{{name!r}: data}})",
            "deterministic": f"weft.deterministic({name!r}, value)",
            "plate": "jax.vmap(f, axis_name=...)",
            "param": "an argument of the model",
        }.get(str(kind), "Weft's own functions")
        if kind in ("control_flow", "prng_key"):
            return
        raise ModelError(f"numpyro.{kind} {name!r} inside a Weft model: write {spelling}")
