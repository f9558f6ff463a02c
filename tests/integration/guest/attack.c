/* What a guest's kernel could do to its devices, done from a root process in the guest:
 *
 *     attack fill
 *         writes every page of memory that the guest can spare
 *     attack send DEVICE QUEUE REPLY WORD...
 *         drives a virtio device (its PCI device id in hex) by hand, whatever its driver thinks: sends the
 * 64-bit WORDs as one request and prints the reply's first two bytes. REPLY is the guest-physical address
 * that the device is told to reply to; 0: a buffer
 *
 * Layouts: virtio 1.2, 2.7 (split virtqueues) and 4.1.4 (PCI capabilities). Little-endian, as the guest is.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    PAGE = 4096,
    SPARE_KIB = 16 << 10,
    QUEUE_SIZE = 4,
    REQUEST_AT = 1024,
    REPLY_AT = 2048,
    REPLY_BYTES = 16
};

static _Noreturn void fail(const char *what) {
    perror(what);
    exit(2);
}

static int fill(void) {
    char line[128];
    size_t available_kib = 0;
    FILE *info = fopen("/proc/meminfo", "r");
    while (info != NULL && fgets(line, sizeof(line), info) != NULL) {
        sscanf(line, "MemAvailable: %zu", &available_kib);
    }
    size_t size = (available_kib - SPARE_KIB) << 10;
    uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (available_kib <= SPARE_KIB || memory == MAP_FAILED) {
        fail("memory");
    }
    memset(memory, 0xa5, size);
    printf("wrote %zu MiB\n", size >> 20);
    return 0;
}

static uint64_t physical(const void *at) {
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (fd < 0 || pread(fd, &entry, sizeof(entry), (off_t)((uintptr_t)at / PAGE * 8)) != sizeof(entry)) {
        fail("pagemap");
    }
    close(fd);
    return (entry & ((1ull << 55) - 1)) * PAGE + (uintptr_t)at % PAGE;
}

/* The device's folder in sysfs. */
static void find(unsigned wanted, char *folder, size_t size) {
    DIR *devices = opendir("/sys/bus/pci/devices");
    struct dirent *entry;
    while (devices != NULL && (entry = readdir(devices)) != NULL) {
        char path[400];
        unsigned id = 0;
        snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/device", entry->d_name);
        FILE *file = entry->d_name[0] == '.' ? NULL : fopen(path, "r");
        if (file != NULL && fscanf(file, "%x", &id) == 1 && id == wanted) {
            snprintf(folder, size, "/sys/bus/pci/devices/%s", entry->d_name);
            fclose(file);
            closedir(devices);
            return;
        }
        if (file != NULL) {
            fclose(file);
        }
    }
    fprintf(stderr, "no device %x\n", wanted);
    exit(3);
}

struct device {
    volatile uint8_t *common, *notify;
    uint32_t notify_step;
};

static void open_device(const char *folder, struct device *device) {
    char path[500];
    uint8_t config[256];
    snprintf(path, sizeof(path), "%s/config", folder);
    int fd = open(path, O_RDWR);
    uint16_t command = 0x0006; /* memory space, bus master */
    if (fd < 0 || pwrite(fd, &command, 2, 4) != 2 || pread(fd, config, sizeof(config), 0) != sizeof(config)) {
        fail(path);
    }
    for (uint8_t at = config[0x34]; at != 0; at = config[at + 1]) {
        uint32_t offset, length;
        if (config[at] != 0x09 || (config[at + 3] != 1 && config[at + 3] != 2)) {
            continue;
        }
        memcpy(&offset, config + at + 8, 4);
        memcpy(&length, config + at + 12, 4);
        snprintf(path, sizeof(path), "%s/resource%u", folder, config[at + 4]);
        int bar = open(path, O_RDWR);
        uint8_t *mapped = mmap(NULL, (offset + length + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE,
                               MAP_SHARED, bar, 0);
        if (bar < 0 || mapped == MAP_FAILED) {
            fail(path);
        }
        if (config[at + 3] == 1) {
            device->common = mapped + offset;
        } else {
            device->notify = mapped + offset;
            memcpy(&device->notify_step, config + at + 16, 4);
        }
    }
    if (device->common == NULL || device->notify == NULL) {
        fail("capabilities");
    }
}

#define REG(type, at) (*(volatile type *)(device->common + (at)))

static uint16_t start(const struct device *device, uint16_t queue, uint64_t page) {
    REG(uint8_t, 20) = 0; /* reset */
    REG(uint8_t, 20) = 1;
    REG(uint8_t, 20) = 3;
    REG(uint32_t, 0) = 0;
    uint32_t offered = REG(uint32_t, 4);
    REG(uint32_t, 8) = 0;
    REG(uint32_t, 12) = offered & 3; /* of virtio-mem: where it is, and that what is unplugged is not there */
    REG(uint32_t, 8) = 1;
    REG(uint32_t, 12) = 1; /* VIRTIO_F_VERSION_1 */
    REG(uint8_t, 20) = 11;
    REG(uint16_t, 22) = queue;
    REG(uint16_t, 24) = QUEUE_SIZE;
    REG(uint64_t, 32) = page;
    REG(uint64_t, 40) = page + 256;
    REG(uint64_t, 48) = page + 512;
    REG(uint16_t, 28) = 1;
    REG(uint8_t, 20) = 15;
    return REG(uint16_t, 30);
}

static int send_words(int argc, char **argv) {
    char folder[300];
    struct device device = {0};
    uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED | MAP_POPULATE, -1, 0);
    if (page == MAP_FAILED) {
        fail("page");
    }
    memset(page, 0, PAGE);
    memset(page + REPLY_AT, 0xee, REPLY_BYTES);
    find((unsigned)strtoul(argv[0], NULL, 16), folder, sizeof(folder));
    open_device(folder, &device);
    uint64_t at = physical(page), reply = strtoull(argv[2], NULL, 0);
    uint16_t queue = (uint16_t)atoi(argv[1]), notify_at = start(&device, queue, at);
    for (int i = 3; i < argc; i++) {
        uint64_t word = strtoull(argv[i], NULL, 0);
        memcpy(page + REQUEST_AT + 8 * (i - 3), &word, 8);
    }
    struct {
        uint64_t address;
        uint32_t size;
        uint16_t flags, next;
    } chain[2] = {{at + REQUEST_AT, (uint32_t)(8 * (argc - 3)), 1, 1},
                  {reply ? reply : at + REPLY_AT, REPLY_BYTES, 2, 0}};
    memcpy(page, chain, sizeof(chain));
    __sync_synchronize();
    *(volatile uint16_t *)(page + 256 + 2) = 1; /* the first entry of the ring is descriptor 0 */
    __sync_synchronize();
    *(volatile uint16_t *)(device.notify + notify_at * device.notify_step) = queue;
    for (int i = 0; i < 100 && *(volatile uint16_t *)(page + 512 + 2) == 0; i++) {
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    printf("used %u reply %02x%02x status %02x\n", *(volatile uint16_t *)(page + 512 + 2), page[REPLY_AT + 1],
           page[REPLY_AT], device.common[20]);
    device.common[20] = 0; /* reset: it must not write to this page any more */
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "fill") == 0) {
        return fill();
    }
    if (argc > 5 && strcmp(argv[1], "send") == 0) {
        return send_words(argc - 2, argv + 2);
    }
    fprintf(stderr, "usage: attack fill | attack send DEVICE QUEUE REPLY WORD...\n");
    return 1;
}
