"""What can be done with images: find, bind, unbind, and know which hosts hold them.

The bytes are the hosts' business. A name is bound to a digest per tenant; `residency` records which host holds a digest
in which tenant's sharing domain. Two tenants with equal images do not see each other's residency: a host's own report
of digests is only ever used to take entries back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from controlplane import codec, events, keys, lifecycle
from controlplane.admission import Admission, Guard
from controlplane.errors import Conflict, Exhausted, NotFound, Precondition, Unavailable
from controlplane.model import Event, Host, Image, Residency, Sandbox
from controlplane.quotas import UNBOUNDED, Quota, require_image_within, require_name_within
from controlplane.store.contract import Delete, Expect, Put, Record, Store, Write
from controlplane.view import View

ATTEMPTS = 16
REMOVAL_LEASE_S = 30
SETTLE_S = 30.0
"""A host's report may have been written before an import that it does not name yet."""


class Images:
    """See the module."""

    def __init__(
        self,
        store: Store,
        view: View,
        *,
        quota_of: Callable[[str], Quota] = lambda _: UNBOUNDED,
        admission: Admission | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._view, self._now_s = store, view, now_s
        self._quota_of, self._admission = quota_of, admission or Admission(view, quota_of)

    async def get(self, tenant: str, name_or_digest: str) -> Image:
        """By name or digest. NotFound says how to get it."""
        if name_or_digest.startswith("sha256:"):
            for image in sorted(self.of(tenant), key=lambda image: image.name):
                if image.digest == name_or_digest:
                    return image
        else:
            record = await self._store.get(keys.image(tenant, name_or_digest))
            if record is not None:
                return _image(record)
        text = f"there is no image {name_or_digest}: import it first (`sandloom image import`)"
        raise NotFound("ImageNotFound", text, image=name_or_digest)

    def of(self, tenant: str) -> list[Image]:
        """A tenant's images, as the view has them."""
        prefix = keys.images_of(tenant)
        return [image for key, image in self._view.images.items() if key.startswith(prefix)]

    def host_for_import(self, wanted: str) -> Host:
        """The host an image goes to: the wanted one, else the one with most free disk, of those that take new things
        if there is any. Unavailable."""
        view = self._view
        if wanted and wanted not in view.hosts:
            raise NotFound("HostNotFound", f"there is no host {wanted}", host=wanted)
        alive = [host for name, host in view.hosts.items() if name in view.alive and wanted in ("", name)]
        ready = [host for host in alive if wanted or view.member(host.name).takes_new] or alive
        if not ready:
            who = f"host {wanted} is LOST" if wanted else "no host is READY"
            raise Unavailable("NoHost", f"{who}: start its sandloom-hostd, then import again", host=wanted)
        return max(ready, key=lambda host: (host.capacity.disk_free_mib, host.name))

    def require_name(self, tenant: str, name: str) -> None:
        """Exhausted when the tenant may not have one more image, before any of it is sent."""
        require_name_within(self._quota_of(tenant), self.of(tenant), tenant, name)

    async def bind(self, image: Image, host: str) -> Image:
        """Binds the name to what `host` has just imported, replacing what it was bound to. Idempotent.

        Exhausted when the tenant may not have that much: then the host may forget it."""
        for _ in range(ATTEMPTS):
            try:
                async with self._admission.deciding(image.tenant) as guard:
                    return await self._bind(image, host, guard)
            except Conflict:
                continue
        raise Conflict("Busy", f"tenant {image.tenant} changes too fast: retry")

    async def _bind(self, image: Image, host: str, guard: Guard) -> Image:
        held = Residency(image.tenant, image.digest, host, self._now_s())
        try:
            require_image_within(self._quota_of(image.tenant), self.of(image.tenant), image)
        except Exhausted:  # recorded as held, so that the reconciler has the host forget it
            await self._store.commit([Put(keys.residency(image.tenant, image.digest, host), codec.encode(held))])
            raise
        text = f"bound to {image.digest}, {image.size_bytes >> 20} MiB in {len(image.layers)} layers"
        writes: list[Write] = [
            Put(keys.image(image.tenant, image.name), codec.encode(image)),
            Put(keys.residency(image.tenant, image.digest, host), codec.encode(held)),
            self._event(image, "Imported", text, host),
            *guard.writes,
        ]
        revision = await self._store.commit(writes, guard.expect)
        await self._view.reached(revision)  # so that what is made of it next finds it
        return replace(image, revision=revision)

    def known(self, tenant: str, name: str) -> Image | None:
        """The image of that name, as the view has it."""
        return self._view.images.get(keys.image(tenant, name))

    async def unbind(self, tenant: str, name: str) -> Image:
        """Removes a name. Precondition while a live sandbox needs it: no other name has the digest.

        While that is found out no sandbox of the image can be made: whoever makes one expects the mark not to be there.
        The mark is under a lease, so that it goes when this control plane does."""
        for _ in range(ATTEMPTS):
            image = await self.get(tenant, name)
            mark = keys.image_removal(tenant, image.digest)
            there = Expect(keys.image(tenant, image.name), image.revision)
            lease = await self._store.grant_lease(REMOVAL_LEASE_S)
            try:
                marked = await self._store.commit([Put(mark, b"", lease)], [Expect(mark, 0), there])
                await self._require_unused(image)
                told = self._event(image, "Unbound", f"was bound to {image.digest}")
                revision = await self._store.commit([Delete(there.key), told], [Expect(mark, marked), there])
            except (Conflict, NotFound):  # NotFound: the lease ran out
                continue
            finally:
                await self._store.revoke_lease(lease)
            await self._view.reached(revision)
            return image
        raise Conflict("Busy", f"image {name} changes too fast: retry")

    async def _require_unused(self, image: Image) -> None:
        if any(other.digest == image.digest and other.name != image.name for other in self.of(image.tenant)):
            return
        page = await self._store.page(keys.sandboxes_of(image.tenant))
        sandboxes = [codec.decode(Sandbox, record.value, record.key) for record in page.records]
        users = sorted(s.name for s in sandboxes if _uses(s, image.digest))
        if users:
            shown = ", ".join(users[:8]) + (f" and {len(users) - 8} more" if len(users) > 8 else "")
            text = f"image {image.name} is in use by {shown}: remove those first"
            raise Precondition("ImageInUse", text, image=image.name, sandboxes=",".join(users)[:256])

    async def forgotten_by(self, residency: Residency) -> None:
        """The host does not hold it any more."""
        tenant, digest, host = residency.tenant, residency.digest, residency.host
        await self._store.commit([Delete(keys.residency(tenant, digest, host))])

    async def reported(self, host: Host) -> None:
        """Takes back what a host does not name in its report, unless it was imported only just now."""
        named = set(host.image_digests)
        late_s = self._now_s() - SETTLE_S
        gone = [
            key
            for key, held in self._view.residency.items()
            if held.host == host.name and held.digest not in named and held.recorded_at_s < late_s
        ]
        if gone:
            await self._store.commit([Delete(key) for key in gone])

    def unneeded(self) -> list[Residency]:
        """What no name is bound to and no live sandbox needs: its READY hosts may forget it."""
        view = self._view
        named = {(image.tenant, image.digest) for image in view.images.values()}
        nameless = [held for held in view.residency.values() if (held.tenant, held.digest) not in named]
        if not nameless:
            return []
        live = (s for s in view.sandboxes.values() if s.status.phase not in lifecycle.ENDED)
        used = {(s.tenant, s.spec.image_digest) for s in live}
        return [held for held in nameless if (held.tenant, held.digest) not in used and held.host in view.alive]

    def _event(self, image: Image, reason: str, message: str, host: str = "") -> Put:
        return events.entry(Event(self._now_s(), "image", image.name, reason, message, host, image.tenant))


def _uses(sandbox: Sandbox, digest: str) -> bool:
    return sandbox.spec.image_digest == digest and sandbox.status.phase not in lifecycle.ENDED


def _image(record: Record) -> Image:
    return codec.decode(Image, record.value, record.key, revision=record.mod_revision)
