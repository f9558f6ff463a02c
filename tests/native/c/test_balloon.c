/* Cases of balloon.c that are worth a name. The fuzz driver beside it covers the space between them. */
#include "balloon.h"

#include <errno.h>
#include <linux/falloc.h>
#include <string.h>

#include "check.h"

#define MIB (1ull << 20)
#define GIB (1ull << 30)

static void put(unsigned char *at, uint64_t value) {
    for (int i = 0; i < 8; i++)
        at[i] = (unsigned char)(value >> 8 * i);
}

/* The plan of up to 16 (first, count) pairs. */
static struct balloon_plan plan_of(const struct balloon_map *map, size_t runs, const uint64_t (*pairs)[2],
                                   uint64_t unit) {
    unsigned char wire[16 * 16];
    struct balloon_plan plan;
    for (size_t i = 0; i < runs; i++) {
        put(wire + 16 * i, pairs[i][0]);
        put(wire + 16 * i + 8, pairs[i][1]);
    }
    CHECK_EQUAL(balloon_coalesce(map, wire, runs, 2, unit, &plan), 0);
    return plan;
}

static enum balloon_fault fault_of(const struct balloon_region *regions, size_t count, size_t *culprit) {
    struct balloon_map map = {0};
    enum balloon_fault fault = balloon_map_make(regions, count, &map, culprit);
    balloon_map_free(&map);
    return fault;
}

static void test_maps(void) {
    size_t at = 9;
    struct balloon_region good[] = {{4 * GIB, GIB, GIB, 0, 0}, {0, GIB, 0, 0, 0}, {GIB, MIB, 0, 1, 0}};
    CHECK_EQUAL(fault_of(good, 3, &at), BALLOON_SOUND);
    CHECK_EQUAL(fault_of(NULL, 0, &at), BALLOON_SOUND);

    struct balloon_region bad[3];
#define BROKEN(index, field, value, fault)                                                                   \
    memcpy(bad, good, sizeof bad);                                                                           \
    bad[index].field = (value);                                                                              \
    CHECK_EQUAL(fault_of(bad, 3, &at), fault);                                                               \
    CHECK_EQUAL(at, index)
    BROKEN(1, length, 0, BALLOON_NO_LENGTH);
    BROKEN(2, gpa, GIB + 1, BALLOON_UNALIGNED);
    BROKEN(2, length, MIB - 512, BALLOON_UNALIGNED);
    BROKEN(0, offset, 7, BALLOON_UNALIGNED);
    BROKEN(0, gpa, 0ull - GIB, BALLOON_WRAPS);
    BROKEN(0, offset, (uint64_t)INT64_MAX + 1 - GIB, BALLOON_WRAPS);
    BROKEN(0, offset, 0ull - 4096, BALLOON_WRAPS);
    BROKEN(2, gpa, GIB - 4096, BALLOON_OVERLAPS);
    BROKEN(0, offset, GIB - 4096, BALLOON_ALIASES);
}

static void test_a_run_over_two_regions(void) {
    /* One stretch of the guest in two files, then a hole, then more of the first file. */
    struct balloon_region regions[] = {
        {0, 4 * MIB, 0, 0, 0}, {4 * MIB, 4 * MIB, 2 * MIB, 1, 0}, {16 * MIB, 4 * MIB, 4 * MIB, 0, 0}};
    struct balloon_map map;
    size_t at;
    CHECK_EQUAL(balloon_map_make(regions, 3, &map, &at), BALLOON_SOUND);
    CHECK_EQUAL(map.bytes, 12 * MIB);
    CHECK(balloon_find(&map, 8 * MIB) == NULL);
    CHECK_EQUAL(balloon_find(&map, 8 * MIB - 1)->file, 1);

    struct balloon_plan plan = plan_of(&map, 1, (const uint64_t[][2]){{1, 2}}, 2 * MIB);
    CHECK_EQUAL(plan.count, 2);
    CHECK_EQUAL(plan.files, 2);
    CHECK_EQUAL(plan.extents[0].offset, 2 * MIB);
    CHECK_EQUAL(plan.extents[1].file, 1);
    CHECK_EQUAL(plan.extents[1].offset, 2 * MIB);
    CHECK_EQUAL(plan.bytes, 4 * MIB);
    balloon_plan_free(&plan);

    plan = plan_of(&map, 1, (const uint64_t[][2]){{3, 2}}, 2 * MIB); /* its second half is in the hole */
    CHECK_EQUAL(plan.count, 0);
    CHECK_EQUAL(plan.refused[BALLOON_OUTSIDE], 1);
    balloon_plan_free(&plan);

    /* The hole in the guest is none in the file: 0 to 4 MiB and 16 to 20 MiB are neighbours there, and one
     * extent. */
    plan = plan_of(&map, 2, (const uint64_t[][2]){{0, 2}, {8, 2}}, 2 * MIB);
    CHECK_EQUAL(plan.count, 1);
    CHECK_EQUAL(plan.extents[0].length, 8 * MIB);
    balloon_plan_free(&plan);
    balloon_map_free(&map);
}

