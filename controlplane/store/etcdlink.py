"""The way to an etcd cluster: several members, one in use at a time, and what to do when it fails.

Promise: every call ends by its deadline, and its end is one of: an answer; a refusal of etcd's, translated; StoreError.
A call that fails moves everybody on to the next member. It is repeated there when that is safe: it only reads, or etcd
says that it did nothing (no leader, a connection that never was). A commit that may have happened is never repeated.
With several members a watchdog asks the one in use for a sign of life each second (a read that it answers alone, from
memory), so that a member which is paused or cut off is left within two seconds, and not at the end of a deadline; a
member without a leader answers nothing at all ("hasleader", etcd's own metadata for that).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from controlplane.errors import Compacted, NotFound, OperationError, StoreError
from controlplane.store.etcdproto import EtcdProto, load

log = logging.getLogger("sandloom.controlplane.store")

DEADLINE_S = 5.0
ATTEMPT_S = 2.0
"""How long a call that may be repeated waits for one of several members."""
WATCHDOG_S = 1.0
BACKOFF_S = (0.05, 1.0)
OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),  # etcd takes more than one ping in 5 s for an attack
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long a connection may take; a refused one is tried again sooner
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class EtcdAccess:
    """Where etcd is and how to be let in. `prefix` is put before every key: several fabrics may share a cluster."""

    endpoints: tuple[str, ...]
    prefix: str = "sandloom/"
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    password: str = ""
    deadline_s: float = DEADLINE_S


class Verdict(Enum):
    """What a failed call means for the caller."""

    REFUSED = "etcd's answer: it stands"
    UNDONE = "nothing happened: repeat it elsewhere"
    UNSURE = "it may have happened: repeat it only if that does no harm"
    STRANGER = "the token is not valid any more: authenticate again"


def judge(code: grpc.StatusCode, details: str) -> Verdict:
    """What a status means. Pure. The texts are etcd's (api/v3rpc/rpctypes/error.go) and grpc's own."""
    if "invalid auth token" in details or "revision of auth store is old" in details:
        return Verdict.STRANGER
    if code is grpc.StatusCode.UNAVAILABLE:
        never = ("failed to connect to all addresses", "etcdserver: no leader", "etcdserver: not capable")
        return Verdict.UNDONE if any(text in details for text in never) else Verdict.UNSURE
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "too many requests" in details:
        return Verdict.UNDONE
    if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL):
        return Verdict.UNSURE
    if code is grpc.StatusCode.UNKNOWN and "etcdserver" not in details:
        return Verdict.UNSURE
    return Verdict.REFUSED


def translated(error: grpc.aio.AioRpcError, where: str) -> OperationError:
    """The error of ours that an answer of etcd's stands for."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.OUT_OF_RANGE:
        return Compacted("Compacted", f"etcd: {details}: list again")
    if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
        return NotFound("LeaseGone", "the lease has run out: grant a new one")
    remedy = "look at etcd and at the control plane's log"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "space exceeded" in details:
        remedy = "compact and defragment it, raise --quota-backend-bytes, then `etcdctl alarm disarm`"
    if code is grpc.StatusCode.PERMISSION_DENIED or "authentication failed" in details:
        remedy = "check etcd_user, its password and its role's key range"
    return StoreError("StoreFailed", f"etcd at {where}: {details or code.name}: {remedy}")


class Member:
    """One endpoint: its channel, made when first used, and what waits for it."""

    def __init__(self, endpoint: str, credentials: grpc.ChannelCredentials | None, proto: EtcdProto) -> None:
        self.endpoint, self._credentials, self._proto = endpoint, credentials, proto
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[str, Any] = {}
        self.waits: set[asyncio.Timeout] = set()

    def method(self, service: str, name: str) -> Any:
        """`KV`, `Range`: the callable."""
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.endpoint, options=OPTIONS)
            else:
                self._channel = grpc.aio.secure_channel(self.endpoint, self._credentials, options=OPTIONS)
        if service not in self._stubs:
            self._stubs[service] = self._proto.stubs[f"{service}Stub"](self._channel)
        return getattr(self._stubs[service], name)

    async def close(self) -> None:
        """Ends the channel and all that runs over it."""
        if self._channel is not None:
            await self._channel.close(None)
            self._channel, self._stubs = None, {}


