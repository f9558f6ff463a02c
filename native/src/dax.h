/* Who holds which physical pages, and what of a file the page cache holds. Linux only. No Python, no globals.
 *
 * Sources of fact: /proc/PID/pagemap and /proc/kpageflags (Documentation/admin-guide/mm/pagemap.rst),
 * /proc/PID/smaps (Documentation/filesystems/proc.rst), cachestat(2), mincore(2). Every int result is 0 or a
 * negated errno. */
#ifndef SANDLOOM_DAX_H
#define SANDLOOM_DAX_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The split: for each frame, the set of owners that hold it.
 *
 * A frame's set is a node of a trie: its parent is the set without the owner that came last. Owners are
 * walked one after the other, so each node has at most one child in the making at a time, kept in the node:
 * adding an owner to a frame's set is O(1) without hashing, and a page that an owner maps twice is in a set
 * that ends with it already. Memory: 4 bytes for each frame of every 2 MiB of physical memory of which
 * someone holds a page (at most 0.1 % of the host's memory), and 32 bytes a set. */
struct dax_split;

/* What the walker needs of the machine. A test puts its own in place of it. */
struct dax_source {
    void *context;
    /* A handle >= 0 for the page tables of `pid`, or -errno. */
    int (*open)(void *context, pid_t pid);
    void (*close)(void *context, int handle);
    /* Fills in 8 bytes for each page from `page` (address / page size) on; bytes read, 0 at the end, or
     * -errno. */
    ssize_t (*entries)(void *context, int handle, uint64_t page, uint64_t *into, size_t count);
    /* The same from /proc/kpageflags, by frame. */
    ssize_t (*flags)(void *context, uint64_t frame, uint64_t *into, size_t count);
};

struct dax_range {
    uint32_t owner; /* below the split's `owners` */
    pid_t pid;
    uint64_t start_page, end_page;
};

#define DAX_OWNERS_MOST 8192u

/* NULL when out of memory. */
struct dax_split *dax_split_new(uint32_t owners);
void dax_split_free(struct dax_split *split);

/* Walks `ranges` (sorted in place by owner, then pid). To be called once. A process that is gone, or goes,
 * holds nothing more from then on. -EPERM when the kernel hides frame numbers (CAP_SYS_ADMIN), -errno of what
 * else failed, with *culprit the pid at fault. */
int dax_split_walk(struct dax_split *split, struct dax_range *ranges, size_t count,
                   const struct dax_source *source, pid_t *culprit);

/* Distinct frames that were found. */
uint64_t dax_split_distinct(const struct dax_split *split);

/* Fills in counts[owner * (owners + 1) + holders] = pages; the caller zeroes it. */
void dax_split_counts(const struct dax_split *split, uint64_t *counts);

/* The real machine. dax_proc_open: -errno when /proc/kpageflags cannot be opened. */
int dax_proc_open(struct dax_source *source);
void dax_proc_close(struct dax_source *source);

/* smaps. */

enum dax_size {
    DAX_RSS,
    DAX_PSS,
    DAX_SHARED_CLEAN,
    DAX_SHARED_DIRTY,
    DAX_PRIVATE_CLEAN,
    DAX_PRIVATE_DIRTY,
    DAX_ANONYMOUS,
    DAX_ANON_HUGE,
    DAX_SHMEM_HUGE,
    DAX_FILE_HUGE,
    DAX_SHARED_HUGETLB,
    DAX_PRIVATE_HUGETLB,
    DAX_SWAP,
    DAX_SWAP_PSS,
    DAX_SIZES,
};

struct dax_mapping {
    uint64_t start, end;
    uint64_t offset;
    uint64_t inode;
    uint32_t major, minor;
    const char *path; /* into the text, not terminated */
    size_t path_length;
    char perms[5];
    uint64_t kib[DAX_SIZES]; /* 0 where the kernel does not say */
};

/* Parses a whole smaps (or smaps_rollup) text. Returns 0 and *mappings (free with free) and *count; -EBADMSG
 * when the text is no smaps, with *mappings NULL. */
int dax_smaps_parse(const char *text, size_t length, struct dax_mapping **mappings, size_t *count);

/* Reads all of /proc/`pid`/`name` into *text (free with free). -EFBIG over 256 MiB; -ENOENT or -ESRCH: gone.
 */
int dax_proc_read(pid_t pid, const char *name, char **text, size_t *length);

/* Page cache. Ranges in bytes; a length of 0 means up to the end of the file. */

struct dax_cache {
    uint64_t cached, dirty, writeback, evicted, recently_evicted; /* pages */
};

/* cachestat(2). -ENOSYS before Linux 6.5. */
int dax_cachestat(int fd, uint64_t offset, uint64_t length, struct dax_cache *cache);

/* Cached pages by mincore(2), in windows of 1 GiB. -ENODEV for what cannot be mapped. */
int dax_mincore(int fd, uint64_t offset, uint64_t length, uint64_t *cached);

/* Starts reading into the page cache and does not wait for it. Past the end of the file there is nothing to
 * do. */
int dax_prefetch(int fd, uint64_t offset, uint64_t length);

/* Reads into the page cache and waits for it; *bytes is how much of the range, rounded out to pages, was
 * read.
 */
int dax_populate(int fd, uint64_t offset, uint64_t length, uint64_t *bytes);

#endif
