"""Join tokens: by which a host that has no certificate yet joins, once. Pure.

A token is one word for people to carry: `sandloom-join-` and, in URL-safe base64, a JSON array of the address to
join at, the token's id, its secret and the CA's certificate (PEM). So a joining host knows whom to trust before it says
anything.

    joins/<id>      JoinRecord: the secret's SHA-256 (it has 256 random bits, so nothing slower is of use), the name it
                    is for, and when it expires. Spending a token deletes the record in the very commit that records
                    the host's certificate.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass, field

from controlplane.errors import Denied, Invalid
from controlplane.model import REVISION

PREFIX = "sandloom-join-"
DEFAULT_LIFETIME_S, LONGEST_LIFETIME_S = 3600, 7 * 86_400
SECRET_BYTES = 32


@dataclass(frozen=True)
class JoinRecord:
    """What is kept of a token. `host`: the only name it is for; empty for any that is free."""

    id: str
    secret_hash: str
    expires_at_s: float
    host: str = ""
    revision: int = field(default=0, metadata=REVISION)


@dataclass(frozen=True)
class Ticket:
    """What a token says to the host that carries it."""

    address: str
    id: str
    secret: str
    ca_pem: str


def hash_of(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def encode(ticket: Ticket) -> str:
    """The word."""
    text = json.dumps([ticket.address, ticket.id, ticket.secret, ticket.ca_pem])
    return PREFIX + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode(word: str) -> Ticket:
    """What a word says. Invalid when it is no token."""
    try:
        body = word.strip().removeprefix(PREFIX)
        parts = json.loads(base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True))
        if not word.strip().startswith(PREFIX) or len(parts) != 4 or not all(isinstance(part, str) for part in parts):
            raise ValueError("it has other parts")
    except (ValueError, binascii.Error, TypeError) as error:
        raise Invalid("token", "it is no join token: copy all of what `sandloom hosts token` printed") from error
    return Ticket(*parts)


def require_good(record: JoinRecord | None, secret: str, name: str, now_s: float) -> JoinRecord:
    """The record, if the token is good for `name` now. Denied otherwise, always in the same words."""
    good = record is not None and hmac.compare_digest(record.secret_hash, hash_of(secret))
    if record is None or not good or record.expires_at_s <= now_s or record.host not in ("", name):
        text = "the token is unknown, spent, expired or for another host: have a new one made (`sandloom hosts token`)"
        raise Denied("TokenRefused", text)
    return record
