/* What makes a guest one particular sandbox: randomness, clock, names. */
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/openat2.h>
#include <linux/random.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"

static int credit_entropy(const struct bytes *entropy) {
    struct {
        struct rand_pool_info info;
        char data[MAX_ENTROPY_BYTES];
    } pool = {.info = {.entropy_count = (int)entropy->size * 8, .buf_size = (int)entropy->size}};
    int fd = open("/dev/random", O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return errno;
    }
    memcpy(pool.info.buf, entropy->data, entropy->size);
    /* Reseeding now: a clone's generator would otherwise go on for minutes where its template's stood. */
    int error = ioctl(fd, RNDADDENTROPY, &pool) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0 ? errno : 0;
    explicit_bzero(&pool, sizeof(pool));
    close(fd);
    return error;
}

int loopback_up(void) {
    struct ifreq request = {.ifr_name = "lo"};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return errno;
    }
    int error = ioctl(fd, SIOCGIFFLAGS, &request) < 0 ? errno : 0;
    request.ifr_flags |= IFF_UP;
    error = error ? error : ioctl(fd, SIOCSIFFLAGS, &request) < 0 ? errno : 0;
    close(fd);
    return error;
}

int identity_kernel(struct agent *agent, const struct configure *configure) {
    int error = credit_entropy(&configure->entropy);
    if (error) {
        return because(agent, error, "entropy", "");
    }
    error = clock_set(agent, configure->time_unix_ns);
    if (error) {
        return error;
    }
    if (sethostname(configure->hostname.data, configure->hostname.size) < 0) {
        return because(agent, errno, "hostname", "");
    }
    return 0;
}

/* A folder of the image: whatever links it has, they end inside the image. */
static int open_inside(int root, const char *path) {
    struct open_how how = {.flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
    return (int)syscall(SYS_openat2, root, path, &how, sizeof(how));
}

/* In a prepared image the file is our own, and nobody but us has run since. */
static int open_file(const struct agent *agent, int folder, const char *name, mode_t mode) {
    if (agent->prepared) {
        return openat(folder, name, O_WRONLY | O_TRUNC | O_NOFOLLOW | O_CLOEXEC);
    }
    if (unlinkat(folder, name, 0) < 0 && errno != ENOENT) {
        return -1;
    }
    return openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
}

static int write_file(struct agent *agent, int folder, const char *name, const char *text, mode_t mode) {
    int fd = open_file(agent, folder, name, mode);
    if (fd < 0) {
        return because(agent, errno, "cannot write /etc/", name);
    }
    size_t size = strlen(text);
    errno = ENOSPC;
    int error = write(fd, text, size) == (ssize_t)size ? 0 : errno;
    close(fd);
    return error ? because(agent, error, "cannot write /etc/", name) : 0;
}

static int write_all(struct agent *agent, int etc) {
    char buffer[320];
    struct text text;
    int error;
    text_init(&text, buffer, sizeof(buffer));
    text_add(&text, agent->pending.machine_id);
    text_add(&text, "\n");
    if ((error = write_file(agent, etc, "machine-id", text.data, 0444)) != 0) {
        return error;
    }
    text_init(&text, buffer, sizeof(buffer));
    text_add(&text, agent->pending.hostname);
    text_add(&text, "\n");
    if ((error = write_file(agent, etc, "hostname", text.data, 0644)) != 0) {
        return error;
    }
    text_init(&text, buffer, sizeof(buffer));
    text_add(&text, "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t");
    text_add(&text, agent->pending.hostname);
    text_add(&text, "\n");
    if ((error = write_file(agent, etc, "hosts", text.data, 0644)) != 0) {
        return error;
    }
    struct stat info;
    bool absent = fstatat(etc, "resolv.conf", &info, AT_SYMLINK_NOFOLLOW) < 0;
    return absent ? write_file(agent, etc, "resolv.conf", "# this sandbox has no resolver\n", 0644) : 0;
}

/* The kernel's own boot id is the template's, the same in all its clones: world.c mounts this file over it.
 * Written in place, for a mount shows the file that it was made of. */
static int write_boot_id(struct agent *agent) {
    static const uint8_t PARTS[] = {4, 2, 2, 2, 6};
    uint8_t id[16], *at = id;
    char buffer[64];
    struct text text;
    text_init(&text, buffer, sizeof(buffer));
    if (getrandom(id, sizeof(id), 0) != (ssize_t)sizeof(id)) {
        return because(agent, EIO, "boot id", "");
    }
    id[6] = (uint8_t)((id[6] & 0x0f) | 0x40); /* RFC 4122: version 4, its variant */
    id[8] = (uint8_t)((id[8] & 0x3f) | 0x80);
    for (unsigned i = 0; i < sizeof(PARTS); at += PARTS[i++]) {
        text_add(&text, i > 0 ? "-" : "");
        text_add_hex(&text, at, PARTS[i]);
    }
    text_add(&text, "\n");
    int fd = open(BOOT_ID_FILE, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0444);
    errno = fd < 0 ? errno : ENOSPC;
    int error = fd >= 0 && write(fd, text.data, text.length) == (ssize_t)text.length ? 0 : errno;
    if (fd >= 0) {
        close(fd);
    }
    return error ? because(agent, error, "boot id", "") : 0;
}

static int write_resolver(struct agent *agent, int etc) {
    static const char TEXT[] = "nameserver 100.64.0.1\noptions timeout:3 attempts:2\n";
    if (unlinkat(etc, "resolv.conf", 0) < 0 && errno != ENOENT) {
        return because(agent, errno, "cannot write /etc/", "resolv.conf");
    }
    int fd = openat(etc, "resolv.conf", O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    errno = fd < 0 ? errno : ENOSPC;
    int error = fd >= 0 && write(fd, TEXT, sizeof(TEXT) - 1) == (ssize_t)sizeof(TEXT) - 1 ? 0 : errno;
    if (fd >= 0) {
        close(fd);
    }
    return error ? because(agent, error, "cannot write /etc/", "resolv.conf") : 0;
}

static int in_etc(struct agent *agent, int (*write_some)(struct agent *, int)) {
    int root = open(agent->root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0) {
        return because(agent, errno, agent->root, "");
    }
    mkdirat(root, "etc", 0755); /* where the image has none; a failure shows at once below */
    int etc = open_inside(root, "etc");
    int error = etc < 0 ? because(agent, errno, "the image's /etc", "") : write_some(agent, etc);
    if (etc >= 0) {
        close(etc);
    }
    close(root);
    return error;
}

int identity_files(struct agent *agent) {
    int error = write_boot_id(agent);
    return error ? error : in_etc(agent, write_all);
}

int identity_resolver(struct agent *agent) {
    return in_etc(agent, write_resolver);
}
