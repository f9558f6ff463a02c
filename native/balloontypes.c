/* MemoryMap and Plan of native._balloon. _balloon.pyi is their documentation. */
#include "balloontypes.h"

#include <stddef.h>

#define GIB (1ull << 30)

/* MemoryMap */

static PyObject *map_fault(enum balloon_fault fault, size_t culprit) {
    static const char *const said[] = {
        [BALLOON_NO_LENGTH] = "has length 0",
        [BALLOON_UNALIGNED] = "has a gpa, length or offset that is no multiple of 4096",
        [BALLOON_WRAPS] = "ends over what an address (2^64) or a file (2^63) can hold",
        [BALLOON_OVERLAPS] = "shares guest-physical memory with another one",
        [BALLOON_ALIASES] = "shares a part of its file with another one",
    };
    if (fault == BALLOON_NO_MEMORY)
        return PyErr_NoMemory();
    return PyErr_Format(PyExc_ValueError, "region %zu %s: give regions as QEMU laid them out", culprit,
                        said[fault]);
}

static int read_region(PyObject *item, struct balloon_region *region) {
    number gpa, length, file, offset;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "a region is a tuple (gpa, length, file, offset)");
        return -1;
    }
    PyObject *fields[4];
    if (!PyArg_UnpackTuple(item, "region", 4, 4, &fields[0], &fields[1], &fields[2], &fields[3]))
        return -1;
    number *const into[4] = {&gpa, &length, &file, &offset};
    for (int i = 0; i < 4; i++) {
        *into[i] = PyLong_AsUnsignedLongLong(fields[i]);
        if (PyErr_Occurred())
            return -1;
    }
    if (file > 65535) {
        PyErr_Format(PyExc_ValueError, "file index %llu: it must be below 65536", file);
        return -1;
    }
    *region = (struct balloon_region){.gpa = gpa, .length = length, .offset = offset, .file = (uint32_t)file};
    return 0;
}

static PyObject *map_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"regions", NULL};
    PyObject *given;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:MemoryMap", names, &given))
        return NULL;
    PyObject *list = PySequence_Tuple(given);
    if (list == NULL)
        return NULL;
    Py_ssize_t count = PyTuple_Size(list);
    struct balloon_region *regions = PyMem_Calloc((size_t)count + 1, sizeof *regions);
    struct map_object *self = NULL;
    if (regions == NULL) {
        PyErr_NoMemory();
        goto out;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (read_region(PyTuple_GetItem(list, i), &regions[i]) < 0)
            goto out;
    struct balloon_map map;
    size_t culprit;
    enum balloon_fault fault = balloon_map_make(regions, (size_t)count, &map, &culprit);
    if (fault != BALLOON_SOUND) {
        map_fault(fault, culprit);
        goto out;
    }
    self = binding_alloc(type);
    if (self != NULL)
        self->map = map;
    else
        balloon_map_free(&map);
out:
    PyMem_Free(regions);
    Py_DECREF(list);
    return (PyObject *)self;
}

static void map_dealloc(PyObject *self) {
    balloon_map_free(&((struct map_object *)self)->map);
    binding_release(self);
}

static PyObject *map_regions(PyObject *self, void *Py_UNUSED(closure)) {
    const struct balloon_map *map = &((struct map_object *)self)->map;
    PyObject *list = PyTuple_New((Py_ssize_t)map->count);
    for (size_t i = 0; list != NULL && i < map->count; i++) {
        const struct balloon_region *region = &map->regions[i];
        PyObject *item = Py_BuildValue("(KKIK)", (number)region->gpa, (number)region->length, region->file,
                                       (number)region->offset);
        if (item == NULL || PyTuple_SetItem(list, (Py_ssize_t)i, item) < 0) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return list;
}

static PyObject *map_locate(PyObject *self, PyObject *arg) {
    number gpa = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    const struct balloon_region *region = balloon_find(&((struct map_object *)self)->map, gpa);
    if (region == NULL)
        Py_RETURN_NONE;
    return Py_BuildValue("(IK)", region->file, (number)(region->offset + (gpa - region->gpa)));
}

static PyObject *coalesce(PyObject *self, PyObject *args, PyObject *kwargs, const char *format, size_t words,
                          number unit) {
    static char *names[] = {"", "unit_bytes", NULL};
    struct state *state = PyType_GetModuleState(Py_TYPE(self));
    Py_buffer wire;
    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &wire, binding_to_number, &unit))
        return NULL;
    struct plan_object *made = NULL;
    if (unit < BALLOON_PAGE || unit > GIB || (unit & (unit - 1))) {
        PyErr_Format(PyExc_ValueError, "unit_bytes is %llu: it must be a power of two from 4096 to 1 GiB",
                     unit);
        goto out;
    }
    if ((size_t)wire.len % (words * 8)) {
        PyErr_Format(PyExc_ValueError, "%zd bytes are no whole number of runs of %zu bytes", wire.len,
                     words * 8);
        goto out;
    }
    made = binding_alloc(state->plan_type);
    if (made == NULL)
        goto out;
    int error;
    Py_BEGIN_ALLOW_THREADS;
    error = balloon_coalesce(&((struct map_object *)self)->map, wire.buf, (size_t)wire.len / (words * 8),
                             words, unit, &made->plan);
    Py_END_ALLOW_THREADS;
    if (error) {
        Py_CLEAR(made);
        PyErr_NoMemory();
    }
