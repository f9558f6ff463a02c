#include "sysview.h"

#include <string.h>

static bool has(const struct cpu_set *cpus, uint64_t cpu) {
    return cpu < VIEW_CPUS && (cpus->word[cpu / 64] >> cpu % 64 & 1) != 0;
}

static void put(struct cpu_set *cpus, uint64_t cpu) {
    if (cpu < VIEW_CPUS) {
        cpus->word[cpu / 64] |= 1ull << cpu % 64;
    }
}

struct view view_of(const struct machine *machine) {
    struct view view = {0};
    uint64_t most = machine->cpus_granted ? machine->cpus_granted : VIEW_CPUS, count = 0;
    uint64_t all_kib = machine->total_kib + machine->reserved_kib;
    view.total_kib = all_kib > machine->held_kib ? all_kib - machine->held_kib : 0;
    for (uint64_t cpu = 0; cpu < VIEW_CPUS && count < most; cpu++) {
        if (has(&machine->online, cpu)) {
            put(&view.cpus, cpu);
            count++;
        }
    }
    if (count == 0) {
        put(&view.cpus, 0); /* whoever asks runs on one */
    }
    return view;
}

/* The line at `at`, its newline with it; 0 at the end. */
static size_t line_size(const char *text, size_t size, size_t at) {
    const char *end = at < size ? memchr(text + at, '\n', size - at) : NULL;
    return end ? (size_t)(end - (text + at)) + 1 : size - at;
}

static bool begins(const char *line, size_t size, const char *with) {
    return size >= strlen(with) && memcmp(line, with, strlen(with)) == 0;
}

/* As the kernel has it: "MemTotal:         500000 kB". */
static void add_total(struct text *out, uint64_t kib) {
    char buffer[24];
    struct text number;
    text_init(&number, buffer, sizeof(buffer));
    text_add_u64(&number, kib);
    text_add(out, "MemTotal:       ");
    for (size_t width = number.length; width < 8; width++) {
        text_add(out, " ");
    }
    text_add(out, number.data);
    text_add(out, " kB\n");
}

void view_meminfo(const struct view *view, const char *kernel, size_t size, struct text *out) {
    static const struct {
        const char *key, *line;
    } NONE[] = {{"HugePages_Total:", "HugePages_Total:       0\n"},
                {"HugePages_Free:", "HugePages_Free:        0\n"},
                {"HugePages_Rsvd:", "HugePages_Rsvd:        0\n"},
                {"HugePages_Surp:", "HugePages_Surp:        0\n"},
                {"Hugetlb:", "Hugetlb:               0 kB\n"}};
    for (size_t at = 0, length; at < size; at += length) {
        const char *line = kernel + at, *instead = NULL;
        length = line_size(kernel, size, at);
        for (unsigned i = 0; i < sizeof(NONE) / sizeof(NONE[0]); i++) {
            instead = begins(line, length, NONE[i].key) ? NONE[i].line : instead;
        }
        if (begins(line, length, "MemTotal:")) {
            add_total(out, view->total_kib);
        } else if (instead != NULL) {
            text_add(out, instead);
        } else {
            text_add_bytes(out, line, length);
        }
    }
}

/* The number right after `key`, where digits begin; false when the line is not of a CPU. */
static bool cpu_of(const char *line, size_t size, const char *key, uint64_t *cpu) {
    size_t at = strlen(key), digits = 0;
    if (!begins(line, size, key)) {
        return false;
    }
    while (at < size && (line[at] == '\t' || line[at] == ' ' || line[at] == ':')) {
        at++;
    }
    while (at + digits < size && line[at + digits] >= '0' && line[at + digits] <= '9') {
        digits++;
    }
    return parse_u64(line + at, digits, cpu);
}

void view_cpuinfo(const struct view *view, const char *kernel, size_t size, struct text *out) {
    bool shown = true;
    for (size_t at = 0, length; at < size; at += length) {
        uint64_t cpu;
        length = line_size(kernel, size, at);
        if (cpu_of(kernel + at, length, "processor", &cpu)) {
            shown = has(&view->cpus, cpu);
        }
        if (shown) {
            text_add_bytes(out, kernel + at, length);
        }
    }
}

void view_stat(const struct view *view, const char *kernel, size_t size, struct text *out) {
    for (size_t at = 0, length; at < size; at += length) {
        uint64_t cpu;
        length = line_size(kernel, size, at);
        bool of_all = begins(kernel + at, length, "cpu "); /* since boot, whoever is online now */
        if (of_all || !cpu_of(kernel + at, length, "cpu", &cpu) || has(&view->cpus, cpu)) {
            text_add_bytes(out, kernel + at, length);
        }
    }
}

void view_online(const struct view *view, struct text *out) {
    bool first = true;
    for (uint64_t cpu = 0; cpu < VIEW_CPUS; cpu++) {
        uint64_t last = cpu;
        if (!has(&view->cpus, cpu)) {
            continue;
        }
        while (has(&view->cpus, last + 1)) {
            last++;
        }
        text_add(out, first ? "" : ",");
        text_add_u64(out, cpu);
        if (last > cpu) {
            text_add(out, "-");
            text_add_u64(out, last);
        }
        first = false;
        cpu = last;
    }
    text_add(out, "\n");
}

struct cpu_set view_affinity(const struct view *view, const struct cpu_set *affinity) {
    struct cpu_set both;
    uint64_t any = 0;
    for (unsigned i = 0; i < CPU_WORDS; i++) {
        both.word[i] = view->cpus.word[i] & affinity->word[i];
        any |= both.word[i];
    }
    return any ? both : view->cpus;
}

static size_t digits_at(const char *text, size_t size, size_t at) {
    size_t count = 0;
    while (at + count < size && text[at + count] >= '0' && text[at + count] <= '9') {
        count++;
    }
    return count;
}

bool cpus_parse(const char *list, size_t size, struct cpu_set *cpus) {
    *cpus = (struct cpu_set){0};
    for (size_t at = 0; at < size;) {
        uint64_t low, high;
        size_t count = digits_at(list, size, at);
        if (!parse_u64(list + at, count, &low)) {
            return false;
        }
        at += count;
        high = low;
        if (at < size && list[at] == '-') {
            count = digits_at(list, size, at + 1);
            if (!parse_u64(list + at + 1, count, &high)) {
                return false;
            }
            at += 1 + count;
        }
        for (uint64_t cpu = low; cpu <= high && cpu < VIEW_CPUS; cpu++) {
            put(cpus, cpu);
        }
        if (at < size && list[at] != ',') {
            return false;
        }
        at++;
    }
    return true;
}

static int hex_digit(char digit) {
    return digit >= '0' && digit <= '9' ? digit - '0' : digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

bool cpus_parse_mask(const char *mask, size_t size, struct cpu_set *cpus) {
    uint64_t bit = 0;
    *cpus = (struct cpu_set){0};
    for (size_t at = size; at > 0; at--) {
        int digit = hex_digit(mask[at - 1]);
        if (digit < 0 && mask[at - 1] != ',') {
            return false;
        }
        for (int i = 0; digit >= 0 && i < 4; i++, bit++) {
            if (digit >> i & 1) {
                put(cpus, bit);
            }
        }
    }
    return size > 0;
}
