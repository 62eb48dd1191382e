// One BERT sample from its sentences: which part is A and which is B, truncation, special tokens, and the masking.
//
// Number for number what Megatron-Core's BERT dataset draws from numpy's RandomState(seed + index): pivot, order, truncation
// token by token, a shuffle of the words, an n-gram size for each word tried, and 80 / 10 / 10 for each token.
// The Python twin is engine/data/masking.py.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "topics.h"
#include "twister.h"

namespace py = pybind11;

namespace megactl::native {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

struct Vocabulary {
    int64_t size, cls, sep, mask;
    const uint8_t* continues;  // [size], 1 where a token continues a word; null: every token is a word
};

// A stretch of tokens that is cut from either end.
struct Part {
    const int64_t* tokens;
    int64_t first, last;

    int64_t size() const { return last - first; }
};

void truncate(Part& a, Part& b, int64_t target, Twister& random) {
    while (a.size() + b.size() > target) {
        Part& longer = a.size() > b.size() ? a : b;
        if (random.uniform() < 0.5) {
            ++longer.first;
        } else {
            --longer.last;
        }
    }
}

// The outputs of one sample, each [seq_length] and zero where nothing is written.
struct Out {
    int64_t *tokens, *types, *labels;
    float* loss_mask;
};

int64_t join(const Part& a, const Part& b, const Vocabulary& vocabulary, const Out& out) {
    int64_t length = 0;
    const auto put = [&](int64_t token, int64_t type) {
        out.tokens[length] = token;
        out.types[length++] = type;
    };
    put(vocabulary.cls, 0);
    for (int64_t i = a.first; i < a.last; ++i) put(a.tokens[i], 0);
    put(vocabulary.sep, 0);
    if (b.size() == 0) return length;
    for (int64_t i = b.first; i < b.last; ++i) put(b.tokens[i], 1);
    put(vocabulary.sep, 1);
    return length;
}

// Words as stretches of `positions`, the places that may be masked: word w is positions [begins[w], begins[w + 1]).
struct Words {
    std::vector<int64_t> positions, begins;

    int64_t count() const { return static_cast<int64_t>(begins.size()) - 1; }
    int64_t end(int64_t word, int64_t words) const { return begins[std::min(word + words, count())]; }
};

Words find_words(const int64_t* tokens, int64_t length, const Vocabulary& vocabulary) {
    Words words;
    for (int64_t i = 0; i < length; ++i) {
        if (tokens[i] == vocabulary.cls || tokens[i] == vocabulary.sep) continue;
        const bool continues = vocabulary.continues && vocabulary.continues[tokens[i]] && !words.begins.empty();
        if (!continues) words.begins.push_back(static_cast<int64_t>(words.positions.size()));
        words.positions.push_back(i);
    }
    words.begins.push_back(static_cast<int64_t>(words.positions.size()));
    return words;
}

class Masking {
public:
    Masking(const Words& words, const Vocabulary& vocabulary, const Out& out, Twister& random)
        : words_(words), vocabulary_(vocabulary), out_(out), random_(random) {}

    // `budget`: tokens to mask at most; `sizes`: cumulative probabilities of 1, 2, ... words at a time.
    void run(double budget, const std::vector<double>& sizes) {
        std::vector<int64_t> order(static_cast<size_t>(words_.count()));
        std::iota(order.begin(), order.end(), int64_t{0});
        for (int64_t last = words_.count() - 1; last >= 1; --last) std::swap(order[last], order[random_.at_most(static_cast<uint64_t>(last))]);
        for (const int64_t word : order) {
            if (static_cast<double>(masked_) >= budget) break;
            const int64_t drawn = std::upper_bound(sizes.begin(), sizes.end(), random_.uniform()) - sizes.begin() + 1;
            const int64_t fits = largest_that_fits(word, drawn, budget);
            if (fits && free(word, fits)) mask(words_.begins[word], words_.end(word, fits));
        }
        // A sample without a label teaches nothing: where every word is too long for the budget, one token is taken.
        if (masked_ == 0 && !order.empty()) mask(words_.begins[order[0]], words_.begins[order[0]] + 1);
    }

private:
    int64_t largest_that_fits(int64_t word, int64_t words, double budget) const {
        while (words > 0 && budget < static_cast<double>(masked_ + words_.end(word, words) - words_.begins[word])) --words;
        return words;
    }

    bool free(int64_t word, int64_t words) const {
        for (int64_t k = words_.begins[word]; k < words_.end(word, words); ++k)
            if (out_.loss_mask[words_.positions[k]] != 0) return false;
        return true;
    }

    void mask(int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k, ++masked_) {
            const int64_t place = words_.positions[k];
            out_.labels[place] = out_.tokens[place];
            out_.loss_mask[place] = 1.0f;
            if (random_.uniform() < 0.8) {
                out_.tokens[place] = vocabulary_.mask;
            } else if (random_.uniform() >= 0.5) {
                out_.tokens[place] = static_cast<int64_t>(random_.at_most(static_cast<uint64_t>(vocabulary_.size - 1)));
            }
        }
    }

