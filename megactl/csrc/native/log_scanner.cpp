// The log scanner for Python: fed with buffers while other threads run, emptied batch by batch into bytes that fit array.array.
#include "log_scanner.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "topics.h"

namespace py = pybind11;

namespace megactl::native {
namespace {

using AnchorTuple = std::tuple<std::string, uint64_t, uint32_t, std::string>;

template <typename T>
py::bytes as_bytes(const std::vector<T>& column) {
    return py::bytes(reinterpret_cast<const char*>(column.data()), column.size() * sizeof(T));
}

py::str decoded(const std::string& text) {
    PyObject* result = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(result);
}

LogScanner* make_scanner(const std::vector<AnchorTuple>& table, const std::string& common, size_t cap,
                         std::optional<std::vector<std::string>> timers) {
    if (cap == 0) throw std::invalid_argument("cap = 0: must be at least 1 byte");
    std::vector<Anchor> anchors;
    for (const auto& [text, kinds, follow, until] : table) anchors.push_back({text, kinds, follow, until});
    return new LogScanner(std::move(anchors), common, cap, std::move(timers));
}

size_t feed(LogScanner& scanner, const py::buffer& buffer, size_t size) {
    const py::buffer_info info = buffer.request();
    if (info.itemsize != 1 || info.ndim != 1 || info.strides[0] != 1) throw std::invalid_argument("feed: needs contiguous bytes");
    if (size > static_cast<size_t>(info.size)) throw std::invalid_argument("feed: size is beyond the buffer");
    {
        py::gil_scoped_release release;
        scanner.feed(static_cast<const char*>(info.ptr), size);
    }
    return scanner.pending();
}

void finish(LogScanner& scanner) {
    py::gil_scoped_release release;
    scanner.finish();
}

py::list losses_of(const LogScanner& scanner, const IterationColumns& rows) {
    py::list losses;
    const auto& names = scanner.loss_names();
    for (size_t i = 0; i < names.size() && !rows.iteration.empty(); ++i) losses.append(py::make_tuple(decoded(names[i]), as_bytes(rows.losses[i])));
    return losses;
}

// (iteration, total, line, interrupted, [values], [(loss, values)], [(line, kinds, text)], [(timer, lines, milliseconds)])
py::tuple take(LogScanner& scanner) {
    const IterationColumns& rows = scanner.rows();
    py::list values, notes, timers;
    for (const auto& column : rows.values) values.append(as_bytes(column));
    for (const Note& note : scanner.notes()) notes.append(py::make_tuple(note.line, note.kinds, decoded(note.text)));
    for (const Timer& timer : scanner.timers().all())
        if (!timer.lines.empty()) timers.append(py::make_tuple(decoded(timer.name), as_bytes(timer.lines), as_bytes(timer.milliseconds)));
    py::tuple batch = py::make_tuple(as_bytes(rows.iteration), as_bytes(rows.total), as_bytes(rows.line), as_bytes(rows.interrupted), values,
                                     losses_of(scanner, rows), notes, timers);
    scanner.clear();
    return batch;
}

}  // namespace

void register_log_scanner(py::module_& module) {
    py::class_<LogScanner>(module, "LogScanner", "Finds iterations, timers and lines with an anchor in a log; see megactl/report/logs.")
        .def(py::init(&make_scanner), py::arg("anchors"), py::arg("common"), py::arg("cap"), py::arg("timers") = py::none(),
             "anchors: (text, kinds, lines to follow, until); common: text to tell them from quickly; cap: bytes of a line; timers: to keep")
        .def("feed", &feed, py::arg("data"), py::arg("size"), "Scan the first `size` bytes; returns how many values wait to be taken.")
        .def("finish", &finish, "The input is over.")
        .def("take", &take, "What was found since the last call.")
        .def_property_readonly("saw_own_line", &LogScanner::saw_own_line)
        .def_property_readonly("duplicates", &LogScanner::duplicates)
        .def_property_readonly("line", &LogScanner::line);
}

}  // namespace megactl::native
