"""A real image for demo, tests and benchmarks: a Debian userland with python3 and ssh-keygen, made by mmdebstrap.

    $XDG_CACHE_HOME/sandloom/userland-<codename>-<packages>.tar     about 220 MB; made once (a minute), then reused

It comes from the same archive that this machine's apt already trusts and uses, verified by the same keyring.
"""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from pathlib import Path

from tests.once import one_at_a_time

PACKAGES = ("python3", "openssh-client")
