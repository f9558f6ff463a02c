/* What both bindings use of the limited API: memory of heap types, named tuples, module state. */
#ifndef SANDLOOM_BINDING_H
#define SANDLOOM_BINDING_H

#include <Python.h>

#include <stdint.h>
#include <structmember.h>

typedef unsigned long long number;

/* The end of a heap type's tp_dealloc: frees the object and lets go of its type. */
static inline void binding_release(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_object(self);
    Py_DECREF(type);
}

/* A zeroed object of a heap type; a new reference, or NULL with an error set. */
static inline void *binding_alloc(PyTypeObject *type) {
    return ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
}

/* For "O&": an unsigned number that fits in 64 bits; OverflowError or TypeError for any other object. */
static inline int binding_to_number(PyObject *object, void *into) {
    number value = PyLong_AsUnsignedLongLong(object);
    if (value == (number)-1 && PyErr_Occurred())
        return 0;
    *(number *)into = value;
    return 1;
}

/* For "O&": a descriptor, of an int or an object with fileno(). */
static inline int binding_to_fd(PyObject *object, void *into) {
    *(int *)into = PyObject_AsFileDescriptor(object);
    return *(int *)into >= 0;
}

/* Puts `value` (stolen, NULL when making it failed) into a new named tuple. -1 with an error set. */
static inline int binding_put(PyObject *tuple, Py_ssize_t at, PyObject *value) {
    if (value == NULL)
        return -1;
    PyStructSequence_SetItem(tuple, at, value);
    return 0;
}

/* A named tuple of numbers; a new reference. */
static inline PyObject *binding_numbers(PyTypeObject *type, const number *values, Py_ssize_t count) {
    PyObject *made = PyStructSequence_New(type);
    for (Py_ssize_t i = 0; made != NULL && i < count; i++)
        if (binding_put(made, i, PyLong_FromUnsignedLongLong(values[i])) < 0)
            Py_CLEAR(made);
    return made;
}

/* object.name = value. -1 with an error set. */
static inline int binding_set(PyObject *object, const char *name, number value) {
    PyObject *boxed = PyLong_FromUnsignedLongLong(value);
    int result = boxed == NULL ? -1 : PyObject_SetAttrString(object, name, boxed);
    Py_XDECREF(boxed);
    return result;
}

/* Makes a heap type of the module, keeps it in *slot and under its name in the module. */
static inline int binding_type(PyObject *module, PyType_Spec *spec, PyTypeObject **slot) {
    *slot = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *slot == NULL ? -1 : PyModule_AddType(module, *slot);
}

/* The same for a named tuple. */
static inline int binding_tuple(PyObject *module, PyStructSequence_Desc *desc, PyTypeObject **slot) {
    *slot = PyStructSequence_NewType(desc);
    return *slot == NULL ? -1 : PyModule_AddType(module, *slot);
}

#endif
