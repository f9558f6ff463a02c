/* The balloon's guest half: 2 MiB blocks of the movable zone are taken from the guest by raising nr_hugepages
 * (the kernel takes them whole and does not clear them), found again by the head entries of
 * /proc/kpageflags, and told to the host as runs. Lowering nr_hugepages gives them back; nothing has to be
 * asked.
 *
 * Promise: a block that was told to the host stays taken until the host says that it is done with it
 * (BALLOON_DONE), or its session ends: the host's hole never meets a page that is in use again. Workloads
 * cannot map these pages: their cgroup's hugetlb limits are 0 (defence.c).
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

#define POOL "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
#define FLAGS "/proc/kpageflags"

enum {
    BLOCK_KIB = 2048,
    BLOCK_FRAMES = 512,
    FLAG_BYTES = 8,
    KPF_COMPOUND_HEAD = 15, /* include/uapi/linux/kernel-page-flags.h */
    KPF_HUGE = 17,
    RUN_BYTES = 16,
    MAX_RUNS = 1024, /* 16 KiB a reply; the host asks on */
    FIRST_CHUNK = 32,
    MAX_CHUNK = 1024,
    SLOW_MS = 40, /* the loop must hear the port and the pressure meanwhile */
};

static uint8_t runs[MAX_RUNS * RUN_BYTES];

static void put_le64(uint8_t *to, uint64_t value) {
    for (unsigned i = 0; i < 8; i++) {
        to[i] = (uint8_t)(value >> 8 * i);
    }
}

uint64_t balloon_blocks(void) {
    char number[24];
    uint64_t value = 0;
    int fd = open(POOL, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, number, sizeof(number));
    if (fd >= 0) {
        close(fd);
    }
    return size > 1 && parse_u64(number, (size_t)size - 1, &value) ? value : 0; /* without its newline */
}

static int set_blocks(uint64_t blocks) {
    char buffer[24];
    struct text number;
    text_init(&number, buffer, sizeof(buffer));
    text_add_u64(&number, blocks);
    int fd = open(POOL, O_WRONLY | O_CLOEXEC);
    int error = fd < 0 || write(fd, number.data, number.length) < 0 ? errno : 0;
    if (fd >= 0) {
        close(fd);
    }
    return error;
}

/* Runs of taken blocks from block `at` on, below `end`: how many runs; *next is where to go on, 0 when that
 * was all. *found counts blocks. */
static size_t find_runs(uint64_t at, uint64_t end, uint64_t most, uint64_t *found, uint64_t *next) {
    size_t count = 0;
    uint64_t length = 0;
    int fd = open(FLAGS, O_RDONLY | O_CLOEXEC);
    *found = *next = 0;
    for (; fd >= 0 && at < end && *found < most; at++) {
        uint64_t flags = 0;
        if (pread(fd, &flags, FLAG_BYTES, (off_t)(at * BLOCK_FRAMES * FLAG_BYTES)) != FLAG_BYTES) {
            break; /* above the last page that there is */
        }
        if (!(flags >> KPF_HUGE & 1) || !(flags >> KPF_COMPOUND_HEAD & 1)) {
            length = 0;
            continue;
        }
        if (length == 0) {
            if (count == MAX_RUNS) {
                *next = at;
                break;
            }
            put_le64(runs + RUN_BYTES * count++, at);
        }
        put_le64(runs + RUN_BYTES * (count - 1) + 8, ++length);
        ++*found;
    }
    if (fd >= 0) {
        close(fd);
    }
    return count;
}

static void put(msgpack_packer *packer, const char *key) {
    size_t size = strlen(key);
    msgpack_pack_str(packer, size);
    msgpack_pack_str_body(packer, key, size);
}

static void reply(struct agent *agent, uint32_t id, size_t count, uint64_t next) {
    msgpack_packer *packer = tx_begin(&agent->tx, KIND_REPLY, id, 4);
    msgpack_pack_int(packer, 0);
    msgpack_pack_map(packer, 3);
    put(packer, "blocks");
    msgpack_pack_uint64(packer, balloon_blocks());
    put(packer, "runs");
    msgpack_pack_bin(packer, RUN_BYTES * count);
    msgpack_pack_bin_body(packer, runs, RUN_BYTES * count);
    put(packer, "next");
    msgpack_pack_uint64(packer, next);
    tx_end(&agent->tx);
}

