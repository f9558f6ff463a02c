/* A deterministic fuzz of balloon.c against a model so simple that it is right: one byte for each guest page.
 *
 *     fuzz_balloon ROUNDS SEED
 *
 * Each round draws a map over 96 guest pages (regions that touch or leave holes, in several files, in any
 * order) and a list of runs, most of them near the edges or plain hostile, and compares plan and progress
 * with the model. */
#include "balloon.h"

#include <errno.h>
#include <string.h>

#include "check.h"

#define PAGES 96u
#define FILES 3u
#define FILE_PAGES 256u
#define RUNS_MOST 40u
#define BASE 0x100000ull /* the first guest page: 4 GiB */

struct model {
    int file[PAGES]; /* -1: no region */
    uint64_t page_in_file[PAGES];
    unsigned named[PAGES]; /* by accepted runs */
    uint64_t refused[BALLOON_REFUSALS];
    long first_refused;
};

static unsigned char punched[FILES][FILE_PAGES];
static unsigned calls_left;

static int record(int fd, int mode, int64_t offset, int64_t length) {
    (void)mode;
    if (calls_left-- == 0) {
        errno = EIO;
        return -1;
    }
    for (int64_t page = offset / 4096; page < (offset + length) / 4096; page++) {
        CHECK(!punched[fd][page]); /* never twice */
        punched[fd][page] = 1;
    }
    return 0;
}

/* Regions at random; the model's table of owners. */
static size_t draw_map(uint64_t *seed, struct balloon_region *regions, struct model *model) {
    size_t count = 0;
    uint64_t next_in[FILES] = {0};
    for (unsigned page = 0; page < PAGES; page++)
        model->file[page] = -1;
    for (unsigned page = 0; page < PAGES;) {
        unsigned length = 1 + (unsigned)random_below(seed, 24), file = (unsigned)random_below(seed, FILES);
        if (length > PAGES - page)
            length = PAGES - page;
        if (random_below(seed, 4)) { /* else a hole */
            next_in[file] += random_below(seed, 2);
            for (unsigned i = 0; i < length; i++) {
                model->file[page + i] = (int)file;
                model->page_in_file[page + i] = next_in[file] + i;
            }
            regions[count++] = (struct balloon_region){.gpa = (BASE + page) * 4096,
                                                       .length = length * 4096ull,
                                                       .offset = next_in[file] * 4096,
                                                       .file = file};
            next_in[file] += length;
        }
        page += length;
    }
    for (size_t i = count; i > 1; i--) { /* any order */
        size_t other = (size_t)random_below(seed, i);
        struct balloon_region kept = regions[i - 1];
        regions[i - 1] = regions[other];
        regions[other] = kept;
    }
    return count;
}

static uint64_t draw_number(uint64_t *seed, uint64_t near) {
    switch (random_below(seed, 8)) {
    case 0:
        return random_next(seed);
    case 1:
        return UINT64_MAX - random_below(seed, 3);
    case 2:
        return (1ull << random_below(seed, 64)) - random_below(seed, 2);
    default:
        return near + random_below(seed, PAGES + 8);
    }
}

/* What must come of one run, in the model. */
static void expect(struct model *model, uint64_t first, uint64_t count, uint64_t unit_pages, long index) {
    unsigned __int128 start = (unsigned __int128)first * unit_pages,
                      length = (unsigned __int128)count * unit_pages;
    enum balloon_refusal refusal = BALLOON_REFUSALS;
    if (count == 0)
        refusal = BALLOON_EMPTY;
    else if ((start + length) * 4096 > UINT64_MAX)
        refusal = BALLOON_WRAPPING;
    else if (start < BASE || start + length > BASE + PAGES)
        refusal = BALLOON_OUTSIDE;
    for (uint64_t i = 0; refusal == BALLOON_REFUSALS && i < (uint64_t)length; i++)
        if (model->file[(uint64_t)start - BASE + i] < 0)
            refusal = BALLOON_OUTSIDE;
    if (refusal != BALLOON_REFUSALS) {
        model->refused[refusal]++;
        if (model->first_refused < 0)
            model->first_refused = index;
        return;
    }
    for (uint64_t i = 0; i < (uint64_t)length; i++)
        model->named[(uint64_t)start - BASE + i]++;
}

