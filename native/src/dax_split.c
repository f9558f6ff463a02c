#include "dax.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#define BLOCK_FRAMES 512u   /* 2 MiB of 4 KiB frames */
#define WALK_ENTRIES 16384u /* 128 KiB of pagemap a read: stays in the second-level cache */
#define NO_SET 0u           /* the empty set: the trie's root */

/* pagemap.rst */
#define PM_PRESENT (1ull << 63)
#define PM_FILE (1ull << 61)      /* of a file or shared memory */
#define PM_EXCLUSIVE (1ull << 56) /* mapped once */
#define PM_FRAME ((1ull << 55) - 1)
/* kernel-page-flags.h. Frames of no one: the zero page (one for all, huge or not), holes in physical memory
 * such as a mapped device, and the kernel's own (vvar). smaps does not count them in Rss either.
 *
 * Asking for every frame would make the walk five times as long, so kpageflags is read only where it can
 * matter: for the head of each 2 MiB (a huge zero page fills one, and pagemap takes it for a file's), and for
 * the whole of a block as soon as an entry in it is neither a file's nor mapped once: to pagemap, which does
 * not know the owner of such frames, they are that. */
#define KPF_NOPAGE (1ull << 20)
#define KPF_ZERO_PAGE (1ull << 24)
#define KPF_RESERVED (1ull << 32)
#define KPF_OWNERLESS (KPF_NOPAGE | KPF_ZERO_PAGE | KPF_RESERVED)

struct set {
    uint32_t parent;
    uint32_t owner; /* the last one that came in; the root has none, and UINT32_MAX here */
    uint32_t size;
    uint32_t child;       /* this set and child_owner */
    uint32_t child_owner; /* UINT32_MAX: no child yet */
    uint64_t frames;
};

/* The sets of the frames of one aligned stretch of physical memory. */
struct block {
    uint64_t number;  /* frame / BLOCK_FRAMES */
    bool flags_known; /* `ownerless` is filled in */
    uint64_t ownerless[BLOCK_FRAMES / 64];
    uint32_t set[BLOCK_FRAMES];
};

struct dax_split {
    uint32_t owners;
    uint64_t distinct;
    struct set *sets;
    size_t set_count, set_room;
    struct block **table; /* open addressing by block number; table_room is a power of two */
    size_t block_count, table_room;
    struct block *last; /* looked up last: neighbours in memory are neighbours in frames, often */
};

struct dax_split *dax_split_new(uint32_t owners) {
    struct dax_split *split = calloc(1, sizeof *split);
    if (split == NULL)
        return NULL;
    split->owners = owners;
    split->set_room = 64;
    split->set_count = 1;
    split->table_room = 1024;
    split->sets = calloc(split->set_room, sizeof *split->sets);
    split->table = calloc(split->table_room, sizeof *split->table);
    if (split->sets == NULL || split->table == NULL) {
        dax_split_free(split);
        return NULL;
    }
    split->sets[NO_SET] = (struct set){.owner = UINT32_MAX, .child_owner = UINT32_MAX};
    return split;
}

void dax_split_free(struct dax_split *split) {
    if (split == NULL)
        return;
    for (size_t i = 0; split->table != NULL && i < split->table_room; i++)
        free(split->table[i]);
    free(split->table);
    free(split->sets);
    free(split);
}

/* Where the block stands in the table, or would. */
static size_t slot_of(struct block *const *table, size_t room, uint64_t number) {
    size_t at = (size_t)((number * 0x9E3779B97F4A7C15ull) >> 32) & (room - 1);
    while (table[at] != NULL && table[at]->number != number)
        at = (at + 1) & (room - 1);
    return at;
}

static int grow_table(struct dax_split *split) {
    size_t room = split->table_room * 2;
    struct block **table = calloc(room, sizeof *table);
    if (table == NULL)
        return -ENOMEM;
    for (size_t i = 0; i < split->table_room; i++)
        if (split->table[i] != NULL)
            table[slot_of(table, room, split->table[i]->number)] = split->table[i];
    free(split->table);
    split->table = table;
    split->table_room = room;
    return 0;
}

/* Marks the frames of the block that belong to no one. */
static int read_flags(struct block *block, const struct dax_source *source) {
    uint64_t flags[BLOCK_FRAMES];
    ssize_t got = source->flags(source->context, block->number * BLOCK_FRAMES, flags, BLOCK_FRAMES);
    if (got < 0)
        return (int)got;
    for (size_t i = 0; i < BLOCK_FRAMES; i++) /* what the file ends before is no memory of the host's */
        if (i >= (size_t)got / 8 || flags[i] & KPF_OWNERLESS)
            block->ownerless[i / 64] |= 1ull << i % 64;
    block->flags_known = true;
    return 0;
}

/* The same of a new block, if its first frame says that it may have such. */
static int read_head(struct block *block, const struct dax_source *source) {
    uint64_t head = KPF_OWNERLESS;
    ssize_t got = source->flags(source->context, block->number * BLOCK_FRAMES, &head, 1);
    if (got < 0)
        return (int)got;
    return head & KPF_OWNERLESS ? read_flags(block, source) : 0;
}

