"""The root of all this package's errors, and the leaves the API's own modules raise.

It sits in `controlplane.api` because hosts may import nothing else of the package; `controlplane.errors` adds the
leaves that only the control plane raises.
"""

from __future__ import annotations


class ControlPlaneError(Exception):
    """Root. str() is for people: what failed, on what, and what to do next."""


class IdentityError(ControlPlaneError):
    """A certificate or a name is no sandloom identity: have the certificate issued again."""


class TlsError(ControlPlaneError):
    """TLS files cannot be read or do not fit together: the message names the file."""


class PolicyError(ControlPlaneError):
    """A service policy contradicts itself or cannot be read: the message says what to write instead."""
