"""What an import loads, and what it sets: the language does not load what it does not need."""

import os
import subprocess
import sys
import types

import jaxlib
import pytest
from weft.ppl.stage.compat import num_cores

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


# Rows of squares of a matrix-vector product: jaxlib 0.10.2 gives 1065369600 for the last of them (jax-ml/jax#39103).
LAST_ROW = """
def last_row(n):
    i = jnp.arange(n, dtype=float)
    rows = jnp.stack((i, 0 * i, 0 * i), axis=1)
    return float(jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)[-1])
"""
FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def outcome(code: str, flags: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    """What a fresh process prints, in which XLA has no other settings than these."""
    env = {k: v for k, v in os.environ.items() if k not in ("PJRT_NPROC", "NPROC")}
    return subprocess.run(
        [sys.executable, "-c", f"import os, jax, jax.numpy as jnp\n{LAST_ROW}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        env={**env, "XLA_FLAGS": flags, **settings},
        timeout=300,
    )


def test_sums_over_many_rows_are_right_after_the_import() -> None:
    run = outcome("""
import weft
print(last_row(32_769) == 32_768**2)
with jax.enable_x64(True):
    print(last_row(16_385) == 16_384**2)""")
    assert run.stdout.split() == ["True", "True"]
    assert "RuntimeWarning" not in run.stderr


def test_a_flag_that_is_set_is_left_alone() -> None:
    run = outcome("import weft; print(os.environ['XLA_FLAGS'])", f"{FLAG}=-dot")
    assert run.stdout.split() == [f"{FLAG}=-dot"]


def test_that_jax_has_started_before_the_import_is_said() -> None:
    run = outcome("jax.devices(); import weft")
    version = jaxlib.version.__version_info__[:3]
    waits = (0, 10) <= version <= (0, 11, 0) and num_cores() < 16
    for fault, affected in (
        ("gives wrong sums", (0, 10, 2) <= version < (0, 13)),
        ("may wait forever", waits),
    ):
        said = f"RuntimeWarning: jaxlib {jaxlib.__version__} {fault}" in run.stderr
        assert said == affected
        assert not affected or "Import weft before the first computation" in run.stderr


def test_batches_of_solves_at_the_same_time_end() -> None:
    """In jaxlib 0.10.0 to 0.11.0 they would wait for each other, see `keep_solves_from_waiting`."""
    run = outcome("""
import weft
def total(x):
    factor = jnp.tril(jnp.ones((7, 7))) + 1e-3 * x[:, :, None]
    return sum(
        jnp.sum(jax.lax.linalg.triangular_solve(i * factor, x[..., None], left_side=True, lower=True))
        for i in range(1, 7)
    )
slope = jax.jit(jax.grad(total))
for i in range(20):
    jax.block_until_ready(slope(jnp.ones((20_000, 7)) + i))
print("done")""")
    assert run.stdout.split() == ["done"]


def test_a_number_of_threads_that_is_set_is_left_alone() -> None:
    code = "import weft; print(os.environ.get('PJRT_NPROC'))"
    assert outcome(code, NPROC="3").stdout.split() == ["None"]
    assert outcome(code, PJRT_NPROC="3").stdout.split() == ["3"]
