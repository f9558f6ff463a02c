"""Names for sandboxes whose user gave none: two readable words, and a number when those are taken. Pure."""

from __future__ import annotations

from collections.abc import Callable

FIRST = (
    "amber", "ample", "bold", "brisk", "calm", "clear", "cosy", "crisp", "deft", "early", "fair", "fleet", "fond",
    "gentle", "glad", "golden", "grand", "green", "hardy", "humble", "jolly", "keen", "kind", "lively", "lucid",
    "mellow", "merry", "mild", "neat", "nimble", "noble", "patient", "plain", "proud", "quick", "quiet", "ready",
    "rosy", "sharp", "silver", "smooth", "snug", "solid", "steady", "still", "sunny", "swift", "tidy", "vivid", "warm",
)  # fmt: skip
SECOND = (
    "bobbin", "braid", "canvas", "cotton", "damask", "denim", "felt", "fibre", "flax", "fleece", "gauze", "heddle",
    "hem", "jute", "knit", "lace", "linen", "loom", "mohair", "muslin", "needle", "patch", "pleat", "quilt", "reed",
    "ribbon", "sash", "satin", "seam", "selvage", "shuttle", "silk", "skein", "spindle", "spool", "stitch", "tassel",
    "thread", "treadle", "tulle", "tweed", "twill", "twine", "velvet", "warp", "weave", "weft", "wool", "worsted",
)  # fmt: skip


def made_up(choice: Callable[[int], int], attempt: int = 0) -> str:
    """A name; `choice(n)` gives a number below n. Later attempts get a number, so that they end."""
    words = f"{FIRST[choice(len(FIRST))]}-{SECOND[choice(len(SECOND))]}"
    return words if attempt < 3 else f"{words}-{choice(10 ** min(9, attempt))}"
