/* Capabilities, by the kernel's own calls: libcap would bring more than it does here. */
#include <errno.h>
#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "child.h"

#define BIT(capability) (1ull << (capability))

/* Docker's default set without CAP_MKNOD: a device node would be a way around the read-only layers. */
static const uint64_t WORKLOAD = BIT(CAP_CHOWN) | BIT(CAP_DAC_OVERRIDE) | BIT(CAP_FOWNER) | BIT(CAP_FSETID) |
                                 BIT(CAP_KILL) | BIT(CAP_SETGID) | BIT(CAP_SETUID) | BIT(CAP_SETPCAP) |
                                 BIT(CAP_NET_BIND_SERVICE) | BIT(CAP_NET_RAW) | BIT(CAP_SYS_CHROOT) |
                                 BIT(CAP_AUDIT_WRITE) | BIT(CAP_SETFCAP);

int capabilities_limit(bool none) {
    uint64_t keep = none ? 0 : WORKLOAD;
    for (unsigned long capability = 0; capability < 64; capability++) {
        int held = prctl(PR_CAPBSET_READ, capability, 0, 0, 0);
        if (held < 0) {
            break; /* the kernel knows no more */
        }
        if (held > 0 && !(keep & BIT(capability)) && prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0) {
            return errno;
        }
    }
    return prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 ? errno : 0;
}

int capabilities_apply(bool none) {
    uint64_t keep = none ? 0 : WORKLOAD;
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {
        {.effective = (uint32_t)keep, .permitted = (uint32_t)keep},
        {.effective = (uint32_t)(keep >> 32), .permitted = (uint32_t)(keep >> 32)},
    };
    return syscall(SYS_capset, &header, data) < 0 ? errno : 0;
}
