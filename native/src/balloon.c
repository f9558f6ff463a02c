#include "balloon.h"

#include <errno.h>
#include <linux/falloc.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define FILE_MOST ((uint64_t)INT64_MAX)

/* Guest-physical bytes [start, end). */
struct span {
    uint64_t start;
    uint64_t end;
};

static int by_gpa(const void *left, const void *right) {
    const struct balloon_region *a = left, *b = right;
    return (a->gpa > b->gpa) - (a->gpa < b->gpa);
}

static int by_file(const void *left, const void *right) {
    const struct balloon_region *a = left, *b = right;
    if (a->file != b->file)
        return a->file > b->file ? 1 : -1;
    return (a->offset > b->offset) - (a->offset < b->offset);
}

static int by_start(const void *left, const void *right) {
    const struct span *a = left, *b = right;
    return (a->start > b->start) - (a->start < b->start);
}

/* What is wrong with one region by itself. */
static enum balloon_fault fault_of(const struct balloon_region *region) {
    uint64_t end;
    if (region->length == 0)
        return BALLOON_NO_LENGTH;
    if ((region->gpa | region->length | region->offset) % BALLOON_PAGE)
        return BALLOON_UNALIGNED;
    if (__builtin_add_overflow(region->gpa, region->length, &end))
        return BALLOON_WRAPS;
    if (__builtin_add_overflow(region->offset, region->length, &end) || end > FILE_MOST)
        return BALLOON_WRAPS;
    return BALLOON_SOUND;
}

/* What is wrong between regions. While it runs, `reach` of each is its index in the caller's order. */
static enum balloon_fault fault_between(struct balloon_region *regions, size_t count, size_t *culprit) {
    qsort(regions, count, sizeof *regions, by_file);
    for (size_t i = 1; i < count; i++)
        if (regions[i - 1].file == regions[i].file &&
            regions[i - 1].offset + regions[i - 1].length > regions[i].offset) {
            *culprit = regions[i].reach;
            return BALLOON_ALIASES;
        }
    qsort(regions, count, sizeof *regions, by_gpa);
    for (size_t i = 1; i < count; i++)
        if (regions[i - 1].gpa + regions[i - 1].length > regions[i].gpa) {
            *culprit = regions[i].reach;
            return BALLOON_OVERLAPS;
        }
    return BALLOON_SOUND;
}

enum balloon_fault balloon_map_make(const struct balloon_region *regions, size_t count,
                                    struct balloon_map *map, size_t *culprit) {
    for (size_t i = 0; i < count; i++) {
        enum balloon_fault fault = fault_of(&regions[i]);
        if (fault != BALLOON_SOUND) {
            *culprit = i;
            return fault;
        }
    }
    struct balloon_region *own = calloc(count ? count : 1, sizeof *own);
    *culprit = 0;
    if (own == NULL)
        return BALLOON_NO_MEMORY;
    uint64_t bytes = 0;
    for (size_t i = 0; i < count; i++) {
        own[i] = regions[i];
        own[i].reach = i;
        bytes += regions[i].length; /* disjoint parts of 2^64 when sound; unused when not */
    }
    enum balloon_fault fault = fault_between(own, count, culprit);
    if (fault != BALLOON_SOUND) {
        free(own);
        return fault;
    }
    for (size_t i = count; i-- > 0;) {
        own[i].reach = own[i].gpa + own[i].length;
        if (i + 1 < count && own[i + 1].gpa == own[i].reach)
            own[i].reach = own[i + 1].reach;
    }
    *map = (struct balloon_map){own, count, bytes};
    return BALLOON_SOUND;
}

void balloon_map_free(struct balloon_map *map) {
    free(map->regions);
    *map = (struct balloon_map){0};
}

const struct balloon_region *balloon_find(const struct balloon_map *map, uint64_t gpa) {
    size_t low = 0, high = map->count; /* the first region that starts above gpa lies in [low, high] */
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (map->regions[middle].gpa <= gpa)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0)
        return NULL;
    const struct balloon_region *region = &map->regions[low - 1];
    return gpa - region->gpa < region->length ? region : NULL;
}

static uint64_t little_endian(const unsigned char *at) {
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--) /* compilers make one load of this */
        value = value << 8 | at[i];
    return value;
}

/* Reads one run into *span. BALLOON_REFUSALS when it is good, else why not. */
static enum balloon_refusal read_run(const struct balloon_map *map, const unsigned char *at, size_t words,
                                     uint64_t unit, struct span *span) {
    uint64_t count = words == 2 ? little_endian(at + 8) : 1, length;
    if (count == 0)
        return BALLOON_EMPTY;
    if (__builtin_mul_overflow(little_endian(at), unit, &span->start) ||
        __builtin_mul_overflow(count, unit, &length) ||
        __builtin_add_overflow(span->start, length, &span->end))
        return BALLOON_WRAPPING;
    const struct balloon_region *region = balloon_find(map, span->start);
    return region != NULL && span->end <= region->reach ? BALLOON_REFUSALS : BALLOON_OUTSIDE;
}

