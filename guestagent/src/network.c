/* The network of `sockets: tool`: no device, but addresses, a tun device and two routes.
 *
 * What the sandbox sends to the world goes to the tun device, which is the agent's: it sees each SYN and each
 * datagram there. A connection that the host has dialled gets FLOW_MARK at both ends, and marked packets are
 * at home here, whatever their address (`local default dev lo` in a table of their own): so the kernel's own
 * TCP runs between the sandbox's socket and the agent's, which has the peer's address (IP_TRANSPARENT).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fib_rules.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "services.h"

#define TUN_NAME "sl0"
#define TUN_PATH "/dev/net/tun"

enum { TUN_MTU = 65535, MARKED_TABLE = 100, REPLY_BYTES = 1024, TUN_MINOR = 200 };

const struct endpoint SANDBOX_V4 = {.family = 4, .address = {100, 64, 0, 2}};
const struct endpoint SANDBOX_V6 = {
    .family = 6, .address = {0xfd, 0x73, 0x61, 0x6e, 0x64, 0x6c, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2}};

bool network_is_local(const struct endpoint *at) {
    static const uint8_t LOOPBACK[16] = {[15] = 1}, NONE[16];
    if (at->family == 4) {
        return at->address[0] == 127 || memcmp(at->address, NONE, 4) == 0 ||
               memcmp(at->address, SANDBOX_V4.address, 4) == 0;
    }
    return memcmp(at->address, LOOPBACK, 16) == 0 || memcmp(at->address, NONE, 16) == 0 ||
           memcmp(at->address, SANDBOX_V6.address, 16) == 0;
}

struct ask {
    struct nlmsghdr header;
    union {
        struct ifaddrmsg address;
        struct rtmsg route;
    } body;
    uint8_t room[128];
};

static void attribute(struct ask *ask, unsigned short type, const void *value, size_t size) {
    struct rtattr *at = (struct rtattr *)((uint8_t *)ask + NLMSG_ALIGN(ask->header.nlmsg_len));
    at->rta_type = type;
    at->rta_len = (unsigned short)RTA_LENGTH(size);
    memcpy(RTA_DATA(at), value, size);
    ask->header.nlmsg_len = NLMSG_ALIGN(ask->header.nlmsg_len) + (uint32_t)RTA_SPACE(size);
}

static int tell_kernel(int netlink, struct ask *ask, unsigned short type) {
    union {
        struct nlmsghdr header;
        uint8_t room[REPLY_BYTES];
    } reply;
    ask->header.nlmsg_type = type;
    ask->header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    if (send(netlink, ask, ask->header.nlmsg_len, 0) < 0 || recv(netlink, &reply, sizeof(reply), 0) < 0) {
        return errno;
    }
    const struct nlmsgerr *said = NLMSG_DATA(&reply.header);
    return reply.header.nlmsg_type != NLMSG_ERROR ? EPROTO : said->error == -EEXIST ? 0 : -said->error;
}

static int add_address(int netlink, int family, const struct endpoint *at, uint32_t device) {
    uint8_t size = family == AF_INET ? 4 : 16;
    struct ask ask = {.header.nlmsg_len = NLMSG_LENGTH(sizeof(struct ifaddrmsg))};
    ask.body.address = (struct ifaddrmsg){.ifa_family = (uint8_t)family,
                                          .ifa_prefixlen = (uint8_t)(size * 8),
                                          .ifa_flags = IFA_F_NODAD,
                                          .ifa_index = device};
    attribute(&ask, IFA_LOCAL, at->address, size);
    attribute(&ask, IFA_ADDRESS, at->address, size);
    return tell_kernel(netlink, &ask, RTM_NEWADDR);
}

static int add_route(int netlink, int family, uint8_t type, uint32_t device, uint8_t table,
                     const struct endpoint *source) {
    struct ask ask = {.header.nlmsg_len = NLMSG_LENGTH(sizeof(struct rtmsg))};
    ask.body.route = (struct rtmsg){.rtm_family = (uint8_t)family,
                                    .rtm_table = table,
                                    .rtm_protocol = RTPROT_STATIC,
                                    .rtm_scope = type == RTN_LOCAL ? RT_SCOPE_HOST : RT_SCOPE_LINK,
                                    .rtm_type = type};
    attribute(&ask, RTA_OIF, &device, sizeof(device));
    if (source != NULL) {
        attribute(&ask, RTA_PREFSRC, source->address, family == AF_INET ? 4 : 16);
    }
    return tell_kernel(netlink, &ask, RTM_NEWROUTE);
}

static int add_rule(int netlink, int family) {
    uint32_t mark = FLOW_MARK;
    struct ask ask = {.header.nlmsg_len = NLMSG_LENGTH(sizeof(struct rtmsg))};
    ask.body.route =
        (struct rtmsg){.rtm_family = (uint8_t)family, .rtm_table = MARKED_TABLE, .rtm_type = FR_ACT_TO_TBL};
    attribute(&ask, FRA_FWMARK, &mark, sizeof(mark));
    return tell_kernel(netlink, &ask, RTM_NEWRULE);
}

static int add_family(int netlink, int family, const struct endpoint *at, uint32_t device,
                      uint32_t loopback) {
    int error = add_address(netlink, family, at, device);
    error = error ? error : add_route(netlink, family, RTN_UNICAST, device, RT_TABLE_MAIN, at);
    error = error ? error : add_route(netlink, family, RTN_LOCAL, loopback, MARKED_TABLE, NULL);
    return error ? error : add_rule(netlink, family);
}

/* The device, up, with its index in *index; -1 with errno. */
static int open_tun(uint32_t *index) {
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strcpy(request.ifr_name, TUN_NAME);
    mkdir("/dev/net", 0755);
    if (mknod(TUN_PATH, S_IFCHR | 0600, makedev(10, TUN_MINOR)) < 0 && errno != EEXIST) {
        return -1;
    }
    int tun = open(TUN_PATH, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool done = tun >= 0 && control >= 0 && ioctl(tun, TUNSETIFF, &request) == 0;
    request.ifr_mtu = TUN_MTU;
    done = done && ioctl(control, SIOCSIFMTU, &request) == 0;
    request.ifr_flags = IFF_UP;
    done = done && ioctl(control, SIOCSIFFLAGS, &request) == 0 && ioctl(control, SIOCGIFINDEX, &request) == 0;
    int error = errno;
    *index = done ? (uint32_t)request.ifr_ifindex : 0;
    if (control >= 0) {
        close(control);
    }
    if (!done && tun >= 0) {
        close(tun);
    }
    errno = error;
    return done ? tun : -1;
}

/* What a connection from the host begins as, its accepted socket goes on as: marked. */
static int accept_marks(void) {
    int fd = open("/proc/sys/net/ipv4/tcp_fwmark_accept", O_WRONLY | O_CLOEXEC);
    int error = fd < 0 || write(fd, "1", 1) < 0 ? errno : 0;
    if (fd >= 0) {
        close(fd);
    }
    return error;
}

int network_up(struct agent *agent) {
    uint32_t device, loopback = 1; /* lo is the first of every network namespace */
    int error = loopback_up();
    agent->services->tun_fd = error ? -1 : open_tun(&device);
    if (agent->services->tun_fd < 0) {
        return because(agent, error ? error : errno, "network: ", TUN_PATH);
    }
    int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    error = netlink < 0 ? errno : add_family(netlink, AF_INET, &SANDBOX_V4, device, loopback);
    if (error == 0) {
        int v6 = add_family(netlink, AF_INET6, &SANDBOX_V6, device, loopback);
        if (v6) {
            log_line("the sandbox has no IPv6", "", v6);
        }
    }
    error = error ? error : accept_marks();
    if (netlink >= 0) {
        close(netlink);
    }
    if (error) {
        close(agent->services->tun_fd);
        agent->services->tun_fd = -1;
        return because(agent, error, "network: addresses and routes", "");
    }
    watch(agent, agent->services->tun_fd, ROLE_TUN, 0, 0, EPOLLIN);
    return 0;
}

static int bind_as(int fd, const struct endpoint *at) {
    int family = at->family == 4 ? AF_INET : AF_INET6, on = 1, off = -1; /* TCP_REPAIR_OFF_NO_WP */
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(at->port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(at->port)};
    memcpy(&v4.sin_addr, at->address, 4);
    memcpy(&v6.sin6_addr, at->address, 16);
    /* Being repaired it may have an address and port that others have, listeners of the sandbox's too. */
    if (setsockopt(fd, family == AF_INET ? SOL_IP : SOL_IPV6,
                   family == AF_INET ? IP_TRANSPARENT : IPV6_TRANSPARENT, &on, sizeof(on)) < 0 ||
        setsockopt(fd, SOL_TCP, TCP_REPAIR, &on, sizeof(on)) < 0) {
        return -1;
    }
    int bound = family == AF_INET ? bind(fd, (struct sockaddr *)&v4, sizeof(v4))
                                  : bind(fd, (struct sockaddr *)&v6, sizeof(v6));
    return setsockopt(fd, SOL_TCP, TCP_REPAIR, &off, sizeof(off)) < 0 ? -1 : bound;
}

static int connect_to(int fd, const struct endpoint *to) {
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(to->port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(to->port)};
    memcpy(&v4.sin_addr, to->address, 4);
    memcpy(&v6.sin6_addr, to->address, 16);
    int done = to->family == 4 ? connect(fd, (struct sockaddr *)&v4, sizeof(v4))
                               : connect(fd, (struct sockaddr *)&v6, sizeof(v6));
    return done < 0 && errno == EINPROGRESS ? 0 : done;
}

int flow_socket(const struct endpoint *at, const struct endpoint *to) {
    uint32_t mark = FLOW_MARK;
    int on = 1;
    int fd = socket(at->family == 4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return -1;
    }
    if (bind_as(fd, at) < 0 || setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)) < 0 ||
        setsockopt(fd, SOL_TCP, TCP_NODELAY, &on, sizeof(on)) < 0 || connect_to(fd, to) < 0) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}
