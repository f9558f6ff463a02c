/* native._balloon: a thin binding of src/balloon.c. _balloon.pyi is its documentation. */
#include "balloontypes.h"

#include <fcntl.h>
#include <string.h>

#define PIECE_BYTES (64ull << 20) /* one fallocate of 4 KiB pages is in the kernel for some 20 ms then */

static int raw_fallocate(int fd, int mode, int64_t offset, int64_t length) {
    return fallocate(fd, mode, offset, length);
}

/* Descriptors for every file of the plan; NULL with an error set. Free with PyMem_Free. */
static int *read_fds(PyObject *given, uint32_t files) {
    PyObject *list = PySequence_Tuple(given);
    if (list == NULL)
        return NULL;
    Py_ssize_t count = PyTuple_Size(list);
    int *fds = NULL;
    if ((uint64_t)count < files) {
        PyErr_Format(PyExc_ValueError, "the plan names %u files, %zd descriptors were given", files, count);
        goto out;
    }
    fds = PyMem_Calloc((size_t)count + 1, sizeof *fds);
    if (fds == NULL) {
        PyErr_NoMemory();
        goto out;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        fds[i] = PyObject_AsFileDescriptor(PyTuple_GetItem(list, i));
        if (fds[i] < 0) {
            PyMem_Free(fds);
            fds = NULL;
            goto out;
        }
    }
out:
    Py_DECREF(list);
    return fds;
}

static PyObject *raise_partial(struct state *state, const char *verb,
                               const struct balloon_progress *progress) {
    PyObject *text = PyUnicode_FromFormat("%s: %s of %llu bytes at %llu of file %u failed after %llu bytes "
                                          "in %llu calls: give this file's descriptor"
                                          " open for writing, of a file that is not sealed",
                                          strerror(progress->error), verb, (number)progress->length,
                                          (number)progress->offset, progress->file, (number)progress->bytes,
                                          (number)progress->calls);
    PyObject *error =
        text == NULL ? NULL : PyObject_CallFunction(state->partial_error, "iO", progress->error, text);
    Py_XDECREF(text);
    if (error != NULL && binding_set(error, "done_bytes", progress->bytes) == 0 &&
        binding_set(error, "calls", progress->calls) == 0 &&
        binding_set(error, "file", progress->file) == 0 &&
        binding_set(error, "offset", progress->offset) == 0 &&
        binding_set(error, "length", progress->length) == 0)
        PyErr_SetObject(state->partial_error, error);
    Py_XDECREF(error);
    return NULL;
}

static PyObject *apply(PyObject *module, PyObject *args, PyObject *kwargs, const char *format,
                       enum balloon_action action, const char *verb) {
    static char *names[] = {"", "", "piece_bytes", NULL};
    struct state *state = PyModule_GetState(module);
    PyObject *plan_given, *fds_given;
    number piece = PIECE_BYTES;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, state->plan_type, &plan_given, &fds_given,
                                     binding_to_number, &piece))
        return NULL;
    if (piece < BALLOON_PAGE || piece % BALLOON_PAGE)
        return PyErr_Format(PyExc_ValueError, "piece_bytes is %llu: it must be a multiple of 4096", piece);
    const struct balloon_plan *plan = &((struct plan_object *)plan_given)->plan;
    int *fds = read_fds(fds_given, plan->files);
    if (fds == NULL)
        return NULL;
    struct balloon_progress progress;
    Py_BEGIN_ALLOW_THREADS;
    balloon_apply(plan, fds, action, piece, raw_fallocate, &progress);
    Py_END_ALLOW_THREADS;
    PyMem_Free(fds);
    if (progress.error)
        return raise_partial(state, verb, &progress);
    const number values[] = {progress.bytes, progress.calls};
    return binding_numbers(state->done_type, values, 2);
}

static PyObject *punch(PyObject *module, PyObject *args, PyObject *kwargs) {
    return apply(module, args, kwargs, "O!O|O&:punch", BALLOON_PUNCH, "punching");
}

static PyObject *populate(PyObject *module, PyObject *args, PyObject *kwargs) {
    return apply(module, args, kwargs, "O!O|O&:populate", BALLOON_POPULATE, "populating");
}

static PyMethodDef functions[] = {
    {"punch", (PyCFunction)(void (*)(void))punch, METH_VARARGS | METH_KEYWORDS,
     "punch(plan, fds, piece_bytes=64 MiB) -> Done"},
    {"populate", (PyCFunction)(void (*)(void))populate, METH_VARARGS | METH_KEYWORDS,
     "populate(plan, fds, piece_bytes=64 MiB) -> Done"},
    {0},
};

static PyStructSequence_Field refused_fields[] = {
    {"empty", "count 0"},
    {"wrapping", "the end does not fit in 64 bits"},
    {"outside", "some byte of it belongs to no region"},
    {0},
};
static PyStructSequence_Desc refused_desc = {"native._balloon.Refused", "Runs refused whole, by reason.",
                                             refused_fields, 3};
static PyStructSequence_Field done_fields[] = {
    {"bytes", "all of the plan"}, {"calls", "of fallocate(2)"}, {0}};
static PyStructSequence_Desc done_desc = {"native._balloon.Done", "What it took.", done_fields, 2};

static int set_up(PyObject *module) {
    struct state *state = PyModule_GetState(module);
    if (binding_type(module, &balloon_map_spec, &state->map_type) < 0 ||
        binding_type(module, &balloon_plan_spec, &state->plan_type) < 0 ||
        binding_tuple(module, &refused_desc, &state->refused_type) < 0 ||
        binding_tuple(module, &done_desc, &state->done_type) < 0)
        return -1;
    state->partial_error = PyErr_NewExceptionWithDoc(
        "native._balloon.PartialError",
        "A call failed: what is before it is done, nothing after it was tried.", PyExc_OSError, NULL);
    return state->partial_error == NULL ? -1
                                        : PyModule_AddObjectRef(module, "PartialError", state->partial_error);
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    struct state *state = PyModule_GetState(module);
    Py_VISIT(state->map_type);
    Py_VISIT(state->plan_type);
    Py_VISIT(state->refused_type);
    Py_VISIT(state->done_type);
    Py_VISIT(state->partial_error);
    return 0;
}

static int clear(PyObject *module) {
    struct state *state = PyModule_GetState(module);
    Py_CLEAR(state->map_type);
    Py_CLEAR(state->plan_type);
    Py_CLEAR(state->refused_type);
    Py_CLEAR(state->done_type);
    Py_CLEAR(state->partial_error);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, set_up}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "native._balloon",
    .m_doc = "Guest frames in, holes in memory files out: the host half of the balloon.",
    .m_size = sizeof(struct state),
    .m_methods = functions,
    .m_slots = module_slots,
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__balloon(void) {
    return PyModuleDef_Init(&definition);
}
