// Where each training sample starts: a walk over the shuffled documents, one row every seq_length tokens.
//
// A row is (position in the document order, token offset in that document). Sample i is the tokens from row i up to and
// including the token at row i+1, so neighbours share one token: the last label of one is the first input of the next.
#include <pybind11/numpy.h>

#include <cstdint>
#include <stdexcept>

#include "topics.h"

namespace py = pybind11;

namespace megactl::native {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Documents are visited in random order, so their lengths are prefetched some steps ahead.
template <typename Document, typename Row>
bool fill_rows(const int32_t* lengths, const Document* order, int64_t order_size, Row* rows, int64_t row_count, int64_t seq_length) {
    constexpr int64_t kAhead = 32;
    rows[0] = rows[1] = 0;
    int64_t row = 1;
    int64_t start = 0;             // global position of the document's first token
    int64_t wanted = seq_length;   // global position of the next row's token
    for (int64_t position = 0; position < order_size && row < row_count; ++position) {
        if (position + kAhead < order_size) __builtin_prefetch(lengths + order[position + kAhead]);
        const int64_t end = start + lengths[order[position]];
        for (; wanted < end && row < row_count; ++row, wanted += seq_length) {
            rows[2 * row] = static_cast<Row>(position);
            rows[2 * row + 1] = static_cast<Row>(wanted - start);
        }
        start = end;
    }
    return row == row_count;
}

template <typename Document>
bool in_range(const Document* order, int64_t order_size, int64_t documents) {
    uint64_t largest = 0;  // a negative id becomes a huge one, so one comparison covers both ends
    for (int64_t i = 0; i < order_size; ++i) {
        const auto id = static_cast<uint64_t>(static_cast<int64_t>(order[i]));
        largest = id > largest ? id : largest;
    }
    return order_size == 0 || largest < static_cast<uint64_t>(documents);
}

template <typename Document, typename Row>
void build(const Array<int32_t>& lengths, const Array<Document>& order, Array<Row>& rows, int64_t seq_length) {
    if (rows.ndim() != 2 || rows.shape(1) != 2 || rows.shape(0) < 1) throw std::invalid_argument("rows must have shape [samples + 1, 2]");
    if (lengths.ndim() != 1 || order.ndim() != 1) throw std::invalid_argument("lengths and order must be 1-D");
    if (seq_length < 1) throw std::invalid_argument("seq_length must be at least 1");
    const int32_t* length_data = lengths.data();
    const Document* order_data = order.data();
    Row* row_data = rows.mutable_data();
    const int64_t order_size = order.size(), documents = lengths.size(), row_count = rows.shape(0);
    bool valid = true, complete = true;
    {
        py::gil_scoped_release release;
        valid = in_range(order_data, order_size, documents);
        complete = valid && fill_rows(length_data, order_data, order_size, row_data, row_count, seq_length);
    }
    if (!valid) throw std::invalid_argument("order names a document that does not exist");
    if (!complete) throw std::invalid_argument("the documents hold too few tokens for this many rows");
}

template <typename Document, typename Row>
void define(py::module_& module) {
    module.def("build_sample_index", &build<Document, Row>, py::arg("lengths").noconvert(), py::arg("order").noconvert(),
               py::arg("rows").noconvert(), py::arg("seq_length"),
               "Fill rows [samples + 1, 2] with (position in order, token offset) of every seq_length-th token.");
}

}  // namespace

void register_sample_index(py::module_& module) {
    define<int32_t, int32_t>(module);
    define<int32_t, int64_t>(module);
    define<int64_t, int32_t>(module);
    define<int64_t, int64_t>(module);
}

}  // namespace megactl::native
