"""Links of sandboxes to their host: made before anything runs in them, gone with them.

    /run/netns/<name>      the sandbox's network namespace, by iproute2 (ip-netns(8))
    veth <name>            the host's end of its link; goes with the namespace
    table inet <name>      its policy (netpolicy.py)

Whatever is there is found again by its name, which follows from the sandbox's uid: nothing has to be remembered to
take it down. Needs ip and nft.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

from hostd.drivers.oci.netpolicy import Link, address_of, inside_commands, link_commands, name_of, ruleset
from hostd.errors import HostdError, ShortOfResources, StartFailed
from hostd.spec import Network

DEADLINE_S = 30.0
NAMESPACES = Path("/run/netns")
FORWARDING = Path("/proc/sys/net/ipv4/conf")
WORDS_CHARS = 400


@dataclass(frozen=True)
class Links:
    """All links of one hostd, with addresses of `cidr`. Its calls block for milliseconds, in any thread."""

    cidr: str = "10.213.0.0/16"
    nat: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def namespace(self, uid: str) -> Path:
        """Where a sandbox's network namespace is bound."""
        return NAMESPACES / name_of(uid)

    def make(self, uid: str, network: Network) -> Link:
        """Policy first, then the link. StartFailed, ShortOfResources; then nothing of it is there."""
        with self.lock:
            address = address_of(uid, self.cidr, _routed())
            if not address:
                raise ShortOfResources(f"all addresses of {self.cidr} are taken: end a sandbox, or widen network_cidr")
            link = Link(name_of(uid), address)
            try:
                _run(["nft", "-f", "-"], ruleset(link, network, nat=self.nat))
                _run(["ip", "netns", "add", link.name])
                _run(["ip", "-batch", "-"], link_commands(link))
                _run(["ip", "-netns", link.name, "-batch", "-"], inside_commands(link))
                (FORWARDING / link.veth / "forwarding").write_text("1")
            except (HostdError, OSError) as error:
                self.remove(uid)
                raise StartFailed(f"its network cannot be made: {error}", reason="NetworkFailed") from error
        return link

    def remove(self, uid: str) -> None:
        """Idempotent. HostdError when something of it stays."""
        name = name_of(uid)
        if (NAMESPACES / name).exists():
            _run(["ip", "netns", "delete", name])
        if Path(f"/sys/class/net/{name}").exists():  # it goes with its namespace, as soon as nothing runs in that
            _run(["ip", "link", "delete", name], tolerate="Cannot find device")
        elif not self.used(uid):
            return
        _run(["nft", "delete", "table", "inet", name], tolerate="No such file")

    def used(self, uid: str) -> bool:
        """Whether the sandbox has a policy here."""
        if shutil.which("nft") is None:
            return False
        return f"table inet {name_of(uid)}" in _run(["nft", "list", "tables", "inet"]).splitlines()


def _routed() -> set[str]:
    """Addresses that this host has a route to of their own."""
    lines = _run(["ip", "-4", "route", "show"]).splitlines()
    return {line.split()[0] for line in lines if line}


def _run(argv: list[str], text: str = "", *, tolerate: str = "") -> str:
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=DEADLINE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostdError(f"{argv[0]}: {error}: apt-get install iproute2 nftables") from error
    if done.returncode and not (tolerate and tolerate in done.stderr):
        raise HostdError(f"{' '.join(argv)}: {done.stderr.strip()[-WORDS_CHARS:]}")
    return done.stdout
