/* PREPARE and CONFIGURE: from a booted guest to one sandbox. Waits for devices in the loop, never in a call.
 *
 * PREPARE does all that is the same for every sandbox of an image: it mounts the layers and makes the
 * workload's world. A template of that image is frozen so, and its clones' CONFIGURE gives them their
 * identity only.
 *
 * REHEARSE does the rest of CONFIGURE with an identity that CONFIGURE replaces: then all of this has run
 * once, and a program of the image may (rehearsal.c).
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

enum { RETRY_MS = 5, PREPARED_UPPER_MIB = 16 };

static void remember(struct agent *agent, const struct message *message) {
    const struct configure *configure = &message->of.configure;
    struct pending_configure *pending = &agent->pending;
    memset(pending, 0, sizeof(*pending));
    pending->id = message->id;
    pending->nameless = message->kind != KIND_CONFIGURE;
    pending->retry_ms = now_ms();
    pending->deadline_ms = pending->retry_ms + configure->deadline_ms;
    pending->upper_mib = message->kind == KIND_PREPARE ? PREPARED_UPPER_MIB : configure->upper_mib;
    pending->layer_count = configure->layer_count;
    for (uint32_t i = 0; i < configure->layer_count; i++) {
        memcpy(pending->layers[i], configure->layers[i].data, UUID_BYTES);
    }
    if (message->kind != KIND_PREPARE) {
        memcpy(pending->hostname, configure->hostname.data, configure->hostname.size);
        memcpy(pending->machine_id, configure->machine_id.data, configure->machine_id.size);
    }
}

static bool are_prepared(const struct agent *agent, const struct configure *configure) {
    bool same = agent->pending.layer_count == configure->layer_count;
    for (uint32_t i = 0; same && i < configure->layer_count; i++) {
        same = memcmp(agent->pending.layers[i], configure->layers[i].data, UUID_BYTES) == 0;
    }
    return same;
}

int prepare_begin(struct agent *agent, const struct message *message) {
    if (agent->configured || agent->prepared || agent->pending.id != 0) {
        return because(agent, EALREADY, "prepared or configured already", "");
    }
    remember(agent, message);
    return 0;
}

int configure_begin(struct agent *agent, const struct message *message) {
    if (agent->configured || agent->pending.id != 0) {
        return because(agent, EALREADY, "configured already", "");
    }
    if (agent->prepared && !are_prepared(agent, &message->of.configure)) {
        return because(agent, EINVAL, "other layers than these were prepared", "");
    }
    if (message->kind == KIND_CONFIGURE && agent->rehearsed && rehearsal_lives(agent)) {
        return because(agent, EBUSY, "something of a rehearsal is left", "");
    }
    if (agent->in_guest) {
        int error = identity_kernel(agent, &message->of.configure);
        if (error) {
            return error;
        }
    }
    remember(agent, message);
    return 0;
}

int rehearse_begin(struct agent *agent, const struct message *message) {
    if (!agent->prepared && !agent->configured) {
        return because(agent, EINVAL, "PREPARE comes first", "");
    }
    return configure_begin(agent, message);
}

static int missing(struct agent *agent) {
    char uuid[2 * UUID_BYTES + 1];
    struct text text;
    text_init(&text, uuid, sizeof(uuid));
    for (uint32_t i = 0; i < agent->pending.layer_count; i++) {
        if (agent->pending.devices[i][0] == '\0') {
            text_add_hex(&text, agent->pending.layers[i], UUID_BYTES);
            break;
        }
    }
    return because(agent, ENODEV, "no device holds layer ", text.data);
}

/* So that the host may ask again. */
static void forget(struct agent *agent) {
    if (agent->prepared) {
        world_kill(agent);
    }
    if (agent->in_guest) {
        layers_unmount();
    }
}

static int finish(struct agent *agent) {
    int error = 0;
    if (agent->in_guest) {
        error = agent->prepared ? layers_resize_upper(agent) : layers_mount(agent);
        error = error ? error : identity_files(agent);
    }
    error = error ? error : agent->prepared ? world_resize(agent) : world_start(agent);
    if (error) {
        forget(agent);
    }
    agent->rehearsed = error == 0 && agent->prepared && agent->pending.nameless;
    agent->prepared = error == 0 && agent->pending.nameless;
    return error;
}

void configure_step(struct agent *agent, uint64_t now) {
    struct pending_configure *pending = &agent->pending;
    if (pending->id == 0 || now < pending->retry_ms) {
        return;
    }
    int error;
    if (agent->rehearsed && rehearsal_lives(agent)) { /* one that failed to exec takes a moment to be gone */
        error = EBUSY;
        if (now < pending->deadline_ms) {
            pending->retry_ms = now + RETRY_MS;
            return;
        }
        because(agent, error, "something of a rehearsal is left", "");
    } else if (!agent->in_guest || agent->prepared || layers_find(pending)) {
        error = finish(agent);
    } else if (now < pending->deadline_ms) {
        pending->retry_ms = now + RETRY_MS;
        return;
    } else {
        error = missing(agent);
    }
    if (error) {
        reply_error(agent, pending->id, error);
    } else {
        agent->configured = !pending->nameless;
        agent->defence.adjust_ms = agent->configured ? now + 1 : 0;
        reply_nil(agent, pending->id);
    }
    pending->id = 0;
}

/* The host that asked is gone; nothing is mounted yet while layers are waited for, so the next may ask anew.
 */
void configure_cancel(struct agent *agent) {
    agent->pending.id = 0;
}
