"""Page tokens: where a list goes on, at which revision, and of what. Opaque to clients, checked when they come back."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass

from controlplane.errors import Invalid

DEFAULT_PAGE, LARGEST_PAGE = 100, 1000


@dataclass(frozen=True)
class Cursor:
    """A list's next record is the first one after `after`, as of `revision`. `of` names the list and its filters."""

    of: str
    after: str = ""
    revision: int = 0


def token(cursor: Cursor) -> str:
    """The cursor as clients see it."""
    return base64.urlsafe_b64encode(json.dumps([cursor.of, cursor.after, cursor.revision]).encode()).decode()


def parse(text: str, of: str) -> Cursor:
    """The cursor of a token that this list gave out; the beginning when it is empty. Invalid for any other one."""
    if not text:
        return Cursor(of)
    try:
        listed, after, revision = json.loads(base64.b64decode(text, altchars=b"-_", validate=True))
        if listed != of or not isinstance(after, str) or type(revision) is not int or revision < 1:
            raise ValueError("it is of another list")
    except (ValueError, binascii.Error, TypeError) as error:
        raise Invalid("page_token", f"it is not one that this list gave out ({error})") from error
    return Cursor(of, after, revision)


def page_size(asked: int) -> int:
    """How many to give: 100 when nothing is asked, 1000 at most. Invalid when negative."""
    if asked < 0:
        raise Invalid("page_size", f"{asked} is negative")
    return min(asked or DEFAULT_PAGE, LARGEST_PAGE)
