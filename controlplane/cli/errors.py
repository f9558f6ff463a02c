"""What a command can fail with. Every leaf becomes one line on stderr and an exit code (see `cli.main`)."""

from __future__ import annotations

from controlplane.api.errors import ControlPlaneError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RUN_FAILED = 125  # as docker: sandloom itself failed, not the workload
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class CliError(ControlPlaneError):
    """Root: `what` failed, `on` what, and what to do next (`remedy`). Empty parts are left out of the line."""

    def __init__(self, what: str, on: str = "", remedy: str = "") -> None:
        self.what = what
        self.on = on
        self.remedy = remedy
        super().__init__(": ".join(part for part in (what, on, remedy) if part))


class UsageError(CliError):
    """The command line is wrong: type it differently. Nothing was done."""


class NoFabric(CliError):
    """No control plane is known or running here: start one."""

    def __init__(self, on: str = "") -> None:
        super().__init__("no fabric is running here", on, "start one with `sandloom dev up`")


class CallFailed(CliError):
    """The control plane refused or failed a call.

    `code` is the gRPC status code's name (NOT_FOUND …) and `reason` the ErrorInfo reason, "" when it has none.
    """

    def __init__(self, what: str, on: str = "", remedy: str = "", *, code: str = "", reason: str = "") -> None:
        super().__init__(what, on, remedy)
        self.code = code
        self.reason = reason


class Unreachable(CallFailed):
    """Nothing answered in time, or the connection broke: retry, or look at `sandloom dev status`."""


class DaemonFailed(CliError):
    """A daemon of `dev up` did not come up or did not end; `log_tail` holds its last lines."""

    def __init__(self, what: str, on: str = "", remedy: str = "", *, log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(what, on, remedy)
        self.log_tail = log_tail
