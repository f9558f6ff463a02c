/* dax_split.c over page tables that are made up, and dax_smaps.c over text, good and bad. */
#include "dax.h"

#include <errno.h>
#include <string.h>

#include "check.h"

#define PRESENT (1ull << 63)
#define SWAPPED (1ull << 62)
#define FILE_PAGE (1ull << 61)
#define ONCE (1ull << 56)
#define ZERO_PAGE (1ull << 24)
#define RESERVED (1ull << 32)

/* A machine of 8 processes of 64 pages and 4096 frames. */
#define PROCESSES 8
#define PAGES 64
#define FRAMES 4096

static struct {
    uint64_t entries[PROCESSES][PAGES];
    uint64_t flags[FRAMES];
    int open_error[PROCESSES];  /* -errno of open */
    int entry_error[PROCESSES]; /* -errno of a read from page 32 on */
    int opened, closed, most_a_read;
} machine;

static int machine_open(void *context, pid_t pid) {
    (void)context;
    if (machine.open_error[pid])
        return machine.open_error[pid];
    machine.opened++;
    return pid;
}

static void machine_close(void *context, int handle) {
    (void)context;
    (void)handle;
    machine.closed++;
}

static ssize_t machine_entries(void *context, int handle, uint64_t page, uint64_t *into, size_t count) {
    (void)context;
    if (page >= PAGES)
        return 0;
    if (machine.entry_error[handle] && page >= 32)
        return machine.entry_error[handle];
    size_t got = count < PAGES - page ? count : PAGES - page;
    if (machine.most_a_read && got > (size_t)machine.most_a_read)
        got = (size_t)machine.most_a_read;
    memcpy(into, &machine.entries[handle][page], got * 8);
    return (ssize_t)got * 8;
}

static ssize_t machine_flags(void *context, uint64_t frame, uint64_t *into, size_t count) {
    (void)context;
    if (frame >= FRAMES)
        return 0;
    size_t got = count < FRAMES - frame ? count : FRAMES - frame;
    memcpy(into, &machine.flags[frame], got * 8);
    return (ssize_t)got * 8;
}

static const struct dax_source source = {NULL, machine_open, machine_close, machine_entries, machine_flags};

/* The counts of a walk, [owner][holders]; what the walk returned. */
static int split(uint32_t owners, struct dax_range *ranges, size_t count, uint64_t *counts,
                 uint64_t *distinct) {
    struct dax_split *made = dax_split_new(owners);
    pid_t culprit;
    CHECK(made != NULL);
    int error = dax_split_walk(made, ranges, count, &source, &culprit);
    memset(counts, 0, owners * (owners + 1) * sizeof *counts);
    dax_split_counts(made, counts);
    *distinct = dax_split_distinct(made);
    dax_split_free(made);
    CHECK_EQUAL(machine.opened, machine.closed);
    return error;
}

static void test_shared_twice_and_not_at_all(void) {
    memset(&machine, 0, sizeof machine);
    for (int page = 0; page < 8; page++) {
        machine.entries[1][page] = PRESENT | FILE_PAGE | (100 + page); /* with 2 and 3 */
        machine.entries[2][page] = PRESENT | FILE_PAGE | (100 + page);
        machine.entries[3][page + 20] = PRESENT | FILE_PAGE | (100 + page);
        machine.entries[1][page + 8] = PRESENT | FILE_PAGE | (100 + page); /* again: counts once */
        machine.entries[1][page + 16] = PRESENT | ONCE | (600 + page);     /* alone */
        machine.entries[2][page + 16] = SWAPPED | (700 + page);            /* not resident */
    }
    struct dax_range ranges[] = {{1, 2, 0, 64}, {0, 1, 0, 20}, {2, 3, 0, 64}, {0, 1, 10, 64}};
    uint64_t counts[3 * 4], distinct;
    CHECK_EQUAL(split(3, ranges, 4, counts, &distinct), 0);
    CHECK_EQUAL(distinct, 16);
    CHECK_EQUAL(counts[0 * 4 + 1], 8);
    CHECK_EQUAL(counts[0 * 4 + 3], 8);
    CHECK_EQUAL(counts[1 * 4 + 1], 0);
    CHECK_EQUAL(counts[1 * 4 + 3], 8);
    CHECK_EQUAL(counts[2 * 4 + 3], 8);
}

