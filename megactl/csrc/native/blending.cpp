// Which dataset of a blend each sample comes from: always the one furthest behind its share so far.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "topics.h"

namespace py = pybind11;

namespace megactl::native {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// One dataset of the blend while the samples are dealt out.
struct Share {
    double weight;
    int64_t limit;  // samples it may give in all
    int64_t given;
};

// Ties go to the first dataset. The sample number counts from 1 at the start, so that the first choice follows the weights.
int64_t furthest_behind(const std::vector<Share>& shares, int64_t sample) {
    const double progress = std::max(static_cast<double>(sample), 1.0);
    int64_t best = -1;
    double largest = -std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < shares.size(); ++i) {
        if (shares[i].given >= shares[i].limit) continue;
        // Built without fused multiply-add (setup.py): it rounds once instead of twice, and could flip a tie between machines.
        const double behind = shares[i].weight * progress - static_cast<double>(shares[i].given);
        if (behind > largest) {
            largest = behind;
            best = static_cast<int64_t>(i);
        }
    }
    return best;
}

bool deal(std::vector<Share>& shares, int16_t* datasets, int64_t* samples, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t chosen = furthest_behind(shares, i);
        if (chosen < 0) return false;
        datasets[i] = static_cast<int16_t>(chosen);
        samples[i] = shares[chosen].given++;
    }
    return true;
}

void build(std::vector<Share> shares, Array<int16_t>& datasets, Array<int64_t>& samples) {
    if (datasets.ndim() != 1 || samples.ndim() != 1 || datasets.size() != samples.size())
        throw std::invalid_argument("datasets and samples must be 1-D and of one length");
    if (shares.size() > static_cast<size_t>(std::numeric_limits<int16_t>::max())) throw std::invalid_argument("more than 32767 datasets");
    int16_t* dataset_data = datasets.mutable_data();
    int64_t* sample_data = samples.mutable_data();
    const int64_t count = datasets.size();
    bool complete;
    {
        py::gil_scoped_release release;
        complete = deal(shares, dataset_data, sample_data, count);
    }
    if (!complete) throw std::invalid_argument("the datasets hold too few samples");
}

void build_weighted(const Array<double>& weights, Array<int16_t>& datasets, Array<int64_t>& samples) {
    std::vector<Share> shares;
    for (int64_t i = 0; i < weights.size(); ++i) shares.push_back({weights.data()[i], kUnlimited, 0});
    build(std::move(shares), datasets, samples);
}

void build_exhaustive(const Array<int64_t>& sizes, Array<int16_t>& datasets, Array<int64_t>& samples) {
    int64_t total = 0;
    for (int64_t i = 0; i < sizes.size(); ++i) total += sizes.data()[i];
    std::vector<Share> shares;
    for (int64_t i = 0; i < sizes.size(); ++i) shares.push_back({static_cast<double>(sizes.data()[i]) / static_cast<double>(total), sizes.data()[i], 0});
    build(std::move(shares), datasets, samples);
}

}  // namespace

void register_blending(py::module_& module) {
    module.def("build_blending", &build_weighted, py::arg("weights").noconvert(), py::arg("datasets").noconvert(), py::arg("samples").noconvert(),
               "Deal samples over datasets by weight (weights sum to 1): fills datasets (int16) and samples (int64).");
    module.def("build_exhaustive_blending", &build_exhaustive, py::arg("sizes").noconvert(), py::arg("datasets").noconvert(),
               py::arg("samples").noconvert(), "As build_blending with weights in proportion to sizes; no dataset gives more than it has.");
}

}  // namespace megactl::native
