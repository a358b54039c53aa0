"""Bearer keys, by which the service knows its clients.

    python -m deploy.service.keys NAME >> keys

adds a line for a new key to a file, and prints the key, once, to the standard error. `--keys keys` asks for them.

The file has SHA-256 hashes. A key is 256 random bits, so nobody finds it by hashing guesses, however fast that is;
slow hashes with salts protect passwords, which people choose, and would hold up every request. Whoever reads the file
can therefore do nothing with it; whoever can write it can let others in.
"""

import argparse
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.requests import HTTPConnection

log = logging.getLogger("ddpm.service")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
LINE = re.compile(rf"({NAME.pattern})[ \t]+sha256:([0-9a-f]{{64}})")
OPEN = re.compile(r"/v2/health/(live|ready)|/docs|/([\w-]+\.\w+)?", re.ASCII)
"""Paths that need no key: health, the page with its files (`/`, `/main.js`), in which a key is entered, and the
description of the routes (`/docs`, `/openapi.json`). Any other path needs one, whether it exists or not."""


class KeysError(Exception):
    """The keys cannot be used; the message is one line."""


class MissingKey(AuthenticationError):
    """The request has no key."""


class UnknownKey(AuthenticationError):
    """The request has a key that is not in the file."""


class Keys(AuthenticationBackend):
    """The keys in a file, which is read again when it changes: a key is revoked by deleting its line.

    While the file is unreadable or wrong, the last keys that were read stay valid.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; raises KeysError."""
        self._path, self._problem = path, ""
        self._stamp: tuple[int, ...] = ()
        self._stamp = self._stat()
        self._names = self._read()
        if not self._names:
            raise KeysError(f"{path}: has no keys; add one with `python -m deploy.service.keys NAME >> {path}`")

    def client(self, key: bytes) -> str | None:
        """The name of a key; None if it is unknown. Takes the same time for all keys."""
        self._update()
        digest, found = hashlib.sha256(key).digest(), None
        for each, name in self._names.items():
            if hmac.compare_digest(each, digest):
                found = name
        return found

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        """The client of a request, None if its path needs no key; raises MissingKey or UnknownKey."""
        if OPEN.fullmatch(conn.scope["path"]):
            return None
        given = conn.headers.getlist("Authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not key.strip():
            raise MissingKey("this needs a key; send it in one header `Authorization: Bearer KEY`")
        name = self.client(key.strip().encode("latin-1"))
        if name is None:
            raise UnknownKey("the key is unknown or was revoked; ask for a new one")
        return AuthCredentials(), SimpleUser(name)

    def _update(self) -> None:
        try:
            stamp = self._stat()
            if stamp != self._stamp:
                self._stamp = stamp
                self._names = self._read()
                self._problem = ""
                log.info("%s read again: %d keys", self._path, len(self._names))
        except KeysError as error:
            if str(error) != self._problem:
                log.error("%s; the keys that were read last stay valid", error)
            self._problem = str(error)

    def _stat(self) -> tuple[int, ...]:
        """What changes with the file, and with the right to read it."""
        try:
            found = self._path.stat()
        except OSError as error:
            self._stamp = ()  # so that it is read when it is back
            raise KeysError(f"{self._path}: cannot find it ({error.strerror})") from None
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for its writer, and hold up all requests
            raise KeysError(f"{self._path}: must be a regular file")
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _read(self) -> dict[bytes, str]:
        """Names by hash. An empty file lets nobody in."""
        names = dict[bytes, str]()
        try:
            with self._path.open(encoding="utf-8-sig") as file:
                if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
                    log.warning("%s: everyone can write this file, and so add a key; run `chmod o-w`", self._path)
                lines = file.read().splitlines()
        except OSError as error:
            raise KeysError(f"{self._path}: cannot read it ({error.strerror})") from None
        except UnicodeDecodeError:
            raise KeysError(f"{self._path}: not a text file") from None
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line or line.startswith("#"):
                continue
            found = LINE.fullmatch(line)
            if not found:  # it may be a key by mistake, so it is not shown
                form = "NAME sha256:HASH, as `python -m deploy.service.keys NAME` prints it"
                raise KeysError(f"{self._path}: line {number} must be {form}")
            name, digest = found[1], bytes.fromhex(found[2])
            if digest in names:
                raise KeysError(f"{self._path}: line {number} repeats the key of {names[digest]}; delete one")
            names[digest] = name
        return names


def required(option: str | None, host: str) -> Keys | None:
    """The keys that `--keys` names: a file, or "none", which is also the default on a loopback address.

    Raises:
        KeysError: the file cannot be used, or none is named and others can reach the address.
    """
    if option not in (None, "none"):
        return Keys(Path(option))
    if option is None and not loopback(host):
        line = "whoever reaches it could use the service; name a file of keys (`python -m deploy.service.keys --help`)"
        raise KeysError(f"required for --host {host}: {line}, or `none` if a proxy asks who they are")
    return None


def loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: Sequence[str] | None = None) -> int:
    """Make a key."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.service.keys",
        description="Make a key. Its line for the file of keys goes to the standard output, and the key itself, which "
        "is stored nowhere, to the standard error: python -m deploy.service.keys NAME >> keys",
    )
    parser.add_argument("name", metavar="NAME", help="whose key it is: shown in logs, and shares the service fairly")
    name = parser.parse_args(argv).name
    if not NAME.fullmatch(name):
        parser.error(f"NAME: must have up to 64 letters, digits, and characters of . _ @ - (got {name!r})")
    key = f"ddpm_{secrets.token_urlsafe(32)}"
    print(f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}", flush=True)
    print(key, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
