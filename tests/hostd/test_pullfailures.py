"""What skopeo says, in texts that it really printed, and what is made of it."""

from __future__ import annotations

import pytest

from hostd.errors import HostdError, ImageMissing, NotAdmitted, RegistryUnavailable
from hostd.pullfailures import failure_of, last_message

REFERENCE = "r.example:5000/team/app:1"


def log_of(text: str) -> str:
    return f'time="2026-01-02T03:04:05Z" level=fatal msg="{text}"\n'


@pytest.mark.parametrize(
    ("said", "kind", "reason", "told"),
    [
        ("reading manifest 1 in r: manifest unknown: manifest unknown", ImageMissing, "NotInRegistry", REFERENCE),
        ("reading manifest 1 in r: name unknown: repository name not known", ImageMissing, "NotInRegistry", "tag"),
        ("no image found in image index for architecture arm64", ImageMissing, "NotInRegistry", "architecture"),
        ("unable to retrieve auth token: invalid username/password: unauthorized", NotAdmitted, "RegistryDenied",
         "acme.json"),
        ("requested access to the resource is denied", NotAdmitted, "RegistryDenied", "skopeo login"),
        ("toomanyrequests: You have reached your pull rate limit", RegistryUnavailable, "RegistryUnavailable", "wait"),
        ("Get https://r/v2/: x509: certificate signed by unknown authority", RegistryUnavailable, "RegistryUntrusted",
         "/etc/containers/certs.d/r.example:5000"),
        ("http: server gave HTTP response to HTTPS client", RegistryUnavailable, "RegistryPlain", "plain_registries"),
        ("dial tcp: lookup r.example: no such host", RegistryUnavailable, "RegistryUnavailable", "cannot be reached"),
        ("writing blob: write /x: no space left on device", HostdError, "PullFailed", "disk is full"),
        ("something new", HostdError, "PullFailed", "could not be fetched: something new"),
    ],
)  # fmt: skip
def test_a_failure_says_what_failed_on_what_and_what_to_do(
    said: str, kind: type[HostdError], reason: str, told: str
) -> None:
    found = failure_of(log_of(said), REFERENCE, "acme", known=False)
    assert (type(found), found.reason) == (kind, reason)
    assert told in str(found) and "level=fatal" not in str(found)


def test_the_last_message_is_read_out_of_the_log() -> None:
    assert last_message(log_of("first") + log_of(r"pinging \"r\": odd")) == 'pinging "r": odd'
    assert last_message("not a log line") == "not a log line"
    assert len(last_message(log_of("x" * 5000))) < 400
    assert "log" in last_message("")