static void test_frames_of_no_one(void) {
    memset(&machine, 0, sizeof machine);
    machine.flags[7] = ZERO_PAGE;
    for (int i = 1024; i < 1536; i++)
        machine.flags[i] = ZERO_PAGE; /* the huge zero page, which pagemap takes for a file's */
    machine.flags[9] = RESERVED;
    machine.entries[1][0] = PRESENT | 7;
    machine.entries[1][1] = PRESENT | 9;
    machine.entries[1][2] = PRESENT | FILE_PAGE | 1030;
    machine.entries[1][3] = PRESENT | (FRAMES + 512 * 40); /* a device, over the end of memory */
    machine.entries[1][4] = PRESENT | ONCE | 8;
    machine.entries[1][5] = PRESENT | 10; /* anonymous, shared after a fork */
    struct dax_range range = {0, 1, 0, 64};
    uint64_t counts[2], distinct;
    CHECK_EQUAL(split(1, &range, 1, counts, &distinct), 0);
    CHECK_EQUAL(distinct, 2);
    CHECK_EQUAL(counts[1], 2);
}

static void test_processes_that_go(void) {
    memset(&machine, 0, sizeof machine);
    for (int pid = 1; pid <= 4; pid++)
        for (int page = 0; page < PAGES; page++)
            machine.entries[pid][page] = PRESENT | ONCE | (uint64_t)(pid * 512 + page);
    machine.open_error[1] = -ENOENT;
    machine.entry_error[2] = -ESRCH;
    machine.most_a_read = 16;
    struct dax_range ranges[] = {
        {0, 1, 0, 64}, {1, 2, 0, 64}, {1, 2, 0, 10}, {2, 3, 0, 64}, {2, 3, 1000, 2000}};
    uint64_t counts[3 * 4], distinct;
    CHECK_EQUAL(split(3, ranges, 5, counts, &distinct), 0);
    CHECK_EQUAL(counts[0 * 4 + 1], 0);
    CHECK_EQUAL(counts[1 * 4 + 1], 32);
    CHECK_EQUAL(counts[2 * 4 + 1], 64);
    CHECK_EQUAL(distinct, 96);
}

static void test_what_the_kernel_refuses(void) {
    memset(&machine, 0, sizeof machine);
    struct dax_range range = {0, 1, 0, 64};
    uint64_t counts[2], distinct;
    machine.entries[1][3] = PRESENT; /* frames hidden: no CAP_SYS_ADMIN */
    CHECK_EQUAL(split(1, &range, 1, counts, &distinct), -EPERM);
    machine.entries[1][3] = 0;
    machine.entry_error[1] = -EIO;
    machine.most_a_read = 16;
    CHECK_EQUAL(split(1, &range, 1, counts, &distinct), -EIO);
    machine.open_error[1] = -EACCES;
    CHECK_EQUAL(split(1, &range, 1, counts, &distinct), -EACCES);
}

/* Random page tables against a model: for each frame, the set of owners as bits. */
static void fuzz_split(uint64_t rounds) {
    uint64_t seed = 11;
    for (uint64_t round = 0; round < rounds; round++) {
        memset(&machine, 0, sizeof machine);
        static uint64_t holders[FRAMES];
        memset(holders, 0, sizeof holders);
        struct dax_range ranges[12];
        size_t count = 1 + (size_t)random_below(&seed, 12);
        uint64_t spread = 1 + random_below(&seed, FRAMES - 1);
        for (int pid = 1; pid < PROCESSES; pid++)
            for (int page = 0; page < PAGES; page++)
                if (random_below(&seed, 3))
                    machine.entries[pid][page] = PRESENT | FILE_PAGE | (1 + random_below(&seed, spread));
        for (size_t i = 0; i < count; i++) {
            uint64_t start = random_below(&seed, PAGES), end = start + random_below(&seed, PAGES - start + 1);
            ranges[i] = (struct dax_range){(uint32_t)random_below(&seed, 5),
                                           1 + (pid_t)random_below(&seed, PROCESSES - 1), start, end};
            for (uint64_t page = start; page < end; page++)
                if (machine.entries[ranges[i].pid][page])
                    holders[machine.entries[ranges[i].pid][page] & (FRAMES - 1)] |= 1ull << ranges[i].owner;
        }
        uint64_t counts[5 * 6], wanted[5 * 6] = {0}, distinct, wanted_distinct = 0;
        for (int frame = 0; frame < FRAMES; frame++) {
            wanted_distinct += holders[frame] != 0;
            for (int owner = 0; owner < 5; owner++)
                if (holders[frame] >> owner & 1)
                    wanted[owner * 6 + __builtin_popcountll(holders[frame])]++;
        }
        CHECK_EQUAL(split(5, ranges, count, counts, &distinct), 0);
        CHECK_EQUAL(distinct, wanted_distinct);
        CHECK(memcmp(counts, wanted, sizeof counts) == 0);
    }
}

