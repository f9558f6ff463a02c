/* The host half of the hugetlb balloon: guest frames in, holes in memory files out. No Python, no globals.
 *
 * Promise: whatever list of runs a guest sends, only bytes that a region of the map owns are ever named in a
 * plan, each of them at most once, and applying a plan says exactly how far it came. Everything here is
 * reentrant.
 *
 * Three steps: balloon_map_make checks the memory map once; balloon_coalesce turns a hostile list into a plan
 * of sorted, disjoint, maximal extents; balloon_apply walks a plan with fallocate(2). */
#ifndef SANDLOOM_BALLOON_H
#define SANDLOOM_BALLOON_H

#include <stddef.h>
#include <stdint.h>

#define BALLOON_PAGE 4096u

/* A stretch of guest-physical memory that stands in a file. Everything in bytes, multiples of BALLOON_PAGE.
 */
struct balloon_region {
    uint64_t gpa;
    uint64_t length;
    uint64_t offset;
    uint32_t file;  /* index into the descriptors that balloon_apply gets */
    uint64_t reach; /* made by balloon_map_make: end of the gap-free stretch of regions this one is in */
};

struct balloon_map {
    struct balloon_region *regions; /* by gpa, disjoint; owned by the map */
    size_t count;
    uint64_t bytes; /* what all regions own together */
};

/* Why a set of regions is no map. */
enum balloon_fault {
    BALLOON_SOUND = 0,
    BALLOON_NO_LENGTH, /* a region of length 0 */
    BALLOON_UNALIGNED, /* gpa, length or offset is no multiple of BALLOON_PAGE */
    BALLOON_WRAPS,     /* gpa + length does not fit in 64 bits, or offset + length not in 63 (a file) */
    BALLOON_OVERLAPS,  /* two regions claim the same guest-physical page */
    BALLOON_ALIASES,   /* two regions claim the same page of a file */
    BALLOON_NO_MEMORY, /* malloc failed */
};

/* Why a run is refused, whole: nothing of it enters the plan. */
enum balloon_refusal {
    BALLOON_EMPTY,    /* count 0 */
    BALLOON_WRAPPING, /* its end does not fit in 64 bits */
    BALLOON_OUTSIDE,  /* some byte of it belongs to no region: a PCI hole, a device, past the end */
    BALLOON_REFUSALS,
};

struct balloon_extent {
    uint64_t offset;
    uint64_t length;
    uint32_t file;
};

struct balloon_plan {
    struct balloon_extent *extents; /* by guest-physical address; owned by the plan */
    size_t count;
    uint32_t files;                     /* one more than the highest file index of any extent */
    uint64_t bytes;                     /* what the extents cover */
    uint64_t duplicate_bytes;           /* what accepted runs named more than once; stays at UINT64_MAX */
    uint64_t refused[BALLOON_REFUSALS]; /* runs, by reason */
    size_t first_refused;               /* its index in the list; meaningless when nothing was refused */
};

/* What there is to do with the extents of a plan. */
enum balloon_action {
    BALLOON_PUNCH,    /* PUNCH_HOLE | KEEP_SIZE: the pages go back to the host, and read as zero */
    BALLOON_POPULATE, /* KEEP_SIZE: pages are allocated now, not on first touch; what is there stays */
};

struct balloon_progress {
    uint64_t bytes; /* done, from the plan's first extent on, without a gap */
    uint64_t calls; /* that succeeded */
    int error;      /* errno of the call that failed; 0 when all is done */
    /* The call that failed. Nothing after it was tried. */
    uint32_t file;
    uint64_t offset;
    uint64_t length;
};

/* fallocate(2), or what a test puts in its place. */
typedef int (*balloon_fallocate)(int fd, int mode, int64_t offset, int64_t length);

/* Takes a copy of `regions`, in any order. Other than BALLOON_SOUND: *map is untouched, *culprit is the index
 * of a region at fault. */
enum balloon_fault balloon_map_make(const struct balloon_region *regions, size_t count,
                                    struct balloon_map *map, size_t *culprit);
void balloon_map_free(struct balloon_map *map);

/* The region that owns guest-physical `gpa`, or NULL. */
const struct balloon_region *balloon_find(const struct balloon_map *map, uint64_t gpa);

/* Reads `runs` little-endian runs of `words` u64 each: (first, count) when words is 2, (first) alone with
 * count 1 when it is 1. `first` and `count` count units of `unit` bytes (a power of two >= BALLOON_PAGE) of
 * guest-physical memory. Returns 0, or -ENOMEM with *plan untouched. O(n log n), O(n) when sorted already; no
 * more than 16 bytes a run and 24 bytes an extent. */
int balloon_coalesce(const struct balloon_map *map, const unsigned char *wire, size_t runs, size_t words,
                     uint64_t unit, struct balloon_plan *plan);
void balloon_plan_free(struct balloon_plan *plan);

/* Applies `action` in calls of at most `piece` bytes (> 0); fds has an entry for each file index below
 * plan->files. Stops at the first failure; EINTR is tried again. */
void balloon_apply(const struct balloon_plan *plan, const int *fds, enum balloon_action action,
                   uint64_t piece, balloon_fallocate call, struct balloon_progress *progress);

#endif
