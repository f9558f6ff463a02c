"""How hosts join: an operator makes a token, a host spends it for a certificate of its own key.

The CA's key is at hand only where the configuration names its folder (`ca_dir`); without it, certificates are issued by
hand (`sandloom ca issue host NAME`), and nobody joins here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from controlplane import codec, events, keys
from controlplane.api.errors import TlsError
from controlplane.api.identity import Identity, Role
from controlplane.ca import Authority
from controlplane.errors import AlreadyExists, Conflict, Invalid, Precondition
from controlplane.jointokens import SECRET_BYTES, JoinRecord, Ticket, encode, hash_of, require_good
from controlplane.membership import Standing
from controlplane.model import Event
from controlplane.registry import Registry
from controlplane.store.contract import Delete, Expect, Put, Store

ATTEMPTS = 4


@dataclass(frozen=True)
class Made:
    """A new token: the word for the host, its id, and until when."""

    word: str
    id: str
    expires_at_s: float


@dataclass(frozen=True)
class Joined:
    """What a host gets."""

    cert_pem: bytes
    ca_pem: bytes


class Joining:
    """See the module. `join_address` is where hosts join; it is known once the server listens."""

    def __init__(
        self, store: Store, registry: Registry, authority: Authority | None,
        *, now_s: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._registry, self._authority, self._now_s = store, registry, authority, now_s
        self.join_address = ""

    async def token(self, host: str, lifetime_s: int) -> Made:
        """See CreateJoinToken."""
        if self._authority is None or not self.join_address:
            text = "this control plane signs no certificates: give it ca_dir and join_listen, or issue one by hand"
            raise Precondition("NoAuthority", text)
        key, secret = secrets.token_hex(8), secrets.token_urlsafe(SECRET_BYTES)
        record = JoinRecord(key, hash_of(secret), self._now_s() + lifetime_s, host)
        told = Event(self._now_s(), "host", host or key, "JoinTokenMade", f"token {key}, good for {lifetime_s} s")
        await self._store.commit([Put(keys.join(key), codec.encode(record)), events.entry(told)], [])
        ticket = Ticket(self.join_address, key, secret, self._authority.cert_pem.decode())
        return Made(encode(ticket), key, record.expires_at_s)

    async def join(self, key: str, secret: str, name: str, csr_pem: bytes) -> Joined:
        """See JoinHost."""
        for _ in range(ATTEMPTS):
            stored = await self._store.get(keys.join(key))
            kept = codec.decode(JoinRecord, stored.value, stored.key) if stored else None
            record = require_good(kept, secret, name, self._now_s())
            assert stored is not None and self._authority is not None, "a token was made"
            await self._require_free(name, record)
            try:
                signed = await asyncio.to_thread(self._authority.sign, csr_pem, Identity(Role.HOST, name))
            except TlsError as error:
                raise Invalid("csr_pem", str(error)) from error
            spent = Expect(stored.key, stored.mod_revision)
            try:
                await self._registry.joined(name, signed.serial, [Delete(stored.key)], [spent])
            except Conflict:
                continue  # spent by another, or the host's record changed: look again
            return Joined(signed.cert_pem, self._authority.cert_pem)
        raise Conflict("Busy", f"host {name} changes too fast: retry")

    async def _require_free(self, name: str, record: JoinRecord) -> None:
        member = await self._registry.member(name)
        known = member.revision and member.standing is not Standing.REMOVED
        if record.host != name and (known or await self._store.get(keys.host(name)) is not None):
            text = f"there is a host {name}: choose another name, or have a token made for it (--host {name})"
            raise AlreadyExists("HostExists", text, host=name)

    async def drop_expired(self) -> None:
        """Forgets tokens that nobody can spend any more."""
        page = await self._store.page(keys.JOINS)
        old = [
            record for record in page.records
            if codec.decode(JoinRecord, record.value, record.key).expires_at_s <= self._now_s()
        ]  # fmt: skip
        if old:
            await self._store.commit([Delete(record.key) for record in old])
