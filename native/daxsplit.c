/* page_split of native._dax. _dax.pyi is its documentation. */
#include "daxbinding.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "dax.h"

/* The owner's place in `owners`, a dict {owner: index} and a list; made when it is new. -1 with an error set.
 */
static long owner_index(PyObject *owner, PyObject *indexes, PyObject *owners) {
    PyObject *known = PyDict_GetItemWithError(indexes, owner);
    if (known != NULL)
        return PyLong_AsLong(known);
    Py_ssize_t index = PyList_Size(owners);
    if (PyErr_Occurred())
        return -1;
    if (index >= (Py_ssize_t)DAX_OWNERS_MOST) {
        PyErr_Format(PyExc_ValueError, "more than %u owners: split them in two calls", DAX_OWNERS_MOST);
        return -1;
    }
    PyObject *boxed = PyLong_FromSsize_t(index);
    int failed =
        boxed == NULL || PyDict_SetItem(indexes, owner, boxed) < 0 || PyList_Append(owners, owner) < 0;
    Py_XDECREF(boxed);
    return failed ? -1 : (long)index;
}

static int read_range(PyObject *item, PyObject *indexes, PyObject *owners, struct dax_range *range) {
    PyObject *owner;
    number start, end, page = (number)sysconf(_SC_PAGESIZE);
    int pid;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "a range is a tuple (owner, pid, start, end)");
        return -1;
    }
    if (!PyArg_ParseTuple(item, "OiO&O&:range", &owner, &pid, binding_to_number, &start, binding_to_number,
                          &end))
        return -1;
    if (pid <= 0 || start > end || start % page || end % page) {
        PyErr_Format(PyExc_ValueError,
                     "range %llu to %llu of process %d: give a process id and whole pages in order", start,
                     end, pid);
        return -1;
    }
    long index = owner_index(owner, indexes, owners);
    *range = (struct dax_range){(uint32_t)index, pid, start / page, end / page};
    return index < 0 ? -1 : 0;
}

/* All ranges; NULL with an error set. Free with PyMem_Free. */
static struct dax_range *read_ranges(PyObject *given, PyObject *indexes, PyObject *owners,
                                     Py_ssize_t *count) {
    PyObject *list = PySequence_Tuple(given);
    if (list == NULL)
        return NULL;
    *count = PyTuple_Size(list);
    struct dax_range *ranges = PyMem_Calloc((size_t)*count + 1, sizeof *ranges);
    if (ranges == NULL)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; ranges != NULL && i < *count; i++)
        if (read_range(PyTuple_GetItem(list, i), indexes, owners, &ranges[i]) < 0) {
            PyMem_Free(ranges);
            ranges = NULL;
        }
    Py_DECREF(list);
    return ranges;
}

/* (owner, pages, {holders: pages}) of one row of counts. */
static PyObject *split_row(PyObject *owner, const uint64_t *row, size_t width) {
    PyObject *holders = PyDict_New();
    number pages = 0;
    for (size_t n = 1; holders != NULL && n < width; n++) {
        if (row[n] == 0)
            continue;
        PyObject *key = PyLong_FromSize_t(n), *value = PyLong_FromUnsignedLongLong(row[n]);
        if (key == NULL || value == NULL || PyDict_SetItem(holders, key, value) < 0)
            Py_CLEAR(holders);
        Py_XDECREF(key);
        Py_XDECREF(value);
        pages += row[n];
    }
    return holders == NULL ? NULL : Py_BuildValue("(OKN)", owner, pages, holders);
}

static PyObject *split_result(const struct dax_split *split, const uint64_t *counts, PyObject *owners) {
    Py_ssize_t count = PyList_Size(owners);
    PyObject *rows = PyList_New(count);
    for (Py_ssize_t i = 0; rows != NULL && i < count; i++) {
        size_t width = (size_t)count + 1;
        PyObject *row = split_row(PyList_GetItem(owners, i), counts + (size_t)i * width, width);
        if (row == NULL || PyList_SetItem(rows, i, row) < 0)
            Py_CLEAR(rows);
    }
    return rows == NULL ? NULL : Py_BuildValue("(KN)", (number)dax_split_distinct(split), rows);
}

/* Walks without the GIL. */
static PyObject *split_ranges(struct dax_range *ranges, size_t count, PyObject *owners) {
    size_t width = (size_t)PyList_Size(owners);
    struct dax_source source;
    pid_t culprit = 0;
    int error = dax_proc_open(&source);
    if (error)
        return dax_os_error(error, "/proc/kpageflags");
    struct dax_split *split = dax_split_new((uint32_t)width);
    uint64_t *counts = calloc(width * (width + 1) + 1, sizeof *counts);
    error = split == NULL || counts == NULL ? -ENOMEM : 0;
    if (!error) {
        Py_BEGIN_ALLOW_THREADS;
        error = dax_split_walk(split, ranges, count, &source, &culprit);
        if (!error)
            dax_split_counts(split, counts);
        Py_END_ALLOW_THREADS;
    }
    dax_proc_close(&source);
    PyObject *result =
        error ? dax_proc_error(error, culprit, "pagemap") : split_result(split, counts, owners);
    free(counts);
    dax_split_free(split);
    return result;
}

PyObject *dax_page_split(PyObject *Py_UNUSED(module), PyObject *given) {
    PyObject *indexes = PyDict_New(), *owners = PyList_New(0), *result = NULL;
    Py_ssize_t count = 0;
    if (indexes != NULL && owners != NULL) {
        struct dax_range *ranges = read_ranges(given, indexes, owners, &count);
        result = ranges == NULL ? NULL : split_ranges(ranges, (size_t)count, owners);
        PyMem_Free(ranges);
    }
    Py_XDECREF(indexes);
    Py_XDECREF(owners);
    return result;
}
