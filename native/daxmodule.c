/* native._dax: a thin binding of src/dax_*.c. _dax.pyi is its documentation. */
#include "daxbinding.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "dax.h"

struct state {
    PyTypeObject *mapping_type;
    PyTypeObject *cache_type;
};

PyObject *dax_os_error(int error, const char *path) {
    PyObject *made = path == NULL
                         ? PyObject_CallFunction(PyExc_OSError, "is", -error, strerror(-error))
                         : PyObject_CallFunction(PyExc_OSError, "iss", -error, strerror(-error), path);
    if (made != NULL)
        PyErr_SetObject((PyObject *)Py_TYPE(made), made);
    Py_XDECREF(made);
    return NULL;
}

PyObject *dax_proc_error(int error, int pid, const char *name) {
    char path[64];
    PyOS_snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    return error == -ENOMEM ? PyErr_NoMemory() : dax_os_error(error, path);
}

/* smaps */

static PyStructSequence_Field mapping_fields[] = {
    {"start", "first address"},
    {"end", "address after the last"},
    {"perms", "rwxs or p"},
    {"offset", "in the file, bytes"},
    {"file_id", "(st_dev, st_ino)"},
    {"path", "as the kernel shows it"},
    {"rss_kib", "resident"},
    {"pss_kib", "resident, each page divided by how often it is mapped"},
    {"shared_clean_kib", "mapped more than once, not written"},
    {"shared_dirty_kib", "mapped more than once, written"},
    {"private_clean_kib", "mapped once, not written"},
    {"private_dirty_kib", "mapped once, written"},
    {"anonymous_kib", "of no file"},
    {"anon_huge_kib", "of it in huge pages"},
    {"shmem_huge_kib", "shared memory mapped in huge pages"},
    {"file_huge_kib", "page cache mapped in huge pages"},
    {"shared_hugetlb_kib", "hugetlbfs, not part of rss"},
    {"private_hugetlb_kib", "hugetlbfs, not part of rss"},
    {"swap_kib", "swapped out"},
    {"swap_pss_kib", "swapped out, divided as pss"},
    {0},
};

#define FIRST_SIZE 6
_Static_assert(sizeof mapping_fields / sizeof *mapping_fields == FIRST_SIZE + DAX_SIZES + 1,
               "a field a size");

static PyStructSequence_Desc mapping_desc = {"native._dax.Mapping", "One mapping of a process.",
                                             mapping_fields, FIRST_SIZE + DAX_SIZES};

static PyObject *mapping_tuple(const struct state *state, const struct dax_mapping *from) {
    PyObject *made = PyStructSequence_New(state->mapping_type);
    if (made == NULL)
        return NULL;
    number device = makedev(from->major, from->minor);
    bool failed =
        binding_put(made, 0, PyLong_FromUnsignedLongLong(from->start)) < 0 ||
        binding_put(made, 1, PyLong_FromUnsignedLongLong(from->end)) < 0 ||
        binding_put(made, 2, PyUnicode_DecodeLatin1(from->perms, 4, NULL)) < 0 ||
        binding_put(made, 3, PyLong_FromUnsignedLongLong(from->offset)) < 0 ||
        binding_put(made, 4, Py_BuildValue("(KK)", device, (number)from->inode)) < 0 ||
        binding_put(made, 5, PyUnicode_DecodeFSDefaultAndSize(from->path, (Py_ssize_t)from->path_length)) < 0;
    for (int i = 0; !failed && i < DAX_SIZES; i++)
        failed = binding_put(made, FIRST_SIZE + i, PyLong_FromUnsignedLongLong(from->kib[i])) < 0;
    if (failed)
        Py_CLEAR(made);
    return made;
}

/* A list of Mapping. */
static PyObject *read_mappings(const struct state *state, int pid, const char *name) {
    struct dax_mapping *mappings = NULL;
    char *text = NULL;
    size_t length, count = 0;
    int error;
    Py_BEGIN_ALLOW_THREADS;
    error = dax_proc_read(pid, name, &text, &length);
    if (!error)
        error = dax_smaps_parse(text, length, &mappings, &count);
    Py_END_ALLOW_THREADS;
    PyObject *list = error ? dax_proc_error(error, pid, name) : PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *item = mapping_tuple(state, &mappings[i]);
        if (item == NULL || PyList_SetItem(list, (Py_ssize_t)i, item) < 0)
            Py_CLEAR(list);
    }
    free(mappings);
    free(text);
    return list;
}

static PyObject *smaps(PyObject *module, PyObject *args) {
    int pid;
    if (!PyArg_ParseTuple(args, "i:smaps", &pid))
        return NULL;
    return read_mappings(PyModule_GetState(module), pid, "smaps");
}

static PyObject *smaps_rollup(PyObject *module, PyObject *args) {
    int pid;
    if (!PyArg_ParseTuple(args, "i:smaps_rollup", &pid))
        return NULL;
    PyObject *list = read_mappings(PyModule_GetState(module), pid, "smaps_rollup"), *first = NULL;
    if (list != NULL && PyList_Size(list) == 1)
        first = Py_NewRef(PyList_GetItem(list, 0));
    else if (list != NULL) /* a zombie, a kernel thread */
        dax_proc_error(-ESRCH, pid, "smaps_rollup");
    Py_XDECREF(list);
    return first;
}

