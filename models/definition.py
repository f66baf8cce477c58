"""A definition: the one file in which an ML team writes sources, views and models, with its artifacts.

It travels as text and bytes, so that every process that needs it, on whatever node, has the same;
each runs the text once and takes what it declares. Its content is the text and the artifacts, not the
name of the file; the digest of that is what a version is made of.
"""

from __future__ import annotations

import hashlib
import json
import linecache
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from millpond.feature_actors.errors import DeclarationError, MillpondError
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.source import Source
from millpond.feature_actors.view import FeatureView
from millpond.models.model import LoadedModel, Model

T = TypeVar("T")

__all__ = [
    "ARTIFACTS_DIR",
    "TEXT_FILE",
    "Declared",
    "Definition",
    "artifacts_of",
    "digest_of",
    "forget_module",
    "load_model",
    "load_models",
    "module_name_of",
]

#: Held while the text of a module is run, a lock for each name as long as somebody has it: one that hangs holds up
#: nobody but those who want the same.
_LOCKS: WeakValueDictionary[str, Any] = WeakValueDictionary()
_TAKING = threading.Lock()
#: How the content lies in a folder, whatever the files were called where they came from.
TEXT_FILE, ARTIFACTS_DIR = "definition.py", "artifacts"


@dataclass(frozen=True)
class Declared:
    """What a definition declares, in the order of the file."""

    sources: tuple[Source, ...]
    views: tuple[FeatureView, ...]
    models: tuple[Model, ...]


@dataclass(frozen=True)
class Definition:
    """The text of a file and the content of its artifacts: file name to bytes."""

    file_name: str
    text: str
    artifacts: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, artifacts_dir: Path | None = None) -> Definition:
        """Read a file and the artifacts of its models that lie beside it (or in `artifacts_dir`).

        Raises `DeclarationError` if the file cannot be read or does not run.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DeclarationError(f"definition `{path}`: cannot be read: {error}") from None
        folder = artifacts_dir or path.parent
        files = {f for model in cls(path.name, text).declared().models for f in model.artifacts.values()}
        try:
            contents = {f: (folder / f).read_bytes() for f in sorted(files) if (folder / f).is_file()}
        except OSError as error:
            raise DeclarationError(
                f"definition `{path}`: its artifact `{error.filename}` cannot be read: {error.strerror}"
            ) from None
        return cls(path.name, text, contents)

    @classmethod
    def of_files(cls, file_name: str, files: Mapping[str, bytes]) -> Definition:
        """Make a definition of its `files`."""
        artifacts = {name: files[f"{ARTIFACTS_DIR}/{name}"] for name in artifacts_of(files)}
        return cls(file_name, files[TEXT_FILE].decode(), artifacts)

    @property
    def files(self) -> dict[str, bytes]:
        """The content as the files of a folder: `definition.py`, and `artifacts/NAME` for each artifact."""
        return {
            TEXT_FILE: self.text.encode(),
            **{f"{ARTIFACTS_DIR}/{n}": self.artifacts[n] for n in sorted(self.artifacts)},
        }

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each of the `files`, in hex digits."""
        return {path: hashlib.sha256(content).hexdigest() for path, content in self.files.items()}

    @property
    def digest(self) -> str:
        """The content in 64 hex digits: equal if text and artifacts are, whatever the file is called."""
        return digest_of(self.hashes)

    @property
    def module_name(self) -> str:
        """What the module of the text is called in `sys.modules`; it stays there until `forget_module`."""
        return module_name_of({TEXT_FILE: hashlib.sha256(self.text.encode()).hexdigest()})

    def declared(self) -> Declared:
        """Run the text (once a process) and return what it declares: by name, or in a list, tuple or dict of a name."""
        values = self._values()
        models = _each(values, Model)
        views = _each([*values, *(f.view for m in models for f in (*m.features, *m.reads))], FeatureView)
        sources = _each([*values, *(v.source for v in views)], Source)
        return Declared(sources, views, models)

    def instances(self, kind: type[T]) -> tuple[T, ...]:
        """Run the text (once a process) and return what it has of another kind, such as a layer above declares."""
        return _each(self._values(), kind)

    def _values(self) -> list[object]:
        # Copies: what a definition has taken from other modules may change in other threads.
        return [one for value in [*vars(self._module()).values()] for one in [*_contents(value)]]

    def _module(self) -> types.ModuleType:
        name = self.module_name
        with _lock_of(name):  # else another thread would take a module that has not been run to its end
            module = sys.modules.get(name)
            if module is not None:
                return module
            module = types.ModuleType(name)
            # Tracebacks and inspect find the text although there may be no such file on this node, or another version.
            module.__file__ = f"<{self.file_name} {name[-8:]}>"
            lines = self.text.splitlines(True)
            linecache.cache[module.__file__] = (len(self.text), None, lines, module.__file__)
            sys.modules[name] = module
            try:
                exec(compile(self.text, module.__file__, "exec"), module.__dict__)
            except BaseException as error:
                forget_module(name)
                line = _line_of(error, module.__file__)
                where = None if line is None else f"{self.file_name}:{line}"
                if isinstance(error, MillpondError):
                    error.path = error.path or where
                    raise
                if not isinstance(error, Exception | SystemExit):
                    raise
                what = error.msg if isinstance(error, SyntaxError) and error.filename == module.__file__ else error
                raise DeclarationError(
                    f"definition `{self.file_name}`: does not run: {type(error).__name__}: {what}", path=where
                ) from error
            return module


