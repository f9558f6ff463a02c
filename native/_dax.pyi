"""Who holds which physical pages, and what of a file the page cache holds: measured, never estimated.

Sources of fact: /proc/PID/pagemap and /proc/kpageflags (the kernel's admin-guide/mm/pagemap.rst), /proc/PID/smaps
(filesystems/proc.rst), cachestat(2), mincore(2). All functions release the GIL while they work.
"""

from collections.abc import Hashable, Iterable
from typing import Final, TypeAlias, TypeVar, final

from _typeshed import FileDescriptorLike, structseq

PAGE_BYTES: Final[int]
"""The machine's page size: the unit of every count of pages here."""

_Owner = TypeVar("_Owner", bound=Hashable)
_Sizes: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int]

def page_split(
    ranges: Iterable[tuple[_Owner, int, int, int]], /
) -> tuple[int, list[tuple[_Owner, int, dict[int, int]]]]:
    """Which physical pages these owners hold, alone and together, read off their processes' page tables.

    `ranges` are (owner, pid, start, end), addresses of whole pages as `smaps` gives them. An owner is whatever may be
    a dict's key, and may have several processes; what is asked is which owners hold a page, not how often it is
    mapped: a page that one owner maps twice, or in two ranges that overlap, counts once for it.

    Returns (distinct_pages, [(owner, resident_pages, {holders: pages})]), owners in the order they first came. So
    `{1: 100, 3: 7}` says: 100 pages that no other of these owners holds, and 7 that it shares with two more. For each
    owner the sum of the dict is resident_pages; over all owners the sum of pages / holders is distinct_pages, exactly.

    What counts: pages present in the page tables, huge ones (THP and hugetlbfs) by their 4 KiB parts. What does not:
    swapped pages, and frames that are no one's: the zero page, small or huge, mapped devices, and the kernel's own
    (KPF_ZERO_PAGE, KPF_NOPAGE, KPF_RESERVED of /proc/kpageflags). smaps leaves these out of Rss too, so that an
    owner's resident_pages are its Rss less what it maps twice, plus hugetlbfs.

    A process that is gone, or goes meanwhile, holds nothing from then on: its owner stays in the answer with what
    was seen. The walk is no snapshot: a page that moves meanwhile may be missed or counted at both places.

    Takes some 15 ms a GiB mapped. Memory: 4 bytes for each 4 KiB of every 2 MiB of physical memory of which anything
    is held (0.1 %), whatever the number of owners.

    PermissionError without CAP_SYS_ADMIN, which sees the frames. ValueError for addresses that are no whole pages or
    in the wrong order, and for more than 8192 owners. OSError with the file's name for what else fails.
    """

