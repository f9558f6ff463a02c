/* What a sandbox sees of its memory and CPUs: the allocation of the moment, not what its kernel happens to
 * hold. Pure: no I/O, no allocation.
 *
 * `view_of` is the one place where numbers are made. The guest's kernel counts the balloon's blocks as memory
 * and leaves out what it took of boot RAM before it counted; a sandbox's allocation is the other way round
 * (hostd's ElasticNow.actual_mib): boot RAM and what is plugged, less the balloon. Of the CPUs the lowest
 * that are online count, as many as were granted. What is free, available, cached is the kernel's to say.
 */
#ifndef SANDLOOM_SYSVIEW_H
#define SANDLOOM_SYSVIEW_H

#include "text.h"

enum { CPU_WORDS = 4, VIEW_CPUS = 64 * CPU_WORDS };

struct cpu_set {
    uint64_t word[CPU_WORDS];
};

/* The kernel's facts, of one moment, and what was granted. */
struct machine {
    uint64_t total_kib;    /* MemTotal */
    uint64_t reserved_kib; /* of boot RAM, what is not in it */
    uint64_t held_kib;     /* the balloon's; in MemTotal */
    uint64_t cpus_granted; /* 0: all that are online */
    struct cpu_set online;
};

struct view {
    uint64_t total_kib;
    struct cpu_set cpus; /* never empty */
};

struct view view_of(const struct machine *machine);

/* /proc/meminfo, /proc/cpuinfo, /proc/stat: the kernel's text with the view's numbers and CPUs in it. The
 * balloon does not show. At most VIEW_GROWS bytes longer than the kernel's. */
enum { VIEW_GROWS = 32 };
void view_meminfo(const struct view *view, const char *kernel, size_t size, struct text *out);
void view_cpuinfo(const struct view *view, const char *kernel, size_t size, struct text *out);
void view_stat(const struct view *view, const char *kernel, size_t size, struct text *out);
/* /sys/devices/system/cpu/online: "0-2,5\n"; it fits into 4 * VIEW_CPUS bytes. */
void view_online(const struct view *view, struct text *out);

/* Of an affinity what is in the view; all of the view when that is nothing, as when a CPU goes offline. */
struct cpu_set view_affinity(const struct view *view, const struct cpu_set *affinity);

/* "0-2,5", as the kernel writes lists of CPUs; false when it is anything else. Numbers from VIEW_CPUS on are
 * left out. */
bool cpus_parse(const char *list, size_t size, struct cpu_set *cpus);
/* "ff,00000001", as /proc/PID/status has Cpus_allowed: 32 bits a group, the highest first. */
bool cpus_parse_mask(const char *mask, size_t size, struct cpu_set *cpus);

#endif
