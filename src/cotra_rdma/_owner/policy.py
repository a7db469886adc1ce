"""`PolicyFile`: a file that says what each name in a certificate may do at an owner. It is read again when it changes."""

from __future__ import annotations

import logging
import os
import threading
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cotra_rdma.errors import DeniedError, FormatError, InvalidInputError

log = logging.getLogger(__name__)

ANY = "*"
"""The name of the rule for certificates that have no rule of their own."""
_LOOK_S = 0.05
_MAX_BYTES = 1 << 20
_TRANSPORTS = ("verbs", "shm", "rpc")
_LEAST = {"queue_pairs": 0, "bytes_per_s": 1}


@dataclass(frozen=True, slots=True)
class Rule:
    """What one identity may do.

    Attributes:
        transports: the transports that it may use.
        shards: the shards that it may read, by their numbers in the collection. None allows all.
        queue_pairs: the most queue pairs that it may hold at once.
        build: whether it may send builders' messages.
        bytes_per_s: how many bytes of requests and answers it may move over RPC; None for any number.
    """

    transports: frozenset[str] = frozenset(_TRANSPORTS)
    shards: frozenset[int] | None = None
    queue_pairs: int = 1024
    build: bool = False
    bytes_per_s: int | None = None

    @classmethod
    def of(cls, name: str, raw: object) -> Rule:
        """Makes a rule of a table of the file.

        Args:
            name: the name of the table, for an error message.
            raw: the table.

        Raises:
            FormatError: it is malformed. The message names the rule and the key.
        """
        if not isinstance(raw, dict):
            raise FormatError(f"readers.{name}: is no table")
        made: dict[str, Any] = {}
        for key, value in raw.items():
            if not _is_rule(key, value):
                raise FormatError(f"readers.{name}: {key} = {value!r} is no rule")
            made[key] = frozenset(value) if isinstance(value, list) else value
        return cls(**made)


def _is_rule(key: str, value: object) -> bool:
    """Returns whether a rule may have this key with this value."""
    if key == "transports":
        return isinstance(value, list) and all(item in _TRANSPORTS for item in value)
    if key == "shards":
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    if key == "build":
        return type(value) is bool
    return key in _LEAST and type(value) is int and value >= _LEAST[key]


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of all identities.

    Attributes:
        rules: the rules by name. The name is one of a certificate's, or "*".
    """

    rules: Mapping[str, Rule] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Reads a TOML file. It has a table `readers.NAME` for each name, with the attributes of `Rule`.

        Raises:
            FormatError: the file is malformed.
            OSError: the file cannot be read.
        """
        data = Path(path).read_bytes()
        try:
            if len(data) > _MAX_BYTES:
                raise FormatError(f"it has {len(data)} bytes, and {_MAX_BYTES} at most")
            raw = tomllib.loads(data.decode())
            if set(raw) - {"readers"} or not isinstance(raw.get("readers", {}), dict):
                raise FormatError("it has tables readers.NAME, and nothing else")
            return cls({name: Rule.of(name, rule) for name, rule in raw.get("readers", {}).items()})
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, FormatError) as error:
            raise FormatError(f"{os.fspath(path)}: {error}") from None

    def rule_of(self, names: Sequence[str]) -> Rule | None:
        """Returns the rule of an identity.

        It is the rule of the first name that has one, or else the rule of "*".

        Args:
            names: the names in the identity's certificate.

        Returns:
            The rule, or None if the identity may do nothing.
        """
        for name in names:
            if name in self.rules and name != ANY:
                return self.rules[name]
        return self.rules.get(ANY) if names else None


class PolicyFile:
    """A policy that follows its file. It is a context manager.

    A thread looks at the file 20 times a second.
    If the file is malformed or gone, the policy stays as it was, and a warning is logged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the file, and starts the thread.

        Raises:
            FormatError: the file is malformed.
            InvalidInputError: the file cannot be read.
        """
        self._path = Path(path)
        self._changed: list[Callable[[], object]] = []
        self._seen = self._status()
        try:
            self._policy = Policy.load(path)
        except OSError as error:
            raise InvalidInputError(f"the policy {os.fspath(path)} cannot be read: {error.strerror}") from error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cotra-policy", daemon=True)
        self._thread.start()

    def _status(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_S):
            now = self._status()
            if now == self._seen:
                continue
            self._seen = now
            try:
                self._policy = Policy.load(self._path)
            except (FormatError, OSError) as error:
                log.warning("the policy stays as it was: %s", error)
                continue
            log.info("the policy %s was read again", self._path)
            for changed in self._changed:
                changed()

    def when_changed(self, then: Callable[[], object]) -> None:
        """Has `then` called after each change, in the thread that looks at the file."""
        self._changed.append(then)

    def rule_of(self, names: Sequence[str]) -> Rule | None:
        """Returns the rule of an identity now, as `Policy.rule_of` does."""
        return self._policy.rule_of(names)

    def check(self, names: Sequence[str], number: int | None, transport: str | None = None) -> Rule:
        """Checks what an identity asks for.

        Args:
            names: the names in the identity's certificate.
            number: the number of the shard in its collection, or None if it has none.
            transport: the transport that is asked for. None is for what every reader may ask.

        Returns:
            The rule of the identity.

        Raises:
            DeniedError: the identity may not read the shard, or not by that transport.
        """
        rule, who = self.rule_of(names), ", ".join(names) or "nobody"
        if rule is None or (rule.shards is not None and number not in rule.shards):
            raise DeniedError(f"{who} may not read this shard")
        if transport is not None and transport not in rule.transports:
            raise DeniedError(f"{who} may not use {transport} here")
        return rule

    def close(self) -> None:
        """Ends the thread. Idempotent."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> PolicyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