/* Tells what is taken, from block `at` on. Blocks of base RAM are of no use to the host: the last ones taken,
 * which they are, are the first to go when the pool is lowered. */
static void tell(struct agent *agent, uint32_t id, uint64_t at) {
    struct balloon *balloon = &agent->balloon;
    uint64_t found, next, held = balloon_blocks();
    size_t count = find_runs(at, balloon->end, held, &found, &next);
    if (at == balloon->first && next == 0 && found < held && set_blocks(found) == 0) {
        count = find_runs(at, balloon->end, found, &found, &next);
    }
    balloon->told = balloon->told || count > 0;
    reply(agent, id, count, next);
}

int balloon_begin(struct agent *agent, const struct message *message) {
    struct balloon *balloon = &agent->balloon;
    uint64_t blocks = message->of.balloon.blocks, held = balloon_blocks();
    if (balloon->id != 0 || balloon->told) {
        return because(agent, EBUSY, "the balloon is at work: BALLOON_DONE comes first", "");
    }
    balloon->first = message->of.balloon.first;
    balloon->end = message->of.balloon.end;
    if (blocks == held) { /* said anew to a host that may not have heard it */
        tell(agent, message->id, balloon->first);
        return 0;
    }
    if (blocks < held) {
        int error = set_blocks(blocks);
        if (error) {
            return because(agent, error, "the balloon cannot be lowered", "");
        }
        reply(agent, message->id, 0, 0);
        agent->defence.adjust_ms = now_ms() + 1; /* the answer goes first: somebody waits for it */
        return 0;
    }
    balloon->id = message->id;
    balloon->target = blocks;
    balloon->deadline_ms = now_ms() + message->of.balloon.deadline_ms;
    balloon->chunk = FIRST_CHUNK;
    return 0;
}

/* The most blocks that may be held now: what the guest needs to live on is not touched. */
static uint64_t bearable(uint64_t held) {
    uint64_t available = meminfo_kib("MemAvailable"), keep = 2 * defence_reserve_kib();
    return held + (available > keep ? (available - keep) / BLOCK_KIB : 0);
}

void balloon_step(struct agent *agent, uint64_t now) {
    struct balloon *balloon = &agent->balloon;
    if (balloon->id == 0) {
        return;
    }
    uint64_t held = balloon_blocks(), next = held + balloon->chunk, most = bearable(held);
    next = next > balloon->target ? balloon->target : next;
    next = next > most ? most : next;
    bool raised =
        next > held && now < balloon->deadline_ms && set_blocks(next) == 0 && balloon_blocks() == next;
    uint64_t took_ms = now_ms() - now;
    if (raised && next < balloon->target) {
        balloon->chunk = took_ms > SLOW_MS ? balloon->chunk / 2 + 1
                                           : (balloon->chunk < MAX_CHUNK ? 2 * balloon->chunk : MAX_CHUNK);
        return; /* the loop comes back at once */
    }
    uint32_t id = balloon->id;
    balloon->id = 0;
    tell(agent, id, balloon->first);
    defence_adjust(agent);
}

int balloon_runs(struct agent *agent, const struct message *message) {
    if (!agent->balloon.told) {
        return because(agent, EINVAL, "BALLOON comes first", "");
    }
    tell(agent, message->id, message->of.balloon.first);
    return 0;
}

int balloon_done(struct agent *agent) {
    agent->balloon.told = false;
    defence_catch_up(agent);
    return 0;
}

/* Who was told is gone, and his holes with him: hostd ends a session only when they are made. */
void balloon_cancel(struct agent *agent) {
    agent->balloon.id = 0;
    agent->balloon.told = false;
}

uint64_t balloon_give_back(struct agent *agent, uint64_t at_least) {
    uint64_t held = balloon_blocks(), blocks = held / 4 > at_least ? held / 4 : at_least;
    if (agent->balloon.told || held == 0) {
        return 0;
    }
    blocks = blocks > held ? held : blocks;
    return set_blocks(held - blocks) == 0 ? (held - balloon_blocks()) * BLOCK_KIB : 0;
}
