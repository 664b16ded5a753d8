"""A store that strangers may reach: what they write into it is not believed, and what ranks write they cannot read.

torch's store asks nobody who he is: whoever reaches its port lists, reads, writes and removes keys. So values are
enciphered and authenticated (encrypt, then HMAC, over the name as well), and names are hashes. A stranger can still
remove and overwrite, which is noticed, change counters, and use up memory.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dsbert.cluster.secret import derive

_IV_BYTES, _TAG_BYTES = 16, 32


class ForgedError(RuntimeError):
    """A value that no holder of the key has written, or that was meant for another name."""


class SealedStore(dist.Store):
    """`inner` for the holders of a key. Values must be written under a key of one meeting alone: old ones do not count
    then. Counters (`add`) are not sealed: nothing may rest on them but who does what first."""

    def __init__(self, inner: dist.Store, key: bytes) -> None:
        super().__init__()
        self._inner: Any = inner  # torch's stubs know neither `clone` nor values of bytes
        self._key = key
        self._cipher, self._tag = derive(key, "cipher"), derive(key, "tag")
        # C++ holds what `clone` returns, and that does not keep a Python object alive.
        self._clones: list[SealedStore] = []

    def set(self, key: str, value: str | bytes) -> None:
        name, iv = self._name(key), secrets.token_bytes(_IV_BYTES)
        sealed = iv + self._crypt(iv, value.encode() if isinstance(value, str) else bytes(value))
        self._inner.set(name, sealed + self._tag_of(name, sealed))

    def get(self, key: str) -> bytes:
        """Raises ForgedError."""
        return self._opened(key, self._inner.get(self._name(key)))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Values of many keys, waiting for them, in one message. Raises ForgedError."""
        found = self._inner.multi_get([self._name(key) for key in keys])
        return [self._opened(key, value) for key, value in zip(keys, found, strict=True)]

    def has_extended_api(self) -> bool:
        """Whether there is `multi_get`, with which gloo asks for everybody's address at once."""
        return True

    def _opened(self, key: str, found: bytes) -> bytes:
        name = self._name(key)
        sealed, tag = found[:-_TAG_BYTES], found[-_TAG_BYTES:]
        if len(sealed) < _IV_BYTES or not hmac.compare_digest(tag, self._tag_of(name, sealed)):
            raise ForgedError("a value in the ranks' store that none of them has written: see who else uses the port")
        return self._crypt(sealed[:_IV_BYTES], sealed[_IV_BYTES:])

    def peek(self, key: str) -> bytes | None:
        """The value; None while there is none, or a forged one."""
        if not self.check([key]):
            return None
        try:
            return self.get(key)
        except ForgedError:
            return None

    def add(self, key: str, value: int) -> int:
        return int(self._inner.add(self._name(key), value))

    def check(self, keys: list[str]) -> bool:
        return bool(self._inner.check([self._name(key) for key in keys]))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        names = [self._name(key) for key in keys]
        self._inner.wait(names) if timeout is None else self._inner.wait(names, timeout)

    def delete_key(self, key: str) -> bool:
        return bool(self._inner.delete_key(self._name(key)))

    def num_keys(self) -> int:
        return int(self._inner.num_keys())

    def set_timeout(self, timeout: timedelta) -> None:
        self._inner.set_timeout(timeout)

    def clone(self) -> SealedStore:
        self._clones.append(SealedStore(self._inner.clone(), self._key))
        return self._clones[-1]

    def _name(self, key: str) -> str:
        return derive(self._key, "name", key).hex()

    def _tag_of(self, name: str, sealed: bytes) -> bytes:
        return hmac.new(self._tag, name.encode() + sealed, hashlib.sha256).digest()

    def _crypt(self, iv: bytes, text: bytes) -> bytes:
        """Encipher or decipher: the exclusive or with a stream that follows from the key and the never repeated iv."""
        stream = hashlib.shake_256(self._cipher + iv).digest(len(text))
        number = int.from_bytes(text, "big") ^ int.from_bytes(stream, "big")
        return number.to_bytes(len(text), "big")
