"""Results in one file: arrays, and a description of how they nest. Nothing in it can be executed.

A file is a zip archive. It holds arrays in the format ``.npy``, so ``numpy.load`` can open it, and an entry
``weft.json``:

    {"format": 1, "kind": "draws", "type": "weft.inference.results.draws.Draws", "meta": {},
     "tree": {"dict": [["choices", {"dict": [["mu", {"array": "..."}]]}]]}}

Dicts, lists, tuples, numbers, strings, None, arrays and random keys are rebuilt as they were, to the bit and to the
dtype. Any other pytree, such as a module of parameters, is stored as its leaves. It is read into a template of the same
structure (``like=``), so that no file can name code to run. A file is written under another name, and renamed when it
is complete. So an interrupted `save` leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
from weft.ppl.stage.compat import Tracer
from weft.ppl.stage.errors import WeftError

FORMAT = 1
_INDEX = "weft.json"

PathLike = str | os.PathLike[str]


class StorageError(WeftError):
    """A file that cannot be written or read."""


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
        kind: the name under which the type of the result registered.
        tree: the arrays, nested as they were given.
        meta: what else was noted, as JSON can hold it.
        path: the file that it was read from.
        type: the full name of the class that wrote it, for messages. Empty in files of early versions.
    """

    kind: str
    tree: Any
    meta: dict[str, Any]
    path: str
    type: str = ""


R = TypeVar("R")

_types: dict[str, type[Any]] = {}


def result_type(kind: str) -> Callable[[type[R]], type[R]]:
    """Register a class of results where it is defined, so that `load` reads the files that it writes.

    The class has a method `save(path)`, which calls `write(path, kind, ...)`. And it has a method
    `from_saved(saved, target)`, which rebuilds a result from a `Saved`.

    Args:
        kind: the name of the class in files. It must never change, since old files carry it.

    Returns:
        A class decorator that leaves the class as it is.

    Raises:
        StorageError: if another class has this name, if the class lacks one of the two methods, or if the name is no
            string.

    Examples:
        >>> import equinox as eqx, jax.numpy as jnp
        >>> from weft.inference.results.storage import result_type, write
        >>> @result_type("a mean")
        ... class Mean(eqx.Module):
        ...     value: float
        ...     def save(self, path):
        ...         write(path, "a mean", {"value": self.value})
        ...     @classmethod
        ...     def from_saved(cls, saved, target=None):
        ...         return cls(**saved.tree)
    """
    if not isinstance(kind, str):
        raise StorageError(
            f"result_type takes the name of the class in files, @result_type('my results'), got {kind!r}"
        )

    def register(cls: type[R]) -> type[R]:
        for method in ("save", "from_saved"):
            if not callable(getattr(cls, method, None)):
                raise StorageError(
                    f"result_type({kind!r}): {_full_name(cls)} has no method {method!r}{_nearest(method, dir(cls))}"
                )
        other = _types.get(kind)
        if other is not None and _full_name(other) != _full_name(cls):  # a cell that runs again
            raise StorageError(
                f"result_type({kind!r}): {_full_name(other)} has this name already; give {_full_name(cls)} another"
            )
        _types[kind] = cls
        return cls

    return register


def kind_of(cls: type[Any]) -> str:
    """The name under which a class registered.

    Raises:
        StorageError: if it did not register.
    """
    for kind, known in _types.items():
        if known is cls:
            return kind
    raise StorageError(
        f"{_full_name(cls)} is not registered, so that no file of it could be read: decorate the class with "
        "result_type(kind)"
    )


