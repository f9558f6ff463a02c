/* The pure half of `sysview`, under ASan and UBSan.
 *
 *     sysview-core WHAT TOTAL_KIB RESERVED_KIB HELD_KIB GRANTED ONLINE [MASK] < the kernel's text
 *
 * prints what a sandbox sees (WHAT: meminfo, cpuinfo, stat, online, affinity);
 *
 *     sysview-core fuzz SEED ROUNDS
 *
 * gives it bytes made, mutated and cut by a fixed generator, and prints "ok".
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sysview.h"

enum { ROOM = 1 << 20, FUZZ_BYTES = 700 };

static uint64_t state;

static uint32_t rnd(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

/* Into memory of exactly the size, so that a byte too many is seen. */
static struct text exact(size_t size) {
    struct text text;
    text_init(&text, malloc(size), size);
    return text;
}

static void show(const char *what, const struct view *view, const char *kernel, size_t size) {
    struct text out = exact(size + VIEW_CPUS * 4 + VIEW_GROWS);
    if (strcmp(what, "meminfo") == 0) {
        view_meminfo(view, kernel, size, &out);
    } else if (strcmp(what, "cpuinfo") == 0) {
        view_cpuinfo(view, kernel, size, &out);
    } else if (strcmp(what, "stat") == 0) {
        view_stat(view, kernel, size, &out);
    } else {
        view_online(view, &out);
    }
    if (out.cut) {
        fprintf(stderr, "%s: it was cut\n", what);
        abort();
    }
    fwrite(out.data, 1, out.length, stdout);
    free(out.data);
}

static void fuzz(uint64_t rounds) {
    static const char *const WHAT[] = {"meminfo", "cpuinfo", "stat", "online"};
    static const char *const WORDS[] = {
        "MemTotal:",  "\n",   "processor\t: ", "cpu",   "cpu ", "Hugetlb:", "12",
        "4294967296", "cpu3", "HugePages_",    "0-3,7", ",",    "-",        " kB\n"};
    for (uint64_t round = 0; round < rounds; round++) {
        size_t size = 0, wanted = rnd() % FUZZ_BYTES;
        char *kernel = malloc(wanted + 1), *cut;
        while (size < wanted) {
            const char *word = WORDS[rnd() % (sizeof(WORDS) / sizeof(WORDS[0]))];
            for (; *word != '\0' && size < wanted; word++) {
                kernel[size++] = rnd() % 40 == 0 ? (char)rnd() : *word;
            }
        }
        cut = malloc(size > 0 ? size : 1);
        memcpy(cut, kernel, size);
        struct machine machine = {rnd(), rnd() % 65536, rnd(), rnd() % 9, {{rnd(), rnd(), 0, rnd()}}};
        struct view view = view_of(&machine);
        struct cpu_set cpus;
        show(WHAT[rnd() % 4], &view, cut, size);
        cpus_parse(cut, size, &cpus);
        cpus = view_affinity(&view, &cpus);
        cpus_parse_mask(cut, size, &cpus);
        free(kernel);
        free(cut);
    }
}

int main(int argc, char **argv) {
    static char kernel[ROOM];
    struct machine machine = {0};
    struct cpu_set mask = {{0}};
    if (argc == 4 && strcmp(argv[1], "fuzz") == 0) {
        state = strtoull(argv[2], NULL, 10);
        if (freopen("/dev/null", "w", stdout) == NULL) {
            return 1;
        }
        fuzz(strtoull(argv[3], NULL, 10));
        fprintf(stderr, "ok\n");
        return 0;
    }
    if (argc < 7 || !cpus_parse(argv[6], strlen(argv[6]), &machine.online) ||
        (argc > 7 && !cpus_parse_mask(argv[7], strlen(argv[7]), &mask))) {
        return 2;
    }
    machine.total_kib = strtoull(argv[2], NULL, 10);
    machine.reserved_kib = strtoull(argv[3], NULL, 10);
    machine.held_kib = strtoull(argv[4], NULL, 10);
    machine.cpus_granted = strtoull(argv[5], NULL, 10);
    struct view view = view_of(&machine);
    if (strcmp(argv[1], "affinity") == 0) {
        view.cpus = view_affinity(&view, &mask);
    }
    show(argv[1], &view, kernel, fread(kernel, 1, sizeof(kernel), stdin));
    return 0;
}