/* Reads the whole list, refusing what must be. Returns how many spans are good; *sorted: whether by start. */
static size_t read_runs(const struct balloon_map *map, const unsigned char *wire, size_t runs, size_t words,
                        uint64_t unit, struct span *spans, struct balloon_plan *plan, bool *sorted) {
    size_t good = 0;
    bool refused_any = false;
    *sorted = true;
    for (size_t i = 0; i < runs; i++) {
        enum balloon_refusal refusal = read_run(map, wire + i * words * 8, words, unit, &spans[good]);
        if (refusal != BALLOON_REFUSALS) {
            plan->refused[refusal]++;
            if (!refused_any)
                plan->first_refused = i;
            refused_any = true;
            continue;
        }
        if (good > 0 && spans[good].start < spans[good - 1].start)
            *sorted = false;
        good++;
    }
    return good;
}

/* Joins sorted spans that overlap or touch, in place. Returns how many are left. */
static size_t merge(struct span *spans, size_t count, uint64_t *duplicate_bytes) {
    size_t last = 0;
    for (size_t i = 1; i < count; i++) {
        if (spans[i].start > spans[last].end) {
            spans[++last] = spans[i];
            continue;
        }
        uint64_t upto = spans[i].end < spans[last].end ? spans[i].end : spans[last].end;
        if (__builtin_add_overflow(*duplicate_bytes, upto - spans[i].start, duplicate_bytes))
            *duplicate_bytes = UINT64_MAX;
        if (spans[i].end > spans[last].end)
            spans[last].end = spans[i].end;
    }
    return count ? last + 1 : 0;
}

static void add_extent(struct balloon_plan *plan, uint32_t file, uint64_t offset, uint64_t length) {
    struct balloon_extent *last = plan->count ? &plan->extents[plan->count - 1] : NULL;
    plan->bytes += length;
    if (last != NULL && last->file == file && last->offset + last->length == offset) {
        last->length += length;
        return;
    }
    plan->extents[plan->count++] = (struct balloon_extent){offset, length, file};
    if (file >= plan->files)
        plan->files = file + 1;
}

/* Cuts one good span at the borders of its regions. */
static void place(const struct balloon_map *map, struct span span, struct balloon_plan *plan) {
    for (const struct balloon_region *region = balloon_find(map, span.start); span.start < span.end;
         region++) {
        uint64_t into = span.start - region->gpa, left = region->length - into;
        uint64_t length = span.end - span.start < left ? span.end - span.start : left;
        add_extent(plan, region->file, region->offset + into, length);
        span.start += length;
    }
}

int balloon_coalesce(const struct balloon_map *map, const unsigned char *wire, size_t runs, size_t words,
                     uint64_t unit, struct balloon_plan *plan) {
    struct balloon_plan made = {0};
    struct span *spans = calloc(runs + 1, sizeof *spans);
    bool sorted;
    if (spans == NULL)
        return -ENOMEM;
    size_t count = read_runs(map, wire, runs, words, unit, spans, &made, &sorted);
    if (!sorted)
        qsort(spans, count, sizeof *spans, by_start);
    count = merge(spans, count, &made.duplicate_bytes);
    /* Each border between regions cuts at most one span in two. */
    made.extents = calloc(count + map->count + 1, sizeof *made.extents);
    if (made.extents == NULL) {
        free(spans);
        return -ENOMEM;
    }
    for (size_t i = 0; i < count; i++)
        place(map, spans[i], &made);
    free(spans);
    *plan = made;
    return 0;
}

void balloon_plan_free(struct balloon_plan *plan) {
    free(plan->extents);
    *plan = (struct balloon_plan){0};
}

/* One extent, piece by piece. False when a call failed. */
static bool apply_extent(const struct balloon_extent *extent, int fd, int mode, uint64_t piece,
                         balloon_fallocate call, struct balloon_progress *progress) {
    for (uint64_t done = 0; done < extent->length;) {
        uint64_t left = extent->length - done, length = left < piece ? left : piece;
        if (call(fd, mode, (int64_t)(extent->offset + done), (int64_t)length) != 0) {
            if (errno == EINTR)
                continue;
            progress->error = errno;
            progress->file = extent->file;
            progress->offset = extent->offset + done;
            progress->length = length;
            return false;
        }
        done += length;
        progress->bytes += length;
        progress->calls++;
    }
    return true;
}

void balloon_apply(const struct balloon_plan *plan, const int *fds, enum balloon_action action,
                   uint64_t piece, balloon_fallocate call, struct balloon_progress *progress) {
    int mode = FALLOC_FL_KEEP_SIZE | (action == BALLOON_PUNCH ? FALLOC_FL_PUNCH_HOLE : 0);
    memset(progress, 0, sizeof *progress);
    for (size_t i = 0; i < plan->count; i++)
        if (!apply_extent(&plan->extents[i], fds[plan->extents[i].file], mode, piece, call, progress))
            return;
}
