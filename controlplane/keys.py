"""Where things are in the store. One place, so that no two parts of the control plane can disagree.

sandboxes/<tenant>/<name>,<uid>      Sandbox     ("," sorts below all of a name's characters: key order is name order)
uids/<uid>                           the sandbox's key
names/<tenant>/<name>                uid of the newest sandbox of that name; guards the name against a second one
requests/<tenant>/<request_id>       Request     what a request_id was first used for
images/<tenant>/<name>               Image
image-removal/<tenant>/<digest>      present, under a lease, while it is found out whether the image may be removed
residency/<tenant>/<digest>/<host>   Residency
pools/<tenant>/<name>                Pool
hosts/<host>                         Host
joins/<id>                           JoinRecord
members/<host>                       Member; outlives the host as a tombstone
alive/<host>                         present as long as the host's lease is
tenants/<tenant>                     Tenant
quotas/<tenant>                      nothing; written by every decision on the tenant's quota (admission.py)
uses/<tenant>/<digest>               Use         what sandboxes of an image were measured to use
events/<time_ns>-<random>            Event
ledger/<tenant>/<removed_ns>-<uid>   Usage       what a sandbox that is gone was given (usageledger.py)
sync                                 nothing; written to make a revision of ours (view.py)
leader                               name of the replica that leads, under its lease; its revision is the term
"""

from __future__ import annotations

ALL = ""
LEADER, SYNC = "leader", "sync"
SANDBOXES, UIDS, NAMES, REQUESTS = "sandboxes/", "uids/", "names/", "requests/"
IMAGES, IMAGE_REMOVAL, RESIDENCY = "images/", "image-removal/", "residency/"
HOSTS, ALIVE, QUOTAS, EVENTS = "hosts/", "alive/", "quotas/", "events/"
POOLS, TENANTS, MEMBERS, JOINS = "pools/", "tenants/", "members/", "joins/"
USES, LEDGER = "uses/", "ledger/"


def use(tenant: str, digest: str) -> str:
    """The key of a workload's measured use."""
    return f"{USES}{tenant}/{digest}"


def split_use(key: str) -> tuple[str, str]:
    """(tenant, digest) of a use's key."""
    tenant, _, digest = key.removeprefix(USES).partition("/")
    return tenant, digest


def sandboxes_of(tenant: str) -> str:
    """The prefix of a tenant's sandboxes."""
    return f"{SANDBOXES}{tenant}/"


def sandboxes_named(tenant: str, name: str) -> str:
    """The prefix of all sandboxes that have or had a name."""
    return f"{SANDBOXES}{tenant}/{name},"


def sandbox(tenant: str, name: str, uid: str) -> str:
    """The key of one sandbox."""
    return f"{SANDBOXES}{tenant}/{name},{uid}"


def split_sandbox(key: str) -> tuple[str, str, str]:
    """(tenant, name, uid) of a sandbox's key."""
    tenant, _, rest = key.removeprefix(SANDBOXES).partition("/")
    name, _, uid = rest.partition(",")
    return tenant, name, uid


def uid(of: str) -> str:
    """The key that leads from a uid to its sandbox's key."""
    return f"{UIDS}{of}"


def name(tenant: str, of: str) -> str:
    """The key that guards a name."""
    return f"{NAMES}{tenant}/{of}"


def request(tenant: str, request_id: str) -> str:
    """The key of a used request_id."""
    return f"{REQUESTS}{tenant}/{request_id}"


def images_of(tenant: str) -> str:
    """The prefix of a tenant's images."""
    return f"{IMAGES}{tenant}/"


def image(tenant: str, of: str) -> str:
    """The key of one image by name."""
    return f"{IMAGES}{tenant}/{of}"


def image_removal(tenant: str, digest: str) -> str:
    """The key that keeps an image from being used while it is about to be removed."""
    return f"{IMAGE_REMOVAL}{tenant}/{digest}"


def residency(tenant: str, digest: str, host: str) -> str:
    """The key that says a host holds an image."""
    return f"{RESIDENCY}{tenant}/{digest}/{host}"


def pools_of(tenant: str) -> str:
    """The prefix of a tenant's warm pools."""
    return f"{POOLS}{tenant}/"


def pool(tenant: str, of: str) -> str:
    """The key of one warm pool."""
    return f"{POOLS}{tenant}/{of}"


def tenant(of: str) -> str:
    """The key of a tenant's record."""
    return f"{TENANTS}{of}"


def host(of: str) -> str:
    """The key of a host's report."""
    return f"{HOSTS}{of}"


def member(host: str) -> str:
    """The key of what operators decided of a host."""
    return f"{MEMBERS}{host}"


def join(of: str) -> str:
    """The key of what is kept of a join token."""
    return f"{JOINS}{of}"


def alive(host: str) -> str:
    """The key that exists as long as a host's lease does."""
    return f"{ALIVE}{host}"


def quota_guard(tenant: str) -> str:
    """The key that every decision on a tenant's quota writes."""
    return f"{QUOTAS}{tenant}"


def event(time_ns: int, salt: str) -> str:
    """The key of an event: sorts by time."""
    return f"{EVENTS}{time_ns:020d}-{salt}"


def ledger_of(tenant: str) -> str:
    """Prefix of a tenant's usage records, oldest first."""
    return f"{LEDGER}{tenant}/"


def ledger(tenant: str, removed_ns: int, of: str) -> str:
    """The key of a removed sandbox's usage, by its uid."""
    return f"{ledger_of(tenant)}{removed_ns:020d}-{of}"


def split_ledger(key: str) -> tuple[str, int]:
    """(tenant, removed_ns) of such a key."""
    tenant, _, rest = key.removeprefix(LEDGER).partition("/")
    return tenant, int(rest.partition("-")[0])
