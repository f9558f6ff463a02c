#include "message.h"

#include "wire.h"

#include <string.h>

static bool take_uint(const msgpack_object *object, uint64_t least, uint64_t most, uint64_t *value) {
    if (object == NULL || object->type != MSGPACK_OBJECT_POSITIVE_INTEGER || object->via.u64 < least ||
        object->via.u64 > most) {
        return false;
    }
    *value = object->via.u64;
    return true;
}

static bool take_u16(const msgpack_object *object, uint16_t *value) {
    uint64_t wide;
    bool ok = take_uint(object, 0, UINT16_MAX, &wide);
    *value = ok ? (uint16_t)wide : 0;
    return ok;
}

static bool take_u32(const msgpack_object *object, uint32_t least, uint32_t *value) {
    uint64_t wide;
    bool ok = take_uint(object, least, UINT32_MAX, &wide);
    *value = ok ? (uint32_t)wide : 0;
    return ok;
}

static bool take_flag(const msgpack_object *object, bool *value) {
    if (object == NULL || object->type != MSGPACK_OBJECT_BOOLEAN) {
        return false;
    }
    *value = object->via.boolean;
    return true;
}

static bool take_bytes(const msgpack_object *object, size_t least, size_t most, struct bytes *value) {
    if (object == NULL || object->type != MSGPACK_OBJECT_BIN || object->via.bin.size < least ||
        object->via.bin.size > most) {
        return false;
    }
    value->data = object->via.bin.ptr;
    value->size = object->via.bin.size;
    return true;
}

/* Bytes that will be C strings. */
static bool take_string(const msgpack_object *object, size_t least, size_t most, struct bytes *value) {
    return take_bytes(object, least, most, value) &&
           (value->size == 0 || memchr(value->data, 0, value->size) == NULL);
}

static bool take_strings(const msgpack_object *object, uint32_t least, msgpack_object_array *value) {
    if (object == NULL || object->type != MSGPACK_OBJECT_ARRAY || object->via.array.size < least) {
        return false;
    }
    for (uint32_t i = 0; i < object->via.array.size; i++) {
        struct bytes item;
        if (!take_string(&object->via.array.ptr[i], 0, MAX_PAYLOAD_BYTES, &item)) {
            return false;
        }
    }
    *value = object->via.array;
    return true;
}

static const msgpack_object *field(const msgpack_object *map, const char *key) {
    size_t size = strlen(key);
    for (uint32_t i = 0; i < map->via.map.size; i++) {
        const msgpack_object_kv *pair = &map->via.map.ptr[i];
        if (pair->key.type == MSGPACK_OBJECT_STR && pair->key.via.str.size == size &&
            memcmp(pair->key.via.str.ptr, key, size) == 0) {
            return &pair->val;
        }
    }
    return NULL;
}

static bool hostname_ok(const struct bytes *name) {
    for (size_t i = 0; i < name->size; i++) {
        char c = name->data[i];
        bool inner = i > 0 && i + 1 < name->size && (c == '.' || c == '-');
        if (!inner && !(c >= '0' && c <= '9') && !(c >= 'a' && c <= 'z') && !(c >= 'A' && c <= 'Z')) {
            return false;
        }
    }
    return true;
}

static bool hex_ok(const struct bytes *text) {
    for (size_t i = 0; i < text->size; i++) {
        char c = text->data[i];
        if (!(c >= '0' && c <= '9') && !(c >= 'a' && c <= 'f')) {
            return false;
        }
    }
    return true;
}

static const char *parse_layers(const msgpack_object *map, struct configure *to) {
    const msgpack_object *layers = field(map, "layers");
    if (layers == NULL || layers->type != MSGPACK_OBJECT_ARRAY || layers->via.array.size < 1 ||
        layers->via.array.size > MAX_LAYERS) {
        return "layers";
    }
    to->layer_count = layers->via.array.size;
    for (uint32_t i = 0; i < to->layer_count; i++) {
        if (!take_bytes(&layers->via.array.ptr[i], UUID_BYTES, UUID_BYTES, &to->layers[i])) {
            return "a layer's uuid";
        }
    }
    return take_uint(field(map, "deadline_ms"), 1, UINT32_MAX, &to->deadline_ms) ? NULL : "deadline_ms";
}