    const Words& words_;
    const Vocabulary& vocabulary_;
    const Out& out_;
    Twister& random_;
    int64_t masked_ = 0;
};

void check_tokens(const Array<int64_t>& tokens, int64_t vocab_size) {
    if (tokens.ndim() != 1) throw std::invalid_argument("tokens must be 1-D");
    for (int64_t i = 0; i < tokens.size(); ++i)
        if (tokens.data()[i] < 0 || tokens.data()[i] >= vocab_size) throw std::invalid_argument("a token is outside the vocabulary");
}

uint32_t* key_data(Array<uint32_t>& key) {
    if (key.size() != kStateWords) throw std::invalid_argument("key must be [624]");
    return key.mutable_data();
}

// (pivot, flag, sentence elsewhere or -1, position of the generator). `others` 0: the two parts are only ever swapped.
py::tuple plan_pair(Array<uint32_t>& key, uint32_t seed, int64_t sentences, bool pair, int64_t others) {
    if (sentences < (pair ? 2 : 1) || others < 0) throw std::invalid_argument("a pair needs two sentences");
    Twister random = Twister::seeded(key_data(key), seed);
    int64_t pivot = sentences, other = -1;
    bool flag = false;
    if (pair) {
        pivot = sentences >= 3 ? 1 + static_cast<int64_t>(random.at_most(static_cast<uint64_t>(sentences - 2))) : 1;
        flag = random.uniform() < 0.5;
        if (flag && others > 0) other = static_cast<int64_t>(random.uniform() * static_cast<double>(others));
    }
    return py::make_tuple(pivot, flag, other, random.position());
}

int64_t mask_pair(Array<uint32_t>& key, int position, const Array<int64_t>& a, const Array<int64_t>& b, int64_t target,
                  const Array<int64_t>& special, const Array<uint8_t>& continues, double probability, const Array<double>& sizes,
                  Array<int64_t>& out, Array<float>& loss_mask) {
    if (special.size() != 4) throw std::invalid_argument("special must be vocabulary size, [CLS], [SEP], [MASK]");
    const int64_t* ids = special.data();
    const Vocabulary vocabulary{ids[0], ids[1], ids[2], ids[3], continues.size() ? continues.data() : nullptr};
    if (vocabulary.size < 1 || (continues.size() && continues.size() != vocabulary.size)) throw std::invalid_argument("continues must be [vocab_size]");
    if (out.ndim() != 2 || out.shape(0) != 3 || loss_mask.ndim() != 1 || loss_mask.size() != out.shape(1))
        throw std::invalid_argument("out must be [3, seq_length] and loss_mask [seq_length]");
    if (target < 2 || target + 3 > out.shape(1) || position < 0 || position > kStateWords) throw std::invalid_argument("target or position");
    check_tokens(a, vocabulary.size);
    check_tokens(b, vocabulary.size);
    const int64_t width = out.shape(1);
    int64_t* rows = out.mutable_data();
    std::fill(rows, rows + 3 * width, int64_t{0});
    std::fill(loss_mask.mutable_data(), loss_mask.mutable_data() + width, 0.0f);
    const Out places{rows, rows + width, rows + 2 * width, loss_mask.mutable_data()};
    Twister random(key_data(key), position);
    Part first{a.data(), 0, a.size()}, second{b.data(), 0, b.size()};
    truncate(first, second, target, random);
    const int64_t length = join(first, second, vocabulary, places);
    const Words words = find_words(places.tokens, length, vocabulary);
    // Rounded half to even, as Python rounds.
    const double share = std::max(1.0, std::nearbyint(static_cast<double>(length) * probability));
    Masking(words, vocabulary, places, random).run(std::max(1.0, std::min(probability * static_cast<double>(target), share)),
                                                     {sizes.data(), sizes.data() + sizes.size()});
    return length;
}

}  // namespace

void register_masked_sample(py::module_& module) {
    module.def("plan_pair", &plan_pair, py::arg("key").noconvert(), py::arg("seed"), py::arg("sentences"), py::arg("pair"), py::arg("others"),
               "Seed key (uint32 [624]) and draw (pivot, flag, sentence elsewhere or -1); the last value is the generator's position.");
    module.def("mask_pair", &mask_pair, py::arg("key").noconvert(), py::arg("position"), py::arg("a").noconvert(), py::arg("b").noconvert(),
               py::arg("target"), py::arg("special").noconvert(), py::arg("continues").noconvert(), py::arg("probability"), py::arg("sizes").noconvert(),
               py::arg("out").noconvert(), py::arg("loss_mask").noconvert(),
               "Join, truncate and mask two parts: fills out [3, s] (tokens, types, labels) and loss_mask [s]; returns the length.");
}

}  // namespace megactl::native
