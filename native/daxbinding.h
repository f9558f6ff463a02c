/* What the two halves of native._dax share. */
#ifndef SANDLOOM_DAXBINDING_H
#define SANDLOOM_DAXBINDING_H

#include "binding.h"

/* Sets OSError (the subclass that fits) for `error`, a negated errno, about `path`, which may be NULL.
 * Returns NULL. */
PyObject *dax_os_error(int error, const char *path);

/* The same about /proc/`pid`/`name`; MemoryError for -ENOMEM. Returns NULL. */
PyObject *dax_proc_error(int error, int pid, const char *name);

PyObject *dax_page_split(PyObject *module, PyObject *ranges);

#endif