/* What CONFIGURE and RENEW share. */
static const char *parse_identity(const msgpack_object *map, struct configure *to) {
    if (!take_bytes(field(map, "hostname"), 1, MAX_HOSTNAME_BYTES, &to->hostname) ||
        !hostname_ok(&to->hostname)) {
        return "hostname";
    }
    if (!take_bytes(field(map, "entropy"), MIN_ENTROPY_BYTES, MAX_ENTROPY_BYTES, &to->entropy)) {
        return "entropy";
    }
    if (!take_bytes(field(map, "machine_id"), MACHINE_ID_BYTES, MACHINE_ID_BYTES, &to->machine_id) ||
        !hex_ok(&to->machine_id)) {
        return "machine_id";
    }
    return take_uint(field(map, "time_unix_ns"), 1, INT64_MAX, &to->time_unix_ns) ? NULL : "time_unix_ns";
}

static const char *parse_configure(const msgpack_object *map, struct configure *to) {
    const char *wrong = parse_identity(map, to);
    if (wrong == NULL && !take_uint(field(map, "upper_mib"), 1, UINT32_MAX, &to->upper_mib)) {
        wrong = "upper_mib";
    }
    return wrong ? wrong : parse_layers(map, to);
}

static const char *parse_start(const msgpack_object *map, uint32_t *proc, struct start *to) {
    if (!take_u32(field(map, "proc"), 1, proc)) {
        return "START: proc";
    }
    if (!take_strings(field(map, "argv"), 1, &to->argv) || to->argv.ptr[0].via.bin.size == 0) {
        return "START: argv";
    }
    if (!take_strings(field(map, "env"), 0, &to->env)) {
        return "START: env";
    }
    if (!take_string(field(map, "cwd"), 1, MAX_PAYLOAD_BYTES, &to->cwd) || to->cwd.data[0] != '/') {
        return "START: cwd is not an absolute path";
    }
    if (!take_string(field(map, "user"), 0, MAX_PAYLOAD_BYTES, &to->user)) {
        return "START: user";
    }
    if (!take_u16(field(map, "rows"), &to->rows) || !take_u16(field(map, "cols"), &to->cols)) {
        return "START: rows or cols";
    }
    return take_flag(field(map, "tty"), &to->tty) && take_flag(field(map, "stdin"), &to->stdin_wanted)
               ? NULL
               : "START: tty or stdin";
}

static const char *parse_services(const msgpack_object *map, struct services_wanted *to) {
    enum { NONCE = 16, MOST = 2 };
    const msgpack_object *who = field(map, "who");
    if (who == NULL || who->type != MSGPACK_OBJECT_ARRAY || who->via.array.size != sizeof(to->who)) {
        return "SERVICES: who";
    }
    for (uint32_t i = 0; i < sizeof(to->who); i++) {
        uint64_t answerer;
        if (!take_uint(&who->via.array.ptr[i], 0, MOST, &answerer)) {
            return "SERVICES: an answerer";
        }
        to->who[i] = (uint8_t)answerer;
    }
    return take_bytes(field(map, "nonce"), NONCE, NONCE, &to->nonce) ? NULL : "SERVICES: nonce";
}

