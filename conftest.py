"""What all test runs share: two CPU devices, a compilation cache, doctests run as weft.*."""

import gc
import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent
_DEVICES = "--xla_force_host_platform_device_count"

# These are read once, when JAX's backend starts, hence before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=2".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

if os.environ.get("WEFT_TYPECHECK", "0") == "1":  # annotations, shapes among them, are checked
    from jaxtyping import install_import_hook

    install_import_hook("weft", "typechecking.checked")


def pytest_collect_file(file_path: Path) -> None:
    """Let doctests of `ppl/x.py` run in the module `weft.ppl.x` that the tests import.

    Pytest names a module after its folder, and would import a second copy of the package as
    `ppl.x`, with a second set of primitives and pytree classes. A module that fails to import is
    left to pytest to report.
    """
    parts = file_path.relative_to(ROOT).with_suffix("").parts if ROOT in file_path.parents else ()
    if file_path.suffix != ".py" or not parts or parts[0] not in ("ppl", "inference", "models"):
        return
    if parts[-1] == "__init__":
        parts = parts[:-1]
    name = ".".join(parts)
    try:
        sys.modules.setdefault(name, importlib.import_module(f"weft.{name}"))
    except Exception:
        return


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forget what was compiled at the end of each file, else a worker grows by gigabytes."""
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()
        gc.collect()
