"""The models that the service has, by name and alias, and how they follow their aliases."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from deploy.service.models import Model, ModelError, RejectedModel
from deploy.service.sources import Release, Source, parse
from diffusion.export import golden

log = logging.getLogger("ddpm.service")
RETRY_SECONDS = 300.0
"""After this time a rejected version is read again: its file may have been incomplete, or memory short."""
Load = Callable[[bytes, str | None, str], Model]
"""Loads a model from its bytes, version and name; raises RejectedModel."""


class UnknownModel(Exception):
    """No model has the name, or none of that name the version; the message is one line."""


class Loaded(NamedTuple):
    """A version, and its model in memory."""

    release: Release
    model: Model


class Rejected(NamedTuple):
    """A version that is unusable."""

    release: Release
    reason: str
    """As text: an exception would keep the model alive through its traceback."""
    until: float
    """When to try again, if the alias still names it (`time.monotonic()`)."""


class Served:
    """`current` is the model in use; `update` replaces it if the source has a new version.

    The one before stays in memory, so that the alias can be moved back at once, and even if MLflow has lost its file.
    """

    def __init__(self, name: str, source: Source, load: Callable[[Source, Release], Model]) -> None:
        """Load the first model; raises ModelError if that fails."""
        self.name, self.alias = name, source.alias
        self._source, self._load = source, load
        release = source.find()
        self._current = Loaded(release, load(source, release))
        self._before: Loaded | None = None
        self._rejected: Rejected | None = None
        self.failures = 0
        """Number of failed updates."""
        self._last_error = ""

    @property
    def current(self) -> Model:
        """The model in use."""
        return self._current.model

    @property
    def title(self) -> str:
        """NAME@ALIAS or NAME/VERSION."""
        return f"{self.name}@{self.alias}" if self.alias else f"{self.name}/{self.current.version}"

    def answers_to(self, version: str) -> bool:
        """Whether this is the alias or the version of the model in use."""
        return version in (self.alias, self.current.version)

    def update(self) -> None:
        """Check the source once. A failure is counted, logged if it is new, and leaves the current model in place."""
        version = None
        try:
            release = self._source.find()
            version = release.version
            if self._rejected and self._rejected.release != release:  # an alias that comes back asks for another try
                self._rejected = None
            if release != self._current.release:
                self._change(release)
            self._last_error = ""
        except ModelError as error:
            self._fail(f"version {version}: {error}" if version else str(error))
        except Exception as error:  # a malformed file must not end the polling
            self._fail(golden.brief(error))

    def _change(self, release: Release) -> None:
        """Serve another version; raises ModelError."""
        if self._before and self._before.release == release:
            new = self._before
        else:
            if self._rejected and time.monotonic() < self._rejected.until:  # do not download it again
                raise RejectedModel(self._rejected.reason)
            self._before = None  # so that at most two versions are in memory
            try:
                new = Loaded(release, self._load(self._source, release))
            except RejectedModel as error:
                self._rejected = Rejected(release, str(error), time.monotonic() + RETRY_SECONDS)
                raise
        self._before, self._current = self._current, new
        log.info("%s: now serving %s", self.title, new.model.summary)

    def _fail(self, line: str) -> None:
        self.failures += 1
        if line != self._last_error:
            log.error("%s: still serving version %s: %s", self.title, self.current.version, line)
        self._last_error = line


class Models:
    """The models of the service. One name may have several aliases and versions; the first is its default."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self.served: list[Served] = []
        self._loaded = WeakValueDictionary[tuple[str, Release], Model]()
        """Those in memory: aliases of the same version share its model."""

    def add(self, text: str) -> Served:
        """Load a model from [NAME=]SOURCE; raises ModelError."""
        name, source = parse(text)
        made = Served(name, source, lambda source, release: self._model(name, source, release))
        for each in self._named(name):
            if made.title == each.title:
                raise ModelError(f"{made.title} is given twice; remove one, or give it another name as NAME=SOURCE")
        self.served.append(made)
        return made

    def _model(self, name: str, source: Source, release: Release) -> Model:
        model = self._loaded.get((name, release))
        if model is None:
            model = self._loaded[name, release] = self._load(source.read(release), release.version, name)
        return model

    def _named(self, name: str) -> list[Served]:
        return [each for each in self.served if each.name == name]

    @property
    def first(self) -> Model:
        """The default model."""
        return self.served[0].current

    def find(self, name: str, version: str | None = None) -> Model:
        """The model with a name and an alias or version, by default the first with the name; raises UnknownModel."""
        named = self._named(name)
        if not named:
            known = ", ".join(dict.fromkeys(each.name for each in self.served))
            raise UnknownModel(f"model {name[:50]}: unknown; this service has {known}")
        if version is None:
            return named[0].current
        for each in sorted(named, key=lambda each: each.alias != version):  # an alias before a number
            if each.answers_to(version):
                return each.current
        known = ", ".join(dict.fromkeys(key for each in named for key in (each.alias, each.current.version) if key))
        raise UnknownModel(f"version {version[:50]}: not served; {name} has {known}")

    def versions(self, name: str) -> list[str]:
        """The versions with a name, its default first."""
        return list(dict.fromkeys(each.current.version for each in self._named(name)))

    def index(self, ready: bool) -> list[dict[str, Any]]:
        """Describe all models, in the order they were given."""
        state = "READY" if ready else "UNAVAILABLE"
        return [
            {"name": each.name, "version": each.current.version, "alias": each.alias, "state": state}
            for each in self.served
        ]

    def follow(self, seconds: float, stop: threading.Event) -> None:
        """Update the models with an alias every `seconds` until `stop` is set."""
        followed = [each for each in self.served if each.alias]
        while followed and not stop.wait(seconds):
            for each in followed:
                if not stop.is_set():
                    each.update()
