"""Where the built monitor is (hostd/drivers/oci/src): beside each sandbox, PID 1 of crun's, and crun's hook."""

from pathlib import Path

MONITOR = Path(__file__).parent / "_build" / "sandloom-monitor"