/* Page cache */

static PyStructSequence_Field cache_fields[] = {
    {"cached", "pages in the page cache"},
    {"dirty", "of them not written back yet"},
    {"writeback", "of them being written back"},
    {"evicted", "pages that were cached once"},
    {"recently_evicted", "of them so recently that a read now is a refault"},
    {0},
};
static PyStructSequence_Desc cache_desc = {"native._dax.CacheStat", "Pages of a range, as cachestat(2) says.",
                                           cache_fields, 5};

/* (fd, offset, length) of a call. */
struct part {
    int fd;
    number offset, length;
};

static int read_part(PyObject *args, PyObject *kwargs, const char *format, struct part *part) {
    static char *names[] = {"", "offset", "length", NULL};
    *part = (struct part){0};
    return PyArg_ParseTupleAndKeywords(args, kwargs, format, names, binding_to_fd, &part->fd,
                                       binding_to_number, &part->offset, binding_to_number, &part->length);
}

static PyObject *cachestat_(PyObject *module, PyObject *args, PyObject *kwargs) {
    struct part part;
    struct dax_cache cache;
    int error;
    if (!read_part(args, kwargs, "O&|O&O&:cachestat", &part))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    error = dax_cachestat(part.fd, part.offset, part.length, &cache);
    Py_END_ALLOW_THREADS;
    if (error)
        return dax_os_error(error, NULL);
    const number values[] = {cache.cached, cache.dirty, cache.writeback, cache.evicted,
                             cache.recently_evicted};
    return binding_numbers(((struct state *)PyModule_GetState(module))->cache_type, values, 5);
}

static PyObject *mincore_(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs) {
    struct part part;
    uint64_t cached;
    int error;
    if (!read_part(args, kwargs, "O&|O&O&:mincore", &part))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    error = dax_mincore(part.fd, part.offset, part.length, &cached);
    Py_END_ALLOW_THREADS;
    return error ? dax_os_error(error, NULL) : PyLong_FromUnsignedLongLong(cached);
}

static PyObject *prefetch(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs) {
    struct part part;
    int error;
    if (!read_part(args, kwargs, "O&|O&O&:prefetch", &part))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    error = dax_prefetch(part.fd, part.offset, part.length);
    Py_END_ALLOW_THREADS;
    return error ? dax_os_error(error, NULL) : Py_NewRef(Py_None);
}

static PyObject *populate(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs) {
    struct part part;
    uint64_t bytes;
    int error;
    if (!read_part(args, kwargs, "O&|O&O&:populate", &part))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    error = dax_populate(part.fd, part.offset, part.length, &bytes);
    Py_END_ALLOW_THREADS;
    return error ? dax_os_error(error, NULL) : PyLong_FromUnsignedLongLong(bytes);
}

/* The module */

#define KEYWORDS(function) (PyCFunction)(void (*)(void)) function, METH_VARARGS | METH_KEYWORDS

static PyMethodDef functions[] = {
    {"page_split", dax_page_split, METH_O,
     "page_split(ranges) -> (distinct, [(owner, pages, {holders: pages})])"},
    {"smaps", smaps, METH_VARARGS, "smaps(pid) -> [Mapping]"},
    {"smaps_rollup", smaps_rollup, METH_VARARGS, "smaps_rollup(pid) -> Mapping: the sums of all mappings"},
    {"cachestat", KEYWORDS(cachestat_), "cachestat(fd, offset=0, length=0) -> CacheStat"},
    {"mincore", KEYWORDS(mincore_), "mincore(fd, offset=0, length=0) -> cached pages"},
    {"prefetch", KEYWORDS(prefetch), "prefetch(fd, offset=0, length=0): starts reading and does not wait"},
    {"populate", KEYWORDS(populate), "populate(fd, offset=0, length=0) -> bytes: reads and waits"},
    {0},
};

static int set_up(PyObject *module) {
    struct state *state = PyModule_GetState(module);
    if (binding_tuple(module, &mapping_desc, &state->mapping_type) < 0 ||
        binding_tuple(module, &cache_desc, &state->cache_type) < 0)
        return -1;
    return PyModule_AddIntConstant(module, "PAGE_BYTES", sysconf(_SC_PAGESIZE));
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    struct state *state = PyModule_GetState(module);
    Py_VISIT(state->mapping_type);
    Py_VISIT(state->cache_type);
    return 0;
}

static int clear(PyObject *module) {
    struct state *state = PyModule_GetState(module);
    Py_CLEAR(state->mapping_type);
    Py_CLEAR(state->cache_type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, set_up}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "native._dax",
    .m_doc = "Who holds which physical pages, and what of a file the page cache holds.",
    .m_size = sizeof(struct state),
    .m_methods = functions,
    .m_slots = module_slots,
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__dax(void) {
    return PyModuleDef_Init(&definition);
}
