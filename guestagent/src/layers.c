/* The image: its layers, found by the EROFS volume uuid, mounted and joined under a writable tmpfs.
 *
 * /l (tmpfs) holds a mount point a layer, called by its number, so that 128 of them fit into the one page
 * that mount(2) takes as options: "lowerdir=127:126:…:0", relative to /l. /u is the writable layer, /o the
 * whole.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

/* fs/erofs/erofs_fs.h */
enum { SUPER_OFFSET = 1024, UUID_OFFSET = SUPER_OFFSET + 48, BLOCK_BYTES = 4096, OPTION_BYTES = 4096 };
static const uint8_t EROFS_MAGIC[4] = {0xe2, 0xe1, 0xf5, 0xe0};

static _Alignas(BLOCK_BYTES) uint8_t block[BLOCK_BYTES];

/* The uuid of the EROFS volume on /dev/NAME; read past the page cache, which would keep it for nothing. */
static const uint8_t *volume_uuid(const char *name) {
    char buffer[64];
    struct text path;
    text_init(&path, buffer, sizeof(buffer));
    text_add(&path, "/dev/");
    text_add(&path, name);
    int fd = open(path.data, O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (fd < 0) {
        return NULL;
    }
    ssize_t size = pread(fd, block, sizeof(block), 0);
    close(fd);
    bool is_erofs =
        size == BLOCK_BYTES && memcmp(block + SUPER_OFFSET, EROFS_MAGIC, sizeof(EROFS_MAGIC)) == 0;
    return is_erofs ? block + UUID_OFFSET : NULL;
}

static bool is_known(const struct pending_configure *pending, const char *name) {
    for (uint32_t i = 0; i < pending->layer_count; i++) {
        if (strcmp(pending->devices[i], name) == 0) {
            return true;
        }
    }
    return false;
}

static void match(struct pending_configure *pending, const char *name) {
    const uint8_t *uuid = volume_uuid(name);
    for (uint32_t i = 0; uuid != NULL && i < pending->layer_count; i++) {
        if (pending->devices[i][0] == '\0' && memcmp(pending->layers[i], uuid, UUID_BYTES) == 0) {
            strcpy(pending->devices[i], name);
            return;
        }
    }
}

/* Whether all are found by now. virtio-pmem is how layers come; virtio-blk is the peer that we are measured
 * against. */
bool layers_find(struct pending_configure *pending) {
    DIR *devices = opendir("/sys/block");
    struct dirent *entry;
    while (devices != NULL && (entry = readdir(devices)) != NULL) {
        bool ours = strncmp(entry->d_name, "pmem", 4) == 0 || strncmp(entry->d_name, "vd", 2) == 0;
        if (ours && strlen(entry->d_name) < sizeof(pending->devices[0]) &&
            !is_known(pending, entry->d_name)) {
            match(pending, entry->d_name);
        }
    }
    if (devices != NULL) {
        closedir(devices);
    }
    return !is_known(pending, "");
}

static int because_layer(struct agent *agent, int error, const char *what, uint32_t layer) {
    char buffer[2 * UUID_BYTES + 32];
    struct text subject;
    text_init(&subject, buffer, sizeof(buffer));
    text_add_hex(&subject, agent->pending.layers[layer], UUID_BYTES);
    text_add(&subject, " (");
    text_add(&subject, agent->pending.devices[layer]);
    text_add(&subject, ")");
    return because(agent, error, what, subject.data);
}

/* "/dev/pmem3 /l/17 erofs ro,…": the layer's number when it is one from pmem that has no dax, else -1. */
static int lacks_dax(const char *line) {
    uint64_t layer;
    const char *at = strstr(line, " /l/"), *end = at ? strchr(at + 4, ' ') : NULL;
    bool pmem = end != NULL && strncmp(line, "/dev/pmem", 9) == 0 && strstr(end, ",dax=always") == NULL;
    return pmem && parse_u64(at + 4, (size_t)(end - at - 4), &layer) && layer < MAX_LAYERS ? (int)layer : -1;
}

/* The kernel turns dax off, with a line in its log only, where a device cannot do it. -1: all have it. */
static int layer_without_dax(void) {
    char line[512], piece[512];
    size_t size = 0;
    int found = -1;
    int fd = open("/proc/self/mounts", O_RDONLY | O_CLOEXEC);
    for (ssize_t got; fd >= 0 && (got = read(fd, piece, sizeof(piece))) > 0;) {
        for (ssize_t i = 0; i < got && found < 0; i++) {
            line[size] = piece[i] == '\n' ? '\0' : piece[i];
            if (piece[i] == '\n') {
                found = lacks_dax(line);
                size = 0;
            } else if (size < sizeof(line) - 1) {
                size++;
            }
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    return found;
}

static int mount_layer(struct agent *agent, uint32_t layer) {
    char device_buffer[32], point_buffer[32];
    struct text device, point;
    bool pmem = strncmp(agent->pending.devices[layer], "pmem", 4) == 0;
    text_init(&device, device_buffer, sizeof(device_buffer));
    text_add(&device, "/dev/");
    text_add(&device, agent->pending.devices[layer]);
    text_init(&point, point_buffer, sizeof(point_buffer));
    text_add(&point, "/l/");
    text_add_u64(&point, layer);
    if (mkdir(point.data, 0700) < 0 ||
        mount(device.data, point.data, "erofs", MS_RDONLY | MS_NODEV, pmem ? "dax=always" : NULL) < 0) {
        return because_layer(agent, errno, "layer ", layer);
    }
    return 0;
}

/* As many inodes as pages: memory grows later, and tmpfs's default would not. */
static void upper_size(struct text *options, const struct agent *agent) {
    text_add(options, "size=");
    text_add_u64(options, agent->pending.upper_mib);
    text_add(options, "m,nr_inodes=");
    text_add_u64(options, agent->pending.upper_mib * 256);
}

/* The writable layer of a prepared image gets the size that its sandbox may fill. */
int layers_resize_upper(struct agent *agent) {
    char buffer[96];
    struct text options;
    text_init(&options, buffer, sizeof(buffer));
    upper_size(&options, agent);
    int error = mount(NULL, "/u", NULL, MS_REMOUNT | MS_NODEV, options.data) < 0 ? errno : 0;
    return error ? because(agent, error, "the writable layer: tmpfs with ", options.data) : 0;
}

static int mount_upper(struct agent *agent) {
    char buffer[96];
    struct text options;
    struct stat top;
    text_init(&options, buffer, sizeof(buffer));
    text_add(&options, "mode=700,");
    upper_size(&options, agent);
    mkdir("/u", 0700);
    if (mount("upper", "/u", "tmpfs", MS_NODEV, options.data) < 0) {
        return because(agent, errno, "the writable layer: tmpfs with ", options.data);
    }
    if (mkdir("/u/up", 0755) < 0 || mkdir("/u/work", 0700) < 0) {
        return because(agent, errno, "the writable layer", "");
    }
    if (chdir("/l") < 0) {
        return because(agent, errno, "/l", "");
    }
    text_init(&options, buffer, sizeof(buffer));
    text_add_u64(&options, agent->pending.layer_count - 1);
    /* The root folder's owner and mode are the upper one's: the image's, then. */
    if (stat(options.data, &top) < 0 || chown("/u/up", top.st_uid, top.st_gid) < 0 ||
        chmod("/u/up", top.st_mode & 07777) < 0) {
        return because(agent, errno, "the image's root", "");
    }
    return 0;
}

static int mount_overlay(struct agent *agent) {
    char *buffer = malloc(OPTION_BYTES);
    struct text options;
    if (buffer == NULL) {
        return because(agent, ENOMEM, "overlay", "");
    }
    text_init(&options, buffer, OPTION_BYTES);
    text_add(&options, "lowerdir=");
    for (uint32_t i = agent->pending.layer_count; i > 0; i--) {
        text_add_u64(&options, i - 1);
        text_add(&options, i > 1 ? ":" : ",");
    }
    text_add(&options, "upperdir=/u/up,workdir=/u/work,volatile");
    /* nodev: a device node in an image (or made by hand) opens nothing. */
    int error = mount("overlay", "/o", "overlay", MS_NODEV, options.data) < 0 ? errno : 0;
    free(buffer);
    return error ? because(agent, error, "overlay", "") : 0;
}

int layers_mount(struct agent *agent) {
    int error = mount("layers", "/l", "tmpfs", MS_NODEV | MS_NOSUID, "mode=700") < 0 ? errno : 0;
    if (error) {
        return because(agent, error, "/l", "");
    }
    for (uint32_t layer = 0; layer < agent->pending.layer_count; layer++) {
        if ((error = mount_layer(agent, layer)) != 0) {
            return error;
        }
    }
    int slow = layer_without_dax();
    if (slow >= 0) {
        return because_layer(agent, EOPNOTSUPP, "the kernel refuses DAX for layer ", (uint32_t)slow);
    }
    error = mount_upper(agent);
    error = error ? error : mount_overlay(agent);
    if (chdir("/") < 0) {
        return because(agent, errno, "/", "");
    }
    return error;
}

/* After a failure, so that the host may ask again. */
void layers_unmount(void) {
    umount2("/o", MNT_DETACH);
    umount2("/u", MNT_DETACH);
    umount2("/l", MNT_DETACH);
}