static const char QEMU[] =
    "7f0e10000000-7f0e90000000 rw-s 00200000 00:01 2055                       /memfd:memory-backend-memfd "
    "(deleted)\n"
    "Size:            2097152 kB\n"
    "KernelPageSize:        4 kB\n"
    "Rss:              131072 kB\n"
    "Pss:              131072 kB\n"
    "Pss_Dirty:        131072 kB\n"
    "Shared_Clean:          0 kB\n"
    "Private_Dirty:    131072 kB\n"
    "ShmemPmdMapped:     2048 kB\n"
    "Swap:                  4 kB\n"
    "THPeligible:           0\n"
    "VmFlags: rd wr sh mr mw me ms sd \n"
    "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"
    "Rss:                   0 kB\n"
    "a0000-b0000 rw-p 00000000 00:00 0 \n"
    "Rss:                   8 kB\n"
    "SwapPss:               2 kB";

/* Parses a copy of exactly `length` bytes, so that ASan sees a read past its end. */
static int parse(const char *text, size_t length, struct dax_mapping **mappings, size_t *count, char **copy) {
    *copy = malloc(length ? length : 1);
    CHECK(*copy != NULL);
    memcpy(*copy, text, length);
    return dax_smaps_parse(*copy, length, mappings, count);
}

static void test_smaps(void) {
    struct dax_mapping *mappings;
    size_t count;
    char *copy;
    CHECK_EQUAL(parse(QEMU, sizeof QEMU - 1, &mappings, &count, &copy), 0);
    CHECK_EQUAL(count, 3);
    CHECK_EQUAL(mappings[0].start, 0x7f0e10000000);
    CHECK_EQUAL(mappings[0].end, 0x7f0e90000000);
    CHECK_EQUAL(mappings[0].offset, 0x200000);
    CHECK_EQUAL(mappings[0].minor, 1);
    CHECK_EQUAL(mappings[0].inode, 2055);
    CHECK(strcmp(mappings[0].perms, "rw-s") == 0);
    CHECK_EQUAL(mappings[0].path_length, strlen("/memfd:memory-backend-memfd (deleted)"));
    CHECK_EQUAL(mappings[0].kib[DAX_RSS], 131072);
    CHECK_EQUAL(mappings[0].kib[DAX_PRIVATE_DIRTY], 131072);
    CHECK_EQUAL(mappings[0].kib[DAX_SHMEM_HUGE], 2048);
    CHECK_EQUAL(mappings[0].kib[DAX_SWAP], 4);
    CHECK_EQUAL(mappings[1].start, 0xffffffffff600000);
    CHECK_EQUAL(mappings[2].path_length, 0);
    CHECK_EQUAL(mappings[2].kib[DAX_SWAP_PSS], 2);
    free(mappings);
    free(copy);

    CHECK_EQUAL(parse("", 0, &mappings, &count, &copy), 0);
    CHECK_EQUAL(count, 0);
    free(mappings);
    free(copy);
}

static void test_what_is_no_smaps(void) {
    const char *const bad[] = {
        "Rss: 4 kB\n",
        "\n",
        "7f00-7e00 r--p 0 00:00 0\n",
        "7f00-7f00 r--p 00000000 00:00 0\n",
        "7f00 r--p 00000000 00:00 0\n",
        "7f00-8000 r--p\n",
        "7f00-8000 r--p 00000000 0000 0\n",
        "7f00-8000 r--p 00000000 100000000:00 0\n",
        "11112222333344445-8000 r--p 00000000 00:00 0\n",
        "7f00-8000 r--p 00000000 00:00 0\nRss: many kB\n",
        "7f00-8000 r--p 00000000 00:00 0\nRss: 99999999999999999999 kB\n",
        "7f00-8000 r--p 00000000 00:00 0\nwords without end\n",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct dax_mapping *mappings;
        size_t count;
        char *copy;
        CHECK_EQUAL(parse(bad[i], strlen(bad[i]), &mappings, &count, &copy), -EBADMSG);
        CHECK(mappings == NULL && count == 0);
        free(copy);
    }
}

/* Whatever bytes: no read outside, no path outside. */
static void fuzz_smaps(uint64_t rounds) {
    uint64_t seed = 5;
    for (uint64_t round = 0; round < rounds; round++) {
        char text[sizeof QEMU];
        memcpy(text, QEMU, sizeof QEMU);
        size_t length = (size_t)random_below(&seed, sizeof QEMU);
        for (uint64_t changes = random_below(&seed, 4); changes > 0; changes--)
            text[random_below(&seed, sizeof QEMU)] = "\n -:0af\377Z"[random_below(&seed, 9)];
        struct dax_mapping *mappings;
        size_t count;
        char *copy;
        parse(text, length, &mappings, &count, &copy);
        for (size_t i = 0; i < count; i++)
            CHECK(mappings[i].path >= copy && mappings[i].path + mappings[i].path_length <= copy + length);
        free(mappings);
        free(copy);
    }
}

int main(void) {
    test_shared_twice_and_not_at_all();
    test_frames_of_no_one();
    test_processes_that_go();
    test_what_the_kernel_refuses();
    fuzz_split(2000);
    test_smaps();
    test_what_is_no_smaps();
    fuzz_smaps(20000);
    puts("ok");
    return 0;
}