/* The block of `number`, made when it is new. */
static int find_block(struct dax_split *split, uint64_t number, const struct dax_source *source) {
    if (split->last != NULL && split->last->number == number)
        return 0;
    size_t at = slot_of(split->table, split->table_room, number);
    if (split->table[at] == NULL) {
        if (split->block_count * 2 >= split->table_room) {
            int error = grow_table(split);
            if (error)
                return error;
            at = slot_of(split->table, split->table_room, number);
        }
        struct block *block = calloc(1, sizeof *block);
        if (block == NULL)
            return -ENOMEM;
        block->number = number;
        int error = read_head(block, source);
        if (error) {
            free(block);
            return error;
        }
        split->table[at] = block;
        split->block_count++;
    }
    split->last = split->table[at];
    return 0;
}

/* The set `of` and `owner`; -ENOMEM. */
static int set_with(struct dax_split *split, uint32_t of, uint32_t owner, uint32_t *found) {
    if (split->sets[of].child_owner != owner) {
        if (split->set_count == split->set_room) {
            if (split->set_room > UINT32_MAX / 2)
                return -ENOMEM;
            struct set *sets = realloc(split->sets, 2 * split->set_room * sizeof *sets);
            if (sets == NULL)
                return -ENOMEM;
            split->sets = sets;
            split->set_room *= 2;
        }
        struct set *parent = &split->sets[of];
        parent->child = (uint32_t)split->set_count;
        parent->child_owner = owner;
        split->sets[split->set_count++] =
            (struct set){.parent = of, .owner = owner, .size = parent->size + 1, .child_owner = UINT32_MAX};
    }
    *found = split->sets[of].child;
    return 0;
}

/* `owner` holds the frame of a present entry of pagemap. */
static int add_entry(struct dax_split *split, uint64_t entry, uint32_t owner,
                     const struct dax_source *source) {
    uint64_t frame = entry & PM_FRAME;
    if (frame == 0)
        return -EPERM;
    int error = find_block(split, frame / BLOCK_FRAMES, source);
    if (!error && !(entry & (PM_FILE | PM_EXCLUSIVE)) && !split->last->flags_known)
        error = read_flags(split->last, source);
    if (error)
        return error;
    uint32_t at = (uint32_t)(frame % BLOCK_FRAMES);
    uint32_t *set = &split->last->set[at];
    if (split->last->ownerless[at / 64] >> at % 64 & 1 || split->sets[*set].owner == owner)
        return 0;
    uint32_t next;
    error = set_with(split, *set, owner, &next);
    if (error)
        return error;
    if (*set == NO_SET)
        split->distinct++;
    else
        split->sets[*set].frames--;
    split->sets[next].frames++;
    *set = next;
    return 0;
}

/* One range. 1 when its process is gone. */
static int walk_range(struct dax_split *split, const struct dax_range *range, int handle, uint64_t *entries,
                      const struct dax_source *source) {
    for (uint64_t page = range->start_page; page < range->end_page;) {
        uint64_t left = range->end_page - page;
        ssize_t got = source->entries(source->context, handle, page, entries,
                                      left < WALK_ENTRIES ? (size_t)left : WALK_ENTRIES);
        if (got == -ESRCH)
            return 1;
        if (got < 0)
            return (int)got;
        if (got < 8) /* over the end of user memory, or the memory is gone */
            return 0;
        for (size_t i = 0; i < (size_t)got / 8; i++) {
            if (!(entries[i] & PM_PRESENT)) /* never touched, or swapped out */
                continue;
            int error = add_entry(split, entries[i], range->owner, source);
            if (error)
                return error;
        }
        page += (uint64_t)got / 8;
    }
    return 0;
}

static int by_owner(const void *left, const void *right) {
    const struct dax_range *a = left, *b = right;
    if (a->owner != b->owner)
        return a->owner > b->owner ? 1 : -1;
    if (a->pid != b->pid)
        return a->pid > b->pid ? 1 : -1;
    return (a->start_page > b->start_page) - (a->start_page < b->start_page);
}

int dax_split_walk(struct dax_split *split, struct dax_range *ranges, size_t count,
                   const struct dax_source *source, pid_t *culprit) {
    uint64_t *entries = malloc(WALK_ENTRIES * sizeof *entries);
    int error = entries == NULL ? -ENOMEM : 0;
    qsort(ranges, count, sizeof *ranges, by_owner);
    *culprit = 0;
    for (size_t i = 0; i < count && error == 0;) {
        const struct dax_range *first = &ranges[i];
        int handle = source->open(source->context, first->pid);
        bool gone = handle == -ENOENT || handle == -ESRCH;
        *culprit = first->pid;
        error = handle < 0 && !gone ? handle : 0;
        for (; i < count && ranges[i].owner == first->owner && ranges[i].pid == first->pid; i++) {
            int result = gone || error ? 0 : walk_range(split, &ranges[i], handle, entries, source);
            gone = gone || result == 1;
            error = result < 0 ? result : error;
        }
        if (handle >= 0)
            source->close(source->context, handle);
    }
    free(entries);
    return error;
}

uint64_t dax_split_distinct(const struct dax_split *split) {
    return split->distinct;
}

void dax_split_counts(const struct dax_split *split, uint64_t *counts) {
    size_t width = (size_t)split->owners + 1;
    for (size_t i = 1; i < split->set_count; i++) {
        const struct set *set = &split->sets[i];
        if (set->frames == 0)
            continue;
        for (size_t up = i; up != NO_SET; up = split->sets[up].parent)
            counts[split->sets[up].owner * width + set->size] += set->frames;
    }
}