class EtcdLink:
    """See the module. Made by `open_link`."""

    def __init__(self, access: EtcdAccess, *, dice: Callable[[], float] = random.random) -> None:
        self.access, self.proto, self._dice = access, load(), dice
        credentials = _credentials(access)
        self._members = [Member(endpoint, credentials, self.proto) for endpoint in access.endpoints]
        self._at = 0
        self._token = ""
        self._authenticating = asyncio.Lock()

    @property
    def where(self) -> str:
        """The endpoint in use."""
        return self._members[self._at].endpoint

    def uses(self, member: Member) -> bool:
        """Whether a member is still the one in use."""
        return self._members[self._at] is member

    async def call(self, service: str, name: str, request: Any, *, safe: bool) -> Any:
        """The answer. `safe`: doing it twice is as good as once. StoreError, Compacted, NotFound (LeaseGone)."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self.access.deadline_s
        tries, reasons = 0, ""
        cause: Exception
        while True:
            member = self._members[self._at]
            until_s = deadline_s
            if safe and len(self._members) > 1:
                until_s = min(deadline_s, loop.time() + ATTEMPT_S)
            try:
                return await self._attempt(member, service, name, request, until_s)
            except TimeoutError as error:
                verdict, reasons, cause = Verdict.UNSURE, "it does not answer", error
            except grpc.aio.AioRpcError as error:
                verdict, reasons, cause = judge(error.code(), error.details() or ""), error.details() or "", error
                if verdict is Verdict.REFUSED:
                    raise translated(error, member.endpoint) from error
            except asyncio.CancelledError as error:  # also what grpc.aio raises when its connection was given up
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                verdict, reasons, cause = Verdict.UNSURE, "it cut the call off", ConnectionAbortedError(str(error))
            tries += 1
            if verdict is Verdict.STRANGER and self.access.user and tries <= len(self._members):
                self._token = ""
                continue
            self._leave(member, reasons)
            wait_s = backoff_s(tries // len(self._members), self._dice())
            if (verdict is Verdict.UNSURE and not safe) or loop.time() + wait_s >= deadline_s:
                raise _unavailable(member.endpoint, reasons, unsure=verdict is Verdict.UNSURE and not safe) from cause
            if tries % len(self._members) == 0:
                await asyncio.sleep(wait_s)

    async def _attempt(self, member: Member, service: str, name: str, request: Any, until_s: float) -> Any:
        async with self.bounded(member, until_s):
            metadata = await self.metadata()
            left_s = until_s - asyncio.get_running_loop().time()
            return await member.method(service, name)(request, metadata=metadata, timeout=max(0.01, left_s + 1.0))

    @asynccontextmanager
    async def bounded(self, member: Member, until_s: float | None) -> AsyncIterator[None]:
        """TimeoutError in the block at `until_s`, or as soon as the member is given up."""
        async with asyncio.timeout_at(until_s) as wait:
            member.waits.add(wait)
            try:
                yield
            finally:
                member.waits.discard(wait)

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        if not self.access.user:
            return (("hasleader", "true"),)
        async with self._authenticating:
            if not self._token:
                member = self._members[self._at]
                request = self.proto.AuthenticateRequest(name=self.access.user, password=self.access.password)
                answer = await member.method("Auth", "Authenticate")(request, timeout=self.access.deadline_s)
                self._token = answer.token
        return (("hasleader", "true"), ("token", self._token))

    @asynccontextmanager
    async def stream(self, service: str, name: str) -> AsyncGenerator[tuple[Any, Member], None]:
        """An open two-way stream to the member in use. What fails in the block moves on to the next member, and
        StoreError goes out; the caller opens another stream then."""
        member = self._members[self._at]
        try:
            call = member.method(service, name)(metadata=await self.metadata())
            try:
                yield call, member
            finally:
                call.cancel()
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            details = str(error.details()) if isinstance(error, grpc.aio.AioRpcError) else "it does not answer"
            if isinstance(error, grpc.aio.AioRpcError) and judge(error.code(), details) is Verdict.STRANGER:
                self._token = ""
            self._leave(member, details)
            raise _unavailable(member.endpoint, details) from error
        except asyncio.CancelledError as error:  # also what grpc.aio raises when the stream itself was cut off
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._leave(member, "it cut the stream off")
            raise _unavailable(member.endpoint, "it cut the stream off") from error

    def _leave(self, member: Member, reason: str) -> None:
        """Everybody goes on with the next member, if this one is still in use; what waits for it fails now."""
        if not self.uses(member):
            return
        if len(self._members) > 1:
            self._at = (self._at + 1) % len(self._members)
            log.warning("etcd at %s: %s; going on with %s", member.endpoint, reason, self.where)
            now_s = asyncio.get_running_loop().time()
            for wait in tuple(member.waits):
                with suppress(RuntimeError):  # it is ending just now
                    wait.reschedule(now_s)

    async def watchdog(self) -> None:
        """See the module. Until cancelled."""
        if len(self._members) == 1:
            return
        request = self.proto.RangeRequest(key=b"\0", serializable=True, count_only=True)
        while True:
            await asyncio.sleep(WATCHDOG_S)
            member = self._members[self._at]
            try:
                until_s = asyncio.get_running_loop().time() + WATCHDOG_S
                await self._attempt(member, "KV", "Range", request, until_s)
            except TimeoutError:
                self._leave(member, f"no sign of life in {WATCHDOG_S:g} s")
            except grpc.aio.AioRpcError as error:
                if judge(error.code(), error.details() or "") is not Verdict.REFUSED:
                    self._leave(member, error.details() or error.code().name)

    async def close(self) -> None:
        """Ends all channels."""
        for member in self._members:
            await member.close()


def backoff_s(rounds: int, dice: float) -> float:
    """How long to wait after so many rounds through all members: doubles, bounded, with jitter. Pure."""
    least, most = BACKOFF_S
    return float(min(most, least * 2.0 ** min(rounds, 10)) * (0.5 + dice / 2))


def _unavailable(endpoint: str, reason: str, *, unsure: bool = False) -> StoreError:
    outcome = "; whether it was done is not known: read, then retry" if unsure else ""
    short = (reason or "no answer").removeprefix("failed to connect to all addresses; last error: ")
    return StoreError("StoreUnavailable", f"the control plane's store, etcd at {endpoint}: {short}{outcome}")


def _credentials(access: EtcdAccess) -> grpc.ChannelCredentials | None:
    if access.ca is None:
        return None
    try:
        key = access.key.read_bytes() if access.key else None
        cert = access.cert.read_bytes() if access.cert else None
        return grpc.ssl_channel_credentials(access.ca.read_bytes(), key, cert)
    except OSError as error:
        raise StoreError("StoreUnusable", f"etcd's TLS files: {error.filename}: {error.strerror}") from error
