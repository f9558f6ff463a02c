/* The two types of native._balloon and the module's state. */
#ifndef SANDLOOM_BALLOONTYPES_H
#define SANDLOOM_BALLOONTYPES_H

#include "binding.h"

#include "balloon.h"

struct state {
    PyTypeObject *map_type;
    PyTypeObject *plan_type;
    PyTypeObject *refused_type;
    PyTypeObject *done_type;
    PyObject *partial_error;
};

struct map_object {
    PyObject_HEAD struct balloon_map map;
};

struct plan_object {
    PyObject_HEAD struct balloon_plan plan;
};

extern PyType_Spec balloon_map_spec;
extern PyType_Spec balloon_plan_spec;

#endif