static void check_plan(const struct balloon_plan *plan, const struct model *model) {
    uint64_t bytes = 0, duplicates = 0;
    static unsigned char covered[FILES][FILE_PAGES];
    memset(covered, 0, sizeof covered);
    for (size_t i = 0; i < plan->count; i++) {
        const struct balloon_extent *extent = &plan->extents[i], *before = extent - 1;
        CHECK(extent->file < plan->files && plan->files <= FILES);
        CHECK(extent->length > 0);
        if (i > 0) /* none that could be one with the next */
            CHECK(before->file != extent->file || before->offset + before->length != extent->offset);
        for (uint64_t page = extent->offset / 4096; page < (extent->offset + extent->length) / 4096; page++) {
            CHECK(page < FILE_PAGES && !covered[extent->file][page]);
            covered[extent->file][page] = 1;
        }
    }
    for (unsigned page = 0; page < PAGES; page++) {
        if (model->named[page] == 0)
            continue;
        unsigned char *there = &covered[model->file[page]][model->page_in_file[page]];
        CHECK(*there);
        *there = 0;
        bytes += 4096;
        duplicates += 4096ull * (model->named[page] - 1);
    }
    for (unsigned file = 0; file < FILES; file++)
        for (unsigned page = 0; page < FILE_PAGES; page++)
            CHECK(!covered[file][page]); /* nothing that was not asked for */
    CHECK_EQUAL(plan->bytes, bytes);
    CHECK_EQUAL(plan->duplicate_bytes, duplicates);
    for (int i = 0; i < BALLOON_REFUSALS; i++)
        CHECK_EQUAL(plan->refused[i], model->refused[i]);
    if (model->first_refused >= 0)
        CHECK_EQUAL(plan->first_refused, model->first_refused);
}

/* Carries the plan out until some call fails: what is recorded is what progress says, and in the plan's
 * order. */
static void check_progress(const struct balloon_plan *plan, uint64_t *seed) {
    const int fds[FILES] = {0, 1, 2};
    struct balloon_progress progress;
    memset(punched, 0, sizeof punched);
    calls_left = (unsigned)random_below(seed, 40);
    unsigned allowed = calls_left;
    balloon_apply(plan, fds, BALLOON_PUNCH, 4096 * (1 + random_below(seed, 8)), record, &progress);
    uint64_t recorded = 0;
    for (unsigned file = 0; file < FILES; file++)
        for (unsigned page = 0; page < FILE_PAGES; page++)
            recorded += punched[file][page] * 4096ull;
    CHECK_EQUAL(recorded, progress.bytes);
    if (progress.error == 0) {
        CHECK_EQUAL(progress.bytes, plan->bytes);
        return;
    }
    CHECK_EQUAL(progress.error, EIO);
    CHECK_EQUAL(progress.calls, allowed);
    uint64_t before = 0;
    for (size_t i = 0; before < progress.bytes || i == 0; i++) {
        const struct balloon_extent *extent = &plan->extents[i];
        if (before + extent->length > progress.bytes) {
            CHECK_EQUAL(extent->file, progress.file);
            CHECK_EQUAL(extent->offset + (progress.bytes - before), progress.offset);
        }
        before += extent->length;
    }
}

static void round_of(uint64_t *seed) {
    struct balloon_region regions[PAGES];
    struct model model = {.first_refused = -1};
    struct balloon_map map;
    struct balloon_plan plan;
    size_t culprit, count = draw_map(seed, regions, &model), runs = (size_t)random_below(seed, RUNS_MOST);
    uint64_t unit_pages = 1ull << random_below(seed, 3), words = 1 + random_below(seed, 2);
    unsigned char *wire =
        malloc(runs ? runs * words * 8 : 1); /* exact, so that a read past its end is seen */
    CHECK(wire != NULL);
    CHECK_EQUAL(balloon_map_make(regions, count, &map, &culprit), BALLOON_SOUND);
    for (size_t i = 0; i < runs; i++) {
        uint64_t run[2] = {draw_number(seed, BASE / unit_pages - 2), 1};
        if (words == 2)
            run[1] = random_below(seed, 6) ? random_below(seed, 12) : draw_number(seed, 0);
        expect(&model, run[0], run[1], unit_pages, (long)i);
        for (unsigned byte = 0; byte < words * 8; byte++)
            wire[i * words * 8 + byte] = (unsigned char)(run[byte / 8] >> 8 * (byte % 8));
    }
    CHECK_EQUAL(balloon_coalesce(&map, wire, runs, words, unit_pages * 4096, &plan), 0);
    check_plan(&plan, &model);
    check_progress(&plan, seed);
    balloon_plan_free(&plan);
    balloon_map_free(&map);
    free(wire);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    uint64_t rounds = strtoull(argv[1], NULL, 10), seed = strtoull(argv[2], NULL, 10) | 1;
    for (uint64_t i = 0; i < rounds; i++)
        round_of(&seed);
    puts("ok");
    return 0;
}