/* The fields after kind and id; there are as many of them as the kind has. */
static const char *parse_fields(const msgpack_object *at, struct message *to) {
    uint64_t wide = 0;
    switch (to->kind) {
    case KIND_HELLO:
        return take_uint(&at[0], 0, UINT32_MAX, &to->of.version) ? NULL : "HELLO: version";
    case KIND_CONFIGURE:
        return at[0].type == MSGPACK_OBJECT_MAP ? parse_configure(&at[0], &to->of.configure) : "CONFIGURE";
    case KIND_REHEARSE:
        return at[0].type == MSGPACK_OBJECT_MAP ? parse_configure(&at[0], &to->of.configure) : "REHEARSE";
    case KIND_PREPARE:
        return at[0].type == MSGPACK_OBJECT_MAP ? parse_layers(&at[0], &to->of.configure) : "PREPARE";
    case KIND_RENEW:
        return at[0].type == MSGPACK_OBJECT_MAP ? parse_identity(&at[0], &to->of.configure) : "RENEW";
    case KIND_FREEZE:
        return take_uint(&at[0], 1, UINT32_MAX, &to->of.deadline_ms) ? NULL : "FREEZE: deadline_ms";
    case KIND_START:
        return at[0].type == MSGPACK_OBJECT_MAP ? parse_start(&at[0], &to->proc, &to->of.start) : "START";
    case KIND_BALLOON:
        return take_uint(&at[0], 0, MAX_BLOCKS, &to->of.balloon.blocks) &&
                       take_uint(&at[1], 0, MAX_BLOCKS, &to->of.balloon.first) &&
                       take_uint(&at[2], to->of.balloon.first, MAX_BLOCKS, &to->of.balloon.end) &&
                       take_uint(&at[3], 1, UINT32_MAX, &to->of.balloon.deadline_ms)
                   ? NULL
                   : "BALLOON: blocks, first, end or deadline_ms";
    case KIND_BALLOON_RUNS:
        return take_uint(&at[0], 0, MAX_BLOCKS, &to->of.balloon.first) ? NULL : "BALLOON_RUNS: first";
    case KIND_CPUS:
        return take_uint(&at[0], 1, MAX_VCPUS, &to->of.cpus.count) &&
                       take_uint(&at[1], 1, UINT32_MAX, &to->of.cpus.deadline_ms)
                   ? NULL
                   : "CPUS: count or deadline_ms";
    case KIND_SERVICES:
        return at[0].type == MSGPACK_OBJECT_MAP ? parse_services(&at[0], &to->of.services) : "SERVICES";
    case KIND_CLOCK:
        return take_uint(&at[0], 1, INT64_MAX, &to->of.time_unix_ns) ? NULL : "CLOCK: time_unix_ns";
    case KIND_STATS:
    case KIND_THAW:
    case KIND_BALLOON_DONE:
        return NULL;
    case KIND_SHUTDOWN:
        return take_uint(&at[0], 0, UINT32_MAX, &to->of.grace_ms) ? NULL : "SHUTDOWN: grace_ms";
    default:
        break;
    }
    if (!take_u32(&at[0], 1, &to->proc)) {
        return "proc is not a process number";
    }
    switch (to->kind) {
    case KIND_STDIN:
        return take_uint(&at[1], 0, UINT64_MAX, &to->of.input.offset) &&
                       take_bytes(&at[2], 0, MAX_PAYLOAD_BYTES, &to->of.input.data) &&
                       take_flag(&at[3], &to->of.input.eof)
                   ? NULL
                   : "STDIN: offset, data or eof";
    case KIND_ACK:
        return take_u32(&at[1], 1, &to->of.ack.stream) && to->of.ack.stream <= 2 &&
                       take_uint(&at[2], 0, UINT64_MAX, &to->of.ack.offset)
                   ? NULL
                   : "ACK: stream or offset";
    case KIND_SIGNAL:
        if (!take_uint(&at[1], 1, MAX_SIGNAL, &wide)) {
            return "SIGNAL: signo";
        }
        to->of.signal = (int)wide;
        return NULL;
    case KIND_WINSIZE:
        return take_u16(&at[1], &to->of.size.rows) && take_u16(&at[2], &to->of.size.cols) ? NULL : "WINSIZE";
    default: /* KIND_FORGET */
        return NULL;
    }
}

/* How many fields follow the id; -1 where there is no such kind of the host's. */
static int field_count(enum kind kind) {
    switch (kind) {
    case KIND_STATS:
    case KIND_THAW:
    case KIND_BALLOON_DONE:
        return 0;
    case KIND_HELLO:
    case KIND_CONFIGURE:
    case KIND_START:
    case KIND_SHUTDOWN:
    case KIND_FORGET:
    case KIND_PREPARE:
    case KIND_RENEW:
    case KIND_FREEZE:
    case KIND_REHEARSE:
    case KIND_BALLOON_RUNS:
    case KIND_SERVICES:
    case KIND_CLOCK:
        return 1;
    case KIND_SIGNAL:
    case KIND_CPUS:
        return 2;
    case KIND_ACK:
    case KIND_WINSIZE:
        return 3;
    case KIND_STDIN:
    case KIND_BALLOON:
        return 4;
    default:
        return -1;
    }
}

const char *message_parse(const uint8_t *payload, size_t size, msgpack_unpacked *room,
                          struct message *message) {
    size_t offset = 0;
    uint64_t kind = 0;
    memset(message, 0, sizeof(*message));
    if (!shape_ok(payload, size)) {
        return "not one msgpack value within the limits";
    }
    if (msgpack_unpack_next(room, (const char *)payload, size, &offset) != MSGPACK_UNPACK_SUCCESS ||
        room->data.type != MSGPACK_OBJECT_ARRAY || room->data.via.array.size < 2) {
        return "not a msgpack array";
    }
    const msgpack_object *at = room->data.via.array.ptr;
    if (!take_uint(&at[0], KIND_HELLO, KIND_REHEARSE, &kind) || field_count((enum kind)kind) < 0 ||
        !take_u32(&at[1], 0, &message->id)) {
        return "kind is not one of the host's, or id is no u32";
    }
    message->kind = (enum kind)kind;
    bool notice = message->kind == KIND_STDIN || message->kind == KIND_ACK;
    if (notice != (message->id == 0)) {
        return "id does not go with the kind";
    }
    if ((int)room->data.via.array.size != 2 + field_count(message->kind)) {
        return "wrong number of fields";
    }
    return parse_fields(at + 2, message);
}