def _full_name(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f" (but {found[0]!r})" if found else ""


def load(path: PathLike, target: Any = None, like: Any = None) -> Any:
    """Read the result that `result.save(path)` wrote.

    Args:
        path: the file.
        target: the target of the result. A file holds no code, and so no model. Without a target the result has its
            arrays, tables and exports, but cannot score or predict. So it has no `log_likelihood` for ArviZ, for
            example.
        like: a template for a `Fit` whose parameters are not only dicts, lists and tuples of arrays, but modules, for
            example. It is another such `Fit`, or parameters of the same structure, shapes and dtypes.

    Returns:
        The result as it was saved: `Draws`, `Particles`, `SequentialParticles`, `Fit`, or any other type that has
        registered (`result_type`). Arrays of 64 bits are NumPy arrays unless JAX is set to hold them
        (`jax_enable_x64`).

    Raises:
        FileNotFoundError: if there is no such file.
        StorageError: if the file is not one of Weft, is damaged, has a later format, or holds a type that has not
            registered. In the last case the message names the module to import.
        WeftError: if it was written for another target.

    Examples:
        >>> import tempfile, pathlib
        >>> import jax.numpy as jnp
        >>> from weft.inference import Draws, load
        >>> draws = Draws(choices={"mu": jnp.zeros((4, 10))}, stats={"lp": jnp.zeros((4, 10))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draws.save(pathlib.Path(folder) / "draws.npz")
        ...     again = load(pathlib.Path(folder) / "draws.npz")
        >>> again.choices["mu"].shape
        (4, 10)
    """
    saved = read(path, None if like is None else {"params": getattr(like, "params", like)})
    if saved.kind in _types:
        return _types[saved.kind].from_saved(saved, target)
    module = saved.type.rpartition(".")[0]
    cure = f"it was written by {saved.type}, so import {module} first" if module else ""
    raise StorageError(
        f"{saved.path} holds a result of unknown kind {saved.kind!r}{_nearest(saved.kind, _types)}: "
        f"{cure or 'import the module that defines its type first'}"
    )


def write(path: PathLike, kind: str, tree: Any, meta: Mapping[str, Any] | None = None) -> None:
    """Write one result. The file appears, or replaces the old one, only when it is complete.

    Args:
        path: the file. Its folder must exist.
        kind: the name under which the type of the result registered.
        tree: dicts with strings as keys, lists, tuples, arrays, random keys, numbers, strings and None. Other pytrees
            are stored as their leaves.
        meta: anything that JSON can hold.

    Raises:
        StorageError: if no type has registered under this name, if the path is a folder, if its folder is missing,
            under tracing, or for a leaf of another type.
    """
    if kind not in _types:
        raise StorageError(
            f"write: no result is called {kind!r}{_nearest(kind, _types)}; a class registers with result_type(kind)"
        )
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise StorageError(
            f"cannot save to {os.fspath(path)!r}: it is a folder; give a file name in it"
        )
    if not final.parent.is_dir():
        raise StorageError(
            f"cannot save to {os.fspath(path)!r}: there is no folder {str(final.parent)!r}"
        )
    arrays: dict[str, Any] = {}  # by name: as it was given, and as it is written
    index = {
        "format": FORMAT,
        "kind": kind,
        "type": _full_name(_types[kind]),
        "meta": dict(meta or {}),
        "tree": _encode(tree, (), arrays),
    }
    text = json.dumps(index)
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    try:
        with open(partial, "xb") as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(_INDEX, text)
                for name, (_, array) in arrays.items():
                    with archive.open(name, "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, final)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def read(path: PathLike, like: Any = None) -> Saved:
    """Read what `write` wrote.

    Args:
        path: the file.
        like: a template for the parts that are no plain containers, as in `load`.

    Raises:
        FileNotFoundError: if there is no such file.
        StorageError: if the file is not one of Weft, is damaged or has a later format, or if the template does not
            fit.
    """
    where = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {where!r}")
    if os.path.isdir(path):
        raise StorageError(f"{where!r} is a folder, not a file written by .save(path)")
    if not zipfile.is_zipfile(path):
        raise StorageError(f"{where!r} is not a Weft file, or is cut short: it is no zip archive")
    try:
        with zipfile.ZipFile(path) as archive:
            if _INDEX not in archive.namelist():
                raise StorageError(
                    f"{where!r} is not a Weft file: it is an archive without {_INDEX}"
                )
            index = json.loads(archive.read(_INDEX))
            if index["format"] > FORMAT:
                raise StorageError(
                    f"{where!r} has format {index['format']}, written by a later Weft; this one reads up to format "
                    f"{FORMAT}: upgrade weft"
                )
            tree = _decode(index["tree"], archive, like, ())
            return Saved(index["kind"], tree, index["meta"], where, index.get("type", ""))
    except (zipfile.BadZipFile, json.JSONDecodeError, KeyError, TypeError, EOFError) as error:
        raise StorageError(f"{where!r} is damaged: {error}") from error


# --------------------------------------------------------------------------- trees to JSON and back


def _encode(node: Any, at: tuple[str, ...], arrays: dict[str, Any]) -> dict[str, Any]:
    if type(node) is dict:
        for key in node:
            if not isinstance(key, str):
                raise StorageError(
                    f"cannot save {_named(at)}: the key {key!r} of a dict is not a string"
                )
        return {"dict": [[k, _encode(v, (*at, k), arrays)] for k, v in node.items()]}
    if type(node) in (list, tuple):
        items = [_encode(v, (*at, str(i)), arrays) for i, v in enumerate(node)]
        return {type(node).__name__: items}
    if node is None or type(node) in (bool, int, float, str):
        return {"value": node}
    if isinstance(node, (jax.Array, np.ndarray, np.generic)):
        return _encode_array(node, at, arrays)
    leaves, treedef = jax.tree.flatten(node)
    if jax.tree_util.treedef_is_leaf(treedef):
        # a function or another constant of a module: the template has it
        return {"constant": type(node).__qualname__}
    items = [_encode(leaf, (*at, str(i)), arrays) for i, leaf in enumerate(leaves)]
    return {"pytree": type(node).__qualname__, "leaves": items}


def _encode_array(node: Any, at: tuple[str, ...], arrays: dict[str, Any]) -> dict[str, Any]:
    if isinstance(node, Tracer):
        raise StorageError(
            f"cannot save {_named(at)} under jit or vmap: return the result and save it outside"
        )
    extra: dict[str, Any] = {}
    given = node
    if jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
        extra["key"] = str(jax.random.key_impl(node))
        node = jax.random.key_data(node)
    array = np.asarray(node)
    if array.dtype.hasobject:
        raise StorageError(f"cannot save {_named(at)}: an array of Python objects")
    if array.dtype.isbuiltin == 2:  # bfloat16 and its kin: NumPy's format knows their bytes only
        extra["dtype"] = array.dtype.name
        array = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)
    # An array that stands in several places is written once.
    own = f"{'/'.join(quote(part, safe='') for part in at) or 'array'}.npy"
    name = next((name for name, (other, _) in arrays.items() if other is given), own)
    arrays[name] = (given, array)
    return {"array": name, **extra}


def _decode(node: dict[str, Any], archive: zipfile.ZipFile, like: Any, at: tuple[str, ...]) -> Any:
    if "dict" in node:
        inner = like if isinstance(like, Mapping) else {}
        return {k: _decode(v, archive, inner.get(k), (*at, k)) for k, v in node["dict"]}
    for name, kind in (("list", list), ("tuple", tuple)):
        if name in node:
            items = node[name]
            inner = like if isinstance(like, (list, tuple)) else [None] * len(items)
            if len(inner) != len(items):
                raise StorageError(
                    f"{_named(at)}: the file has {len(items)} entries, `like` {len(inner)}"
                )
            pairs = enumerate(zip(items, inner, strict=True))
            return kind(_decode(v, archive, t, (*at, str(i))) for i, (v, t) in pairs)
    if "value" in node:
        return node["value"]
    if "array" in node:
        return _decode_array(node, archive)
    if "constant" in node:
        if like is None:
            raise StorageError(
                f"{_named(at)} is a {node['constant']}, which no file can hold: pass `like`"
            )
        return like
    return _decode_pytree(node, archive, like, at)


def _decode_array(node: dict[str, Any], archive: zipfile.ZipFile) -> Any:
    with archive.open(node["array"]) as member:
        try:
            array = np.lib.format.read_array(member, allow_pickle=False)
        except ValueError as error:
            raise EOFError(f"{node['array']}: {error}") from error
    if "dtype" in node:
        array = array.view(jnp.dtype(node["dtype"]))
    if "key" in node:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=node["key"])
    if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype:
        return jnp.asarray(array)
    return array


def _decode_pytree(
    node: dict[str, Any], archive: zipfile.ZipFile, like: Any, at: tuple[str, ...]
) -> Any:
    if like is None:
        raise StorageError(
            f"{_named(at)} is a {node['pytree']}, which a file cannot rebuild: pass `like`, a value of the same "
            "structure (its numbers do not matter)"
        )
    templates, treedef = jax.tree.flatten(like)
    if len(templates) != len(node["leaves"]):
        raise StorageError(
            f"{_named(at)}: the file has {len(node['leaves'])} leaves, `like` (a {type(like).__qualname__}) "
            f"{len(templates)}"
        )
    leaves = []
    for i, (item, template) in enumerate(zip(node["leaves"], templates, strict=True)):
        leaf = _decode(item, archive, template, (*at, str(i)))
        if np.shape(leaf) != np.shape(template) and "constant" not in item:
            raise StorageError(
                f"{_named(at)}: leaf {i} has shape {np.shape(leaf)} in the file and "
                f"{np.shape(template)} in `like`"
            )
        leaves.append(leaf)
    return jax.tree.unflatten(treedef, leaves)


def _named(at: tuple[str, ...]) -> str:
    return repr(".".join(at)) if at else "the result"
