// The importable module. Importing it runs the registrations of the other files in this folder; it holds nothing itself.
#include <Python.h>

PyMODINIT_FUNC PyInit__ops() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_ops", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&definition);
}
