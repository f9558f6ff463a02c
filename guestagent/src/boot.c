/* From the kernel's first program to an agent with its port: mounts, memory policy, modules. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"
#include "services.h"

enum { ORDER_BYTES = 4096, PORT_DEADLINE_MS = 60000 };

static void mount_one(const char *type, const char *at, unsigned long flags) {
    if (mount(type, at, type, flags, NULL) < 0) {
        log_line("cannot mount ", at, errno);
    }
}

static void write_once(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) {
        log_line("cannot set ", path, errno);
    }
    if (fd >= 0) {
        close(fd);
    }
}

static void load_module(const char *name) {
    char buffer[128];
    struct text path;
    text_init(&path, buffer, sizeof(buffer));
    text_add(&path, "/mod/");
    text_add(&path, name);
    int fd = open(path.data, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)) {
        log_line("cannot load ", name, errno); /* what needs it fails later, and says so */
    }
    if (fd >= 0) {
        close(fd);
    }
    unlink(path.data); /* the initramfs is memory */
}

static void load_modules(void) {
    char order[ORDER_BYTES];
    int fd = open("/mod/order", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, order, sizeof(order) - 1);
    if (size < 0) {
        log_line("cannot read ", "/mod/order", errno);
    }
    if (fd >= 0) {
        close(fd);
    }
    order[size > 0 ? size : 0] = '\0';
    for (char *at = order, *end; (end = strchr(at, '\n')) != NULL; at = end + 1) {
        *end = '\0';
        load_module(at);
    }
    unlink("/mod/order");
}

static void standard_files(void) {
    int fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd < 3) {
        fd = dup(fd);
    }
    if (fd > 2) {
        close(fd);
    }
}

void boot(struct agent *agent) {
    mount_one("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC);
    mount_one("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC);
    mount_one("devtmpfs", "/dev", MS_NOSUID | MS_NOEXEC);
    standard_files();
    freezer_open(agent);
    reboot(RB_DISABLE_CAD);
    viewing_measure(agent);
    /* Before virtio_mem comes: what is plugged shall be free to be unplugged, so never kernel memory. */
    write_once("/sys/devices/system/memory/auto_online_blocks", "online_movable");
    load_modules();
    int error = loopback_up();
    if (error) {
        log_line("the loopback interface stays down", "", error);
    }
    if (!port_find(agent, PORT_DEADLINE_MS)) {
        log_line("no virtio port is called ", "sandloom.agent", ENODEV);
        sync();
        reboot(RB_POWER_OFF);
    }
}
