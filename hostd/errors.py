"""What can go wrong on a host, sorted by what the caller can do about it. `HostdError` is the one root."""

from __future__ import annotations


class HostdError(Exception):
    """Root. `reason` is a stable CamelCase word for status and events; str() is for people."""

    reason = "HostError"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class ConfigError(HostdError):
    """The configuration or the host is not fit to start on: mend it and start again."""

    reason = "BadConfig"


class InvalidSpec(HostdError):
    """What was asked for can never work here: ask for something else."""

    reason = "InvalidSpec"


class ShortOfResources(HostdError):
    """The host has not enough of something now; the message has the numbers. Retry later or elsewhere."""

    reason = "ShortOfResources"

    def __init__(self, message: str, *, reason: str | None = None, passing: bool = False) -> None:
        super().__init__(message, reason=reason)
        self.passing = passing
        """Whether it may fit in a moment, once others have given back what they do not need."""


class ImageMissing(HostdError):
    """The image is not (or no longer) in this host's store: import it again."""

    reason = "ImageMissing"


class RegistryUnavailable(HostdError):
    """A registry does not answer, or not as it has to: mend what the message names, then retry."""

    reason = "RegistryUnavailable"


class NotAdmitted(HostdError):
    """Whoever asks may not have it from here: the message says what would have to change."""

    reason = "NotAdmitted"


class KernelMissing(HostdError):
    """No guest kernel could be had: the message says which package and how to get it."""

    reason = "KernelMissing"


class StartFailed(HostdError):
    """The VMM, kernel, agent or command did not come up; the sandbox has ended."""

    reason = "StartFailed"


class CommandFailed(StartFailed):
    """The command could not be run: exit code 127 (not found) or 126 (found, cannot be run)."""

    reason = "CommandFailed"

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SandboxGone(HostdError):
    """No such sandbox here, or it has ended: nothing to retry."""

    reason = "SandboxGone"


class NotRunning(HostdError):
    """The sandbox is here, but in no state for this: wait for it to run, or start another one."""

    reason = "NotRunning"


class AgentLost(HostdError):
    """The guest's agent is silent or broke the protocol: this sandbox has to end, no other one is touched."""

    reason = "AgentLost"


class ControlLost(HostdError):
    """The VMM's control socket does not answer, or refuses; retry, and end the sandbox when that does not help."""

    reason = "ControlLost"


class JournalError(HostdError):
    """The journal holds something unreadable; the message names the file."""

    reason = "JournalError"


class TemplateUnusable(HostdError):
    """A template is damaged or does not fit: boot cold and make it anew."""

    reason = "TemplateUnusable"


class CannotCheckpoint(HostdError):
    """What runs has something that a checkpoint cannot carry: the message names it and what to do about it."""

    reason = "CannotCheckpoint"


class CheckpointFailed(HostdError):
    """No checkpoint was made, and the sandbox goes on: the message says where it failed. Try again."""

    reason = "CheckpointFailed"


class CheckpointUnusable(HostdError):
    """A checkpoint is gone, damaged, or of another QEMU or CPU than this host's: make it anew."""

    reason = "CheckpointUnusable"
