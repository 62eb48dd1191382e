// Which sentences make up each BERT sample: consecutive sentences of one document, up to a target length.
//
// A row is (first sentence, sentence behind the last, target length in tokens). Source: Megatron's build_mapping; its two
// generators are std::mt19937 and std::mt19937_64, whose numbers the C++ standard fixes.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "topics.h"

namespace py = pybind11;

namespace megactl::native {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

struct Rules {
    int64_t num_samples;
    int64_t max_length;     // tokens of a sample, without its special tokens
    int64_t short_ratio;    // every so many samples are shorter; 0: none
    uint64_t seed;
    int64_t min_sentences;
    int32_t long_sentence;  // documents with a longer sentence are left out
};

template <typename T>
struct Row {
    T first, last, target;
};

// Target lengths, drawn only where some are to be short.
class Targets {
public:
    explicit Targets(const Rules& rules) : rules_(rules), random_(static_cast<uint32_t>(rules.seed)) {}

    int64_t next() {
        if (rules_.short_ratio == 0) return rules_.max_length;
        const auto number = static_cast<int64_t>(random_());
        return number % rules_.short_ratio == 0 ? 2 + number % (rules_.max_length - 1) : rules_.max_length;
    }

private:
    const Rules& rules_;
    std::mt19937 random_;
};

// Documents that give samples. One sentence alone may be long: it has no partner to be cut beside (Megatron's rule).
std::vector<int64_t> usable_documents(const int64_t* documents, int64_t count, const int32_t* lengths, const Rules& rules) {
    std::vector<int64_t> usable;
    for (int64_t document = 0; document < count; ++document) {
        const int64_t first = documents[document], last = documents[document + 1];
        if (last - first < rules.min_sentences || last == first) continue;
        const bool has_long = last - first > 1 && *std::max_element(lengths + first, lengths + last) > rules.long_sentence;
        if (!has_long) usable.push_back(document);
    }
    return usable;
}

template <typename T>
void add_document(int64_t first, int64_t last, const int32_t* lengths, const Rules& rules, Targets& targets, std::vector<Row<T>>& rows) {
    int64_t start = first, length = 0, target = targets.next();
    for (int64_t sentence = first; sentence < last; ++sentence) {
        length += lengths[sentence];
        const int64_t left = last - sentence - 1;
        const bool full = length >= target && left > 1 && sentence + 1 - start >= rules.min_sentences;
        if (!full && left != 0) continue;
        rows.push_back({static_cast<T>(start), static_cast<T>(sentence + 1), static_cast<T>(target)});
        // Also behind a document's last sample, where nothing reads it: the stream depends on it.
        target = targets.next();
        start = sentence + 1;
        length = 0;
    }
}

// Whole epochs until there are enough samples; none where no document gives one.
template <typename T>
std::vector<Row<T>> all_rows(const int64_t* documents, int64_t count, const int32_t* lengths, const Rules& rules) {
    const std::vector<int64_t> usable = usable_documents(documents, count, lengths, rules);
    std::vector<Row<T>> rows;
    Targets targets(rules);
    while (!usable.empty() && static_cast<int64_t>(rows.size()) < rules.num_samples)
        for (const int64_t document : usable) add_document(documents[document], documents[document + 1], lengths, rules, targets, rows);
    return rows;
}

// Targets of a block of swaps are drawn ahead and prefetched, as in shuffle.cpp.
template <typename T>
void shuffle(std::vector<Row<T>>& rows, uint64_t seed) {
    constexpr int64_t kBlock = 1024;
    int64_t targets[kBlock];
    std::mt19937_64 random(seed);
    for (int64_t last = static_cast<int64_t>(rows.size()) - 1; last >= 1;) {
        const int64_t steps = std::min(kBlock, last);
        for (int64_t k = 0; k < steps; ++k) {
            targets[k] = static_cast<int64_t>(random() % static_cast<uint64_t>(last - k + 1));
            __builtin_prefetch(rows.data() + targets[k], 1);
        }
        for (int64_t k = 0; k < steps; ++k) std::swap(rows[last - k], rows[targets[k]]);
        last -= steps;
    }
}

template <typename T>
py::array build_typed(const int64_t* documents, int64_t count, const int32_t* lengths, const Rules& rules) {
    auto* rows = new std::vector<Row<T>>();
    py::capsule owner(rows, [](void* memory) { delete static_cast<std::vector<Row<T>>*>(memory); });
    {
        py::gil_scoped_release release;
        *rows = all_rows<T>(documents, count, lengths, rules);
        shuffle(*rows, rules.seed + 1);
    }
    static_assert(sizeof(Row<T>) == 3 * sizeof(T), "rows lie as an array [samples, 3]");
    return py::array_t<T>({static_cast<py::ssize_t>(rows->size()), py::ssize_t{3}}, reinterpret_cast<const T*>(rows->data()), owner);
}

py::array build(const Array<int64_t>& documents, const Array<int32_t>& lengths, int64_t num_samples, int64_t max_length, int64_t short_ratio,
                uint64_t seed, int64_t min_sentences, int32_t long_sentence, bool wide) {
    if (documents.ndim() != 1 || lengths.ndim() != 1 || documents.size() < 1) throw std::invalid_argument("documents and lengths must be 1-D");
    if (max_length < 2 || short_ratio < 0 || min_sentences < 1) throw std::invalid_argument("max_length >= 2, short_ratio >= 0, min_sentences >= 1");
    const int64_t* bounds = documents.data();
    const int64_t count = documents.size() - 1;
    if (bounds[0] < 0 || bounds[count] > lengths.size() || !std::is_sorted(bounds, bounds + count + 1))
        throw std::invalid_argument("documents names a sentence that does not exist");
    const Rules rules{num_samples, max_length, short_ratio, seed, min_sentences, long_sentence};
    return wide ? build_typed<uint64_t>(bounds, count, lengths.data(), rules) : build_typed<uint32_t>(bounds, count, lengths.data(), rules);
}

}  // namespace

void register_sentence_pairs(py::module_& module) {
    module.def("build_sentence_samples", &build, py::arg("documents").noconvert(), py::arg("lengths").noconvert(), py::arg("num_samples"),
               py::arg("max_length"), py::arg("short_ratio"), py::arg("seed"), py::arg("min_sentences"), py::arg("long_sentence"), py::arg("wide"),
               "Rows [samples, 3] of (first sentence, sentence behind the last, target length), shuffled; uint64 where wide, else uint32.");
}

}  // namespace megactl::native