static void test_hostile_runs(void) {
    struct balloon_region region = {4 * GIB, GIB, 0, 0, 0};
    struct balloon_map map;
    size_t at;
    CHECK_EQUAL(balloon_map_make(&region, 1, &map, &at), BALLOON_SOUND);
    const uint64_t first = 4 * GIB / 4096;
    struct balloon_plan plan = plan_of(&map, 10,
                                       (const uint64_t[][2]){
                                           {first + 8, 4},              /* good, out of order */
                                           {first, 4},                  /* good */
                                           {first, 0},                  /* empty */
                                           {UINT64_MAX, 1},             /* first * unit wraps */
                                           {first, UINT64_MAX},         /* count * unit wraps */
                                           {UINT64_MAX / 4096, 1},      /* the end wraps */
                                           {0, 1},                      /* below */
                                           {first - 1, 2},              /* half below */
                                           {first + GIB / 4096 - 1, 2}, /* half above */
                                           {first + 2, 4},              /* good: two of them again */
                                       },
                                       4096);
    CHECK_EQUAL(plan.count, 2);
    CHECK_EQUAL(plan.bytes, 10 * 4096);
    CHECK_EQUAL(plan.duplicate_bytes, 2 * 4096);
    CHECK_EQUAL(plan.extents[0].length, 6 * 4096);
    CHECK_EQUAL(plan.extents[1].offset, 8 * 4096);
    CHECK_EQUAL(plan.refused[BALLOON_EMPTY], 1);
    CHECK_EQUAL(plan.refused[BALLOON_WRAPPING], 3);
    CHECK_EQUAL(plan.refused[BALLOON_OUTSIDE], 3);
    CHECK_EQUAL(plan.first_refused, 2);
    balloon_plan_free(&plan);
    balloon_map_free(&map);
}

static void test_duplicates_saturate(void) {
    /* A map of all there is, named whole again and again: the sum does not fit, and stays at its top. */
    struct balloon_region region = {0, 1ull << 62, 0, 0, 0};
    struct balloon_map map;
    size_t at;
    uint64_t pairs[8][2];
    CHECK_EQUAL(balloon_map_make(&region, 1, &map, &at), BALLOON_SOUND);
    for (int i = 0; i < 8; i++) {
        pairs[i][0] = 0;
        pairs[i][1] = (1ull << 62) / 4096;
    }
    struct balloon_plan plan = plan_of(&map, 8, (const uint64_t(*)[2])pairs, 4096);
    CHECK_EQUAL(plan.duplicate_bytes, UINT64_MAX);
    CHECK_EQUAL(plan.bytes, 1ull << 62);
    balloon_plan_free(&plan);
    balloon_map_free(&map);
}

static struct {
    int calls, fail_at, error, interrupt_every, mode;
    uint64_t bytes;
} fake;

static int fake_fallocate(int fd, int mode, int64_t offset, int64_t length) {
    (void)offset;
    fake.calls++;
    fake.mode = mode;
    if (fake.interrupt_every && fake.calls % fake.interrupt_every == 0) {
        errno = EINTR;
        return -1;
    }
    if (fake.calls == fake.fail_at) {
        errno = fake.error;
        return -1;
    }
    CHECK(fd == 70 || fd == 71);
    fake.bytes += (uint64_t)length;
    return 0;
}

static void test_progress_is_exact(void) {
    struct balloon_extent extents[] = {{0, 10 * 4096, 0}, {8 * MIB, 3 * 4096, 1}};
    struct balloon_plan plan = {.extents = extents, .count = 2, .files = 2, .bytes = 13 * 4096};
    const int fds[] = {70, 71};
    struct balloon_progress progress;

    memset(&fake, 0, sizeof fake);
    balloon_apply(&plan, fds, BALLOON_PUNCH, 4 * 4096, fake_fallocate, &progress);
    CHECK_EQUAL(fake.mode, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
    CHECK_EQUAL(progress.error, 0);
    CHECK_EQUAL(progress.calls, 4); /* 4 + 4 + 2, 3 */
    CHECK_EQUAL(progress.bytes, fake.bytes);
    CHECK_EQUAL(progress.bytes, 13 * 4096);

    memset(&fake, 0, sizeof fake);
    fake.interrupt_every = 2;
    balloon_apply(&plan, fds, BALLOON_POPULATE, 4 * 4096, fake_fallocate, &progress);
    CHECK_EQUAL(fake.mode, FALLOC_FL_KEEP_SIZE);
    CHECK_EQUAL(progress.bytes, 13 * 4096);

    memset(&fake, 0, sizeof fake);
    fake.fail_at = 3;
    fake.error = ENOSPC;
    balloon_apply(&plan, fds, BALLOON_POPULATE, 4 * 4096, fake_fallocate, &progress);
    CHECK_EQUAL(fake.calls, 3);
    CHECK_EQUAL(progress.error, ENOSPC);
    CHECK_EQUAL(progress.bytes, 8 * 4096);
    CHECK_EQUAL(progress.calls, 2);
    CHECK_EQUAL(progress.file, 0);
    CHECK_EQUAL(progress.offset, 8 * 4096);
    CHECK_EQUAL(progress.length, 2 * 4096);

    memset(&fake, 0, sizeof fake);
    fake.fail_at = 4;
    fake.error = EPERM;
    balloon_apply(&plan, fds, BALLOON_PUNCH, 4 * 4096, fake_fallocate, &progress);
    CHECK_EQUAL(progress.file, 1);
    CHECK_EQUAL(progress.offset, 8 * MIB);
    CHECK_EQUAL(progress.bytes, 10 * 4096);
}

int main(void) {
    test_maps();
    test_a_run_over_two_regions();
    test_hostile_runs();
    test_duplicates_saturate();
    test_progress_is_exact();
    puts("ok");
    return 0;
}