def _line_of(error: BaseException, file: str) -> int | None:
    """Return the line of a file in which an error was raised, or from which what raised it was called."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    return lines[-1] if lines else None


def forget_module(name: str) -> None:
    """Let go of the module of a definition: what still uses something of it goes on, `declared` runs the text again.

    Waits for nobody, so an event loop may call it. Not while the text is run, which then misses its module.
    """
    module = sys.modules.pop(name, None)
    if module is not None:
        linecache.cache.pop(str(module.__file__), None)


def _lock_of(name: str) -> AbstractContextManager[Any]:
    with _TAKING:
        return _LOCKS.setdefault(name, threading.RLock())  # type: ignore[no-any-return]


def module_name_of(hashes: Mapping[str, str]) -> str:
    """Return what the module of a definition is called, by the hashes of its files."""
    return f"millpond_definition_{hashes.get(TEXT_FILE, '')[:16]}"


def artifacts_of(files: Iterable[str]) -> set[str]:
    """Return the names of the artifacts among the files of a definition."""
    return {path.removeprefix(f"{ARTIFACTS_DIR}/") for path in files if path != TEXT_FILE}


def digest_of(hashes: Mapping[str, str]) -> str:
    """Return the digest of a definition by the hashes of its files.

    >>> digest_of({"definition.py": "00"})[:12]
    '733f7340e45e'
    """
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _contents(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else (value,)


def _each(values: Iterable[object], kind: type[T]) -> tuple[T, ...]:
    return tuple({id(v): v for v in values if isinstance(v, kind)}.values())


def load_models(definitions: Iterable[Definition], layout: Layout) -> dict[str, LoadedModel]:
    """Load every model of the definitions: name to loaded model.

    Raises `DeclarationError` if two models share a name, and what `load_model` does.
    """
    loaded: dict[str, LoadedModel] = {}
    for definition in definitions:
        for model in definition.declared().models:
            if model.name in loaded:
                raise DeclarationError(f"two models are named `{model.name}`")
            loaded[model.name] = load_model(model, layout, definition.artifacts, f"`{definition.file_name}`")
    return loaded


def load_model(model: Model, layout: Layout, artifacts: Mapping[str, bytes], beside: str) -> LoadedModel:
    """Load a model whose `artifacts` are given: file name to content; `beside`: where they lie, for errors.

    The predictor is given their paths in a private folder that lives as long as the loading. Raises `DeclarationError`
    if one is missing, or the predictor fails.
    """
    with tempfile.TemporaryDirectory(prefix="millpond-") as folder:
        for artifact, file in model.artifacts.items():
            if file not in artifacts:
                raise DeclarationError(
                    f"model `{model.name}`: artifact `{artifact}` is `{file}`, which does not lie beside {beside}; "
                    "train the model first"
                )
            (Path(folder) / file).write_bytes(artifacts[file])
        try:
            return LoadedModel(model, layout, Path(folder))
        except MillpondError:
            raise
        except Exception as error:
            raise DeclarationError(
                f"model `{model.name}`: its predictor does not load: {type(error).__name__}: {error}"
            ) from error
