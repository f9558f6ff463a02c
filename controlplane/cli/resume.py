"""Where a reader of a recorded output stands, so that it can go on after its connection broke. Pure.

The API replays a sandbox's output from the oldest kept piece, each with the time it was recorded at. While the
oldest piece is still the one first seen, counting bytes a stream tells exactly what is new. Once the record was
turned over, the recorded times tell; pieces of one and the same time are counted.
"""

from __future__ import annotations

from controlplane.api.v1 import sandboxes_pb2

STREAMS = ("stdout", "stderr")


class Position:
    """`replayed` before each further connection; `fresh` for each piece that comes."""

    def __init__(self, *, complete: bool) -> None:
        """`complete`: the first connection asked for everything that is kept."""
        self._complete = complete
        self._first_ns: int | None = None  # of the first piece ever seen
        self._last_ns = 0
        self._seen = dict.fromkeys(STREAMS, 0)
        self._seen_at_last = dict.fromkeys(STREAMS, 0)
        self._skip = dict.fromkeys(STREAMS, 0)
        self._skip_before_ns = 0
        self._deciding = False

    @property
    def started(self) -> bool:
        """Whether any piece was seen."""
        return self._first_ns is not None

    def replayed(self) -> None:
        """From now on pieces come from the oldest kept one again."""
        self._deciding = self.started
        self._skip, self._skip_before_ns = dict.fromkeys(STREAMS, 0), 0

    def fresh(self, output: sandboxes_pb2.StreamOutput) -> bytes:
        """What of this stdout or stderr piece was not seen before; b"" when all of it was."""
        stream = output.WhichOneof("output") or ""
        data: bytes = getattr(output, stream)
        if self._deciding:
            self._decide(output.time_unix_ns)
        if output.time_unix_ns < self._skip_before_ns:
            return b""
        if output.time_unix_ns > self._skip_before_ns > 0:  # past the last piece seen: all else is new
            self._skip, self._skip_before_ns = dict.fromkeys(STREAMS, 0), 0
        old = min(self._skip[stream], len(data))
        self._skip[stream] -= old
        new = data[old:]
        if new:
            self._note(stream, len(new), output.time_unix_ns)
        return new

    def _decide(self, first_ns: int) -> None:
        self._deciding = False
        if self._complete and first_ns == self._first_ns:
            self._skip = dict(self._seen)
        else:
            self._skip, self._skip_before_ns = dict(self._seen_at_last), self._last_ns

    def _note(self, stream: str, size: int, time_ns: int) -> None:
        if self._first_ns is None:
            self._first_ns = time_ns
        if time_ns != self._last_ns:
            self._last_ns, self._seen_at_last = time_ns, dict.fromkeys(STREAMS, 0)
        self._seen[stream] += size
        self._seen_at_last[stream] += size
