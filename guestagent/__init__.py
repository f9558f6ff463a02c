"""The agent of a guest: its program (`src/`), and the host's end of the protocol between them (PROTOCOL.md).

`protocol.AgentSession` is the host's end, `fake.FakeAgent` an agent in memory for tests, `binary_path`
the built program. Nothing here does I/O.
"""

from guestagent.binary import binary_path

__all__ = ["binary_path"]
