"""Fixtures for the tests."""

import signal
from collections.abc import Iterator

import jax
import jaxtyping
import pytest

from programs import quick_compilation


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """XLA without its costly passes, for tests that compile many small programs and run each once or twice."""
    with quick_compilation():
        yield


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Forbid implicit dtype and rank promotion.

    Not the default for all tests: NumPyro's own `log_prob` and `sample` promote implicitly, dtypes
    in its discrete distributions and in `LKJCholesky`, ranks in everything with an event shape. Use
    it for tests of Weft's own arithmetic, over sites such as `Normal`.
    """
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def two_devices() -> list[jax.Device]:
    """Two (fake) CPU devices, which `conftest.py` at the root of the repository asks for."""
    devices = jax.devices("cpu")
    if len(devices) < 2:
        pytest.skip("XLA_FLAGS was set by hand to fewer than two host devices")
    return devices[:2]


@pytest.fixture
def untyped() -> Iterator[None]:
    """Switch run-time type checks off, to see what Weft itself says of an argument of a wrong type."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises, also where the tests run in the background, with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