out:
    PyBuffer_Release(&wire);
    return (PyObject *)made;
}

static PyObject *map_coalesce(PyObject *self, PyObject *args, PyObject *kwargs) {
    return coalesce(self, args, kwargs, "y*|O&:coalesce", 2, 2 << 20);
}

static PyObject *map_coalesce_frames(PyObject *self, PyObject *args, PyObject *kwargs) {
    return coalesce(self, args, kwargs, "y*|O&:coalesce_frames", 1, BALLOON_PAGE);
}

static PyMethodDef map_methods[] = {
    {"locate", map_locate, METH_O, "locate(gpa) -> (file, offset) | None"},
    {"coalesce", (PyCFunction)(void (*)(void))map_coalesce, METH_VARARGS | METH_KEYWORDS,
     "coalesce(runs, unit_bytes=2 MiB) -> Plan: of (first, count) pairs of little-endian u64"},
    {"coalesce_frames", (PyCFunction)(void (*)(void))map_coalesce_frames, METH_VARARGS | METH_KEYWORDS,
     "coalesce_frames(frames, unit_bytes=4096) -> Plan: of single little-endian u64"},
    {0},
};

static PyGetSetDef map_getters[] = {
    {"regions", map_regions, NULL, "((gpa, length, file, offset), ...) by gpa", NULL},
    {0},
};

static PyMemberDef map_members[] = {
    {"total_bytes", T_ULONGLONG, offsetof(struct map_object, map.bytes), READONLY,
     "what all regions own together"},
    {0},
};

static PyType_Slot map_slots[] = {
    {Py_tp_members, map_members},
    {Py_tp_new, map_new},
    {Py_tp_dealloc, map_dealloc},
    {Py_tp_methods, map_methods},
    {Py_tp_getset, map_getters},
    {Py_tp_doc, (void *)"Where guest-physical memory stands in memory files."},
    {0, NULL},
};

PyType_Spec balloon_map_spec = {
    .name = "native._balloon.MemoryMap",
    .basicsize = sizeof(struct map_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = map_slots,
};

/* Plan */

static void plan_dealloc(PyObject *self) {
    balloon_plan_free(&((struct plan_object *)self)->plan);
    binding_release(self);
}

static Py_ssize_t plan_length(PyObject *self) {
    return (Py_ssize_t)((struct plan_object *)self)->plan.count;
}

static PyObject *plan_extents(PyObject *self, void *Py_UNUSED(closure)) {
    const struct balloon_plan *plan = &((struct plan_object *)self)->plan;
    PyObject *list = PyList_New((Py_ssize_t)plan->count);
    for (size_t i = 0; list != NULL && i < plan->count; i++) {
        const struct balloon_extent *extent = &plan->extents[i];
        PyObject *item = Py_BuildValue("(IKK)", extent->file, (number)extent->offset, (number)extent->length);
        if (item == NULL || PyList_SetItem(list, (Py_ssize_t)i, item) < 0) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return list;
}

static PyObject *plan_refused(PyObject *self, void *Py_UNUSED(closure)) {
    struct state *state = PyType_GetModuleState(Py_TYPE(self));
    const struct balloon_plan *plan = &((struct plan_object *)self)->plan;
    if (state == NULL)
        return NULL;
    const number values[] = {plan->refused[BALLOON_EMPTY], plan->refused[BALLOON_WRAPPING],
                             plan->refused[BALLOON_OUTSIDE]};
    return binding_numbers(state->refused_type, values, 3);
}

static PyObject *plan_first_refused(PyObject *self, void *Py_UNUSED(closure)) {
    const struct balloon_plan *plan = &((struct plan_object *)self)->plan;
    for (int i = 0; i < BALLOON_REFUSALS; i++)
        if (plan->refused[i])
            return PyLong_FromSize_t(plan->first_refused);
    Py_RETURN_NONE;
}

static PyGetSetDef plan_getters[] = {
    {"extents", plan_extents, NULL, "[(file, offset, length)], a new list, in bytes", NULL},
    {"refused", plan_refused, NULL, "runs refused whole, by reason", NULL},
    {"first_refused", plan_first_refused, NULL, "index of the first refused run, or None", NULL},
    {0},
};

static PyMemberDef plan_members[] = {
    {"total_bytes", T_ULONGLONG, offsetof(struct plan_object, plan.bytes), READONLY,
     "what the extents cover"},
    {"duplicate_bytes", T_ULONGLONG, offsetof(struct plan_object, plan.duplicate_bytes), READONLY,
     "what accepted runs named more than once"},
    {0},
};

static PyType_Slot plan_slots[] = {
    {Py_tp_members, plan_members},
    {Py_tp_dealloc, plan_dealloc},
    {Py_sq_length, plan_length},
    {Py_tp_getset, plan_getters},
    {Py_tp_doc, (void *)"Extents of memory files: sorted, disjoint, maximal. Made by MemoryMap.coalesce."},
    {0, NULL},
};

PyType_Spec balloon_plan_spec = {
    .name = "native._balloon.Plan",
    .basicsize = sizeof(struct plan_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = plan_slots,
};
