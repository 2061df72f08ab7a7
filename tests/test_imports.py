"""What an import loads: the language does not load what it does not need."""

import subprocess
import sys
import types

import pytest

import weft

HEAVY = [
    *("blackjax", "arviz", "pandas", "xarray", "diffrax", "matplotlib", "optax"),
    *("scipy.stats", "scipy.optimize", "weft.inference", "weft.models", "weft.ppl.exact"),
]


def loaded(code: str) -> set[str]:
    """Those of the heavy modules that a new interpreter has loaded after some code."""
    code = f"import sys\n{code}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_language_loads_no_more_than_numpyro() -> None:
    assert loaded("import weft") <= loaded("import numpyro")


def test_inference_loads_libraries_on_first_use() -> None:
    own = {name for name in HEAVY if name.startswith("weft.")}
    assert loaded("import weft.inference, weft.models") <= loaded("import numpyro") | own


@pytest.mark.parametrize("package", [weft, weft.ppl], ids=lambda p: p.__name__)
def test_names_that_are_loaded_later_are_there(package: object) -> None:
    code = (
        f"import {package.__name__} as p; names = dir(p); print(*(n for n in names if n[0] != '_'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = run.stdout.split()
    assert {"marginalize", "expect", "explain", "gradients"} <= set(names)
    for name in names:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'marginalise'"):
        _ = package.marginalise  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", [weft, weft.ppl], ids=lambda p: p.__name__)
def test_a_star_brings_the_names_that_are_loaded_later(package: object) -> None:
    code = f"from {package.__name__} import *; print(*(n for n in dir() if n[0] != '_'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(run.stdout.split())
    assert {"gen", "marginalize", "expect", "gradients"} <= names
    assert "TYPE_CHECKING" not in names


def test_a_file_is_read_without_further_imports(tmp_path: object) -> None:
    code = f"""
import jax, numpyro.distributions as dist, weft
draws = weft.inference.SequentialParticles({{}}, log_weights=jax.numpy.zeros(3))
draws.save({str(tmp_path)!r} + "/p")"""
    loaded(code)
    assert "weft.inference" in loaded(f"import weft; weft.load({str(tmp_path)!r} + '/p')")


def test_a_function_is_found_before_the_file_of_its_name() -> None:
    import weft.ppl

    assert weft.ppl.marginalize.__name__ == "marginalize"
    assert not isinstance(weft.ppl.marginalize, types.ModuleType)
    assert isinstance(weft.ppl.gradients, types.ModuleType)