@final
class Mapping(
    structseq[int | str | tuple[int, int]],
    tuple[
        int, int, str, int, tuple[int, int], str, int, int, int, int, int, int, int, int, int, int, int, int, int, int
    ],
):
    """One mapping of a process: a tuple with names. Sizes are KiB; what the kernel does not say is 0."""

    __match_args__: Final = (
        "start",
        "end",
        "perms",
        "offset",
        "file_id",
        "path",
        "rss_kib",
        "pss_kib",
        "shared_clean_kib",
        "shared_dirty_kib",
        "private_clean_kib",
        "private_dirty_kib",
        "anonymous_kib",
        "anon_huge_kib",
        "shmem_huge_kib",
        "file_huge_kib",
        "shared_hugetlb_kib",
        "private_hugetlb_kib",
        "swap_kib",
        "swap_pss_kib",
    )
    @property
    def start(self) -> int:
        """[0] First address."""

    @property
    def end(self) -> int:
        """[1] Address after the last."""

    @property
    def perms(self) -> str:
        """[2] Four letters: r w x or -, then s (shared) or p (private)."""

    @property
    def offset(self) -> int:
        """[3] Where in the file it starts, in bytes."""

    @property
    def file_id(self) -> tuple[int, int]:
        """[4] (device, inode) of the file as os.stat gives st_dev and st_ino; (0, 0) of none."""

    @property
    def path(self) -> str:
        """[5] As the kernel shows it: a newline is \\012, " (deleted)" follows a name that is gone, "[heap]", ""."""

    @property
    def rss_kib(self) -> int:
        """[6] Resident, without hugetlbfs."""

    @property
    def pss_kib(self) -> int:
        """[7] Resident, each page divided by how many mappings of the whole machine have it."""

    @property
    def shared_clean_kib(self) -> int:
        """[8] Resident, mapped more than once, not written."""

    @property
    def shared_dirty_kib(self) -> int:
        """[9] Resident, mapped more than once, written."""

    @property
    def private_clean_kib(self) -> int:
        """[10] Resident, mapped once, not written."""

    @property
    def private_dirty_kib(self) -> int:
        """[11] Resident, mapped once, written."""

    @property
    def anonymous_kib(self) -> int:
        """[12] Resident, of no file: also private copies of a file's pages."""

    @property
    def anon_huge_kib(self) -> int:
        """[13] Of anonymous_kib: in huge pages."""

    @property
    def shmem_huge_kib(self) -> int:
        """[14] Shared memory (memfd, tmpfs) mapped in huge pages."""

    @property
    def file_huge_kib(self) -> int:
        """[15] Page cache of a file mapped in huge pages."""

    @property
    def shared_hugetlb_kib(self) -> int:
        """[16] hugetlbfs, mapped more than once."""

    @property
    def private_hugetlb_kib(self) -> int:
        """[17] hugetlbfs, mapped once."""

    @property
    def swap_kib(self) -> int:
        """[18] Swapped out, of anonymous memory."""

    @property
    def swap_pss_kib(self) -> int:
        """[19] The same, divided as pss_kib."""

def smaps(pid: int, /) -> list[Mapping]:
    """All mappings of a process, by address; [] of one without memory (a zombie, a kernel thread).

    FileNotFoundError or ProcessLookupError when it is gone, PermissionError when it is another user's, OSError with
    errno EBADMSG when the text is not what a kernel writes.
    """

def smaps_rollup(pid: int, /) -> Mapping:
    """The sums over all mappings, far cheaper than `smaps`; the path is "[rollup]". Errors as `smaps`;
    ProcessLookupError of a process without memory."""

@final
class CacheStat(structseq[int], tuple[int, int, int, int, int]):
    """Pages of a range of a file."""

    __match_args__: Final = ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    @property
    def cached(self) -> int:
        """[0] In the page cache."""

    @property
    def dirty(self) -> int:
        """[1] Of them, not written back yet."""

    @property
    def writeback(self) -> int:
        """[2] Of them, being written back now."""

    @property
    def evicted(self) -> int:
        """[3] Not cached now, but cached once, as far as the kernel still knows."""

    @property
    def recently_evicted(self) -> int:
        """[4] Of them, evicted so recently that reading one now would be a refault: memory was too short."""

def cachestat(fd: FileDescriptorLike, /, offset: int = 0, length: int = 0) -> CacheStat:
    """cachestat(2) of bytes [offset, offset + length), a length of 0 meaning up to the end.

    OSError: ENOSYS before Linux 6.5, EOPNOTSUPP of hugetlbfs, EPERM of a file that is not the caller's and not open
    for writing.
    """

def mincore(fd: FileDescriptorLike, /, offset: int = 0, length: int = 0) -> int:
    """How many pages of the range the page cache holds, by mincore(2) over a mapping made for it.

    The kernel answers truly to the file's owner, to who may write it, and to root; to others it says "all"
    (since Linux 5.2). OSError: ENODEV of what cannot be mapped.
    """

def prefetch(fd: FileDescriptorLike, /, offset: int = 0, length: int = 0) -> None:
    """Starts reading the range into the page cache, and does not wait for it.

    posix_fadvise(WILLNEED) in small steps: the kernel silently cuts one call off at its read-ahead window.
    """

def populate(fd: FileDescriptorLike, /, offset: int = 0, length: int = 0) -> int:
    """Reads the range, rounded out to pages and cut off at the file's end, into the page cache and waits for it; how
    many bytes that is.

    MADV_POPULATE_READ (Linux 5.14, read(2) before): no copy. OSError when the file cannot be read.
    """
