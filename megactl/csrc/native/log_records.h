// Reads the numbers out of the lines that a training run repeats: iteration lines and timers. No pybind11, no state but columns.
//
// Formats: Megatron-LM 2019 to 2026 and its forks, see docs/logs.md. The Python twin is megactl/report/logs/python_records.py.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "log_text.h"

namespace megactl::native {

// In the order of VALUE_COLUMNS in megactl/report/logs/records.py.
enum Column : int {
    kSeconds,
    kLearningRate,
    kGradNorm,
    kLossScale,
    kGlobalBatch,
    kConsumedSamples,
    kTflops,
    kSkipped,
    kNan,
    kSamplesPerSecond,
    kParamsNorm,
    kNumZeros,
    kColumns
};

constexpr int kMilliseconds = kColumns;  // a column code: seconds, printed in ms
constexpr int kOwnMark = kColumns + 1;   // a field that only megactl's own line has
constexpr int kIgnored = -1;
constexpr int kFirstLoss = 100;  // column codes from here on are losses
constexpr size_t kMostLosses = 32;
constexpr size_t kMostTimers = 256;
constexpr size_t kLongestKey = 64;
constexpr size_t kRecent = 8;

struct IterationColumns {
    std::vector<int64_t> iteration, total, line;
    std::vector<int8_t> interrupted;
    std::array<std::vector<double>, kColumns> values;
    std::vector<std::vector<double>> losses;

    void clear() {
        for (auto* column : {&iteration, &total, &line}) column->clear();
        interrupted.clear();
        for (auto& column : values) column.clear();
        for (auto& column : losses) column.clear();
    }
};

struct Timer {
    std::string name;
    std::vector<int64_t> lines;
    std::vector<double> milliseconds;
};

// One iteration's numbers while its line is read.
struct Iteration {
    int64_t iteration = 0, total = -1;
    std::array<double, kColumns> values;
    std::vector<double> losses;

    void reset(size_t losses_known) {
        values.fill(std::numeric_limits<double>::quiet_NaN());
        losses.assign(losses_known, std::numeric_limits<double>::quiet_NaN());
    }
};

// What a key of an iteration line means, by its printed name; the last line's keys in their order are tried first.
class FieldNames {
public:
    int code(std::string_view key, size_t ordinal) {
        if (key.size() > kLongestKey) return kIgnored;
        const int found = look_up(key);
        if (ordinal < kMostLosses * 2) {
            if (ordinal >= last_.size()) last_.resize(ordinal + 1, {std::string(), kIgnored});
            last_[ordinal] = {std::string(key), found};
        }
        return found;
    }

    // The key of that place in the last line, and its code; an empty key where there was none.
    std::pair<std::string_view, int> expected(size_t ordinal) const {
        if (ordinal >= last_.size()) return {{}, kIgnored};
        return {last_[ordinal].first, last_[ordinal].second};
    }

    const std::vector<std::string>& losses() const { return losses_; }

private:
    int look_up(std::string_view key) {
        static constexpr std::pair<std::string_view, int> kKnown[] = {
            {"elapsed time per iteration (ms)", kMilliseconds},
            {"elapsed time per iteration (s)", kSeconds},
            {"learning rate", kLearningRate},
            {"grad norm", kGradNorm},
            {"loss scale", kLossScale},
            {"global batch size", kGlobalBatch},
            {"consumed samples", kConsumedSamples},
            {"throughput per GPU (TFLOP/s/GPU)", kTflops},
            {"TFLOPs", kTflops},
            {"number of skipped iterations", kSkipped},
            {"number of nan iterations", kNan},
            {"samples per second", kSamplesPerSecond},
            {"params norm", kParamsNorm},
            {"num zeros", kNumZeros},
            {"tokens/s", kOwnMark},
        };
        for (const auto& [name, code] : kKnown)
            if (name == key) return code;
        if (key.size() < 4 || key.substr(key.size() - 4) != "loss") return kIgnored;
        const std::string name(key == "lm-loss" ? "lm loss" : key);
        for (size_t i = 0; i < losses_.size(); ++i)
            if (losses_[i] == name) return kFirstLoss + static_cast<int>(i);
        if (losses_.size() == kMostLosses) return kIgnored;
        losses_.push_back(name);
        return kFirstLoss + static_cast<int>(losses_.size() - 1);
    }

    std::vector<std::pair<std::string, int>> last_;
    std::vector<std::string> losses_;
};

// A head "iteration N/ M |": where its fields start, and its numbers.
struct Head {
    size_t fields = 0;
    int64_t iteration = 0, total = -1;
};

inline bool find_head(std::string_view line, Head& head) {
    static constexpr std::string_view kWord = "iteration";
    const char *at = line.data(), *const end = at + line.size();
    const auto digits = [&] {
        const char* const before = at;
        while (at < end && is_digit(*at)) ++at;
        return std::string_view(before, static_cast<size_t>(at - before));
    };
    const auto skip_blanks = [&] {
        while (at < end && is_blank(*at)) ++at;
    };
    while ((at = static_cast<const char*>(memmem(at, static_cast<size_t>(end - at), kWord.data(), kWord.size()))) != nullptr) {
        at += kWord.size();
        if (at == end || !is_blank(*at)) continue;
        skip_blanks();
        if (!parse_count(digits(), head.iteration)) continue;
        skip_blanks();
        if (at == end || *at != '/') continue;
        ++at;
        skip_blanks();
        if (end - at >= 8 && std::memcmp(at, "infinity", 8) == 0) {  // forks that train without an end
            at += 8, head.total = -1;
        } else if (!parse_count(digits(), head.total)) {
            continue;
        }
        skip_blanks();
        if (at == end || *at != '|') continue;
        head.fields = static_cast<size_t>(at + 1 - line.data());
        return true;
    }
    return false;
}

// `key: value` at the last colon, both trimmed; false where there is no colon.
inline bool split_field(std::string_view piece, std::string_view& key, std::string_view& value) {
    const size_t colon = piece.rfind(':');
    if (colon == std::string_view::npos) return false;
    key = trimmed(piece.substr(0, colon));
    value = trimmed(piece.substr(colon + 1));
    return true;
}

inline void set_once(double& place, double number) {
    if (std::isnan(place)) place = number;
}

inline void store_field(int code, double number, Iteration& row, bool& own) {
    if (code == kOwnMark) {
        own = true;
    } else if (code >= kFirstLoss) {
        const size_t loss = static_cast<size_t>(code - kFirstLoss);
        if (loss >= row.losses.size()) row.losses.resize(loss + 1, std::numeric_limits<double>::quiet_NaN());
        set_once(row.losses[loss], number);
    } else if (code == kMilliseconds) {
        set_once(row.values[kSeconds], number / 1000.0);
    } else if (code != kIgnored) {
        set_once(row.values[code], number);
    }
}

// Reads `fields` ("key: value | key: value |") into `row`, up to the next head, which ranks that write over each other put into the
// same line; true where there is one, and `fields` is then what is behind it. A field without its closing bar was cut, and its
// number with it.
inline bool read_fields(std::string_view& fields, FieldNames& names, Iteration& row, Head& next, bool& own) {
    const char *at = fields.data(), *const end = at + fields.size();
    for (size_t ordinal = 0; at < end;) {
        const auto [expected, expected_code] = names.expected(ordinal);
        double number;
        if (!expected.empty() && scan_field(at, end, expected, number)) {
            if (at++ == end) return false;
            store_field(expected_code, number, row, own);
            ++ordinal;
            continue;
        }
        const char* bar = static_cast<const char*>(std::memchr(at, '|', static_cast<size_t>(end - at)));
        if (bar == nullptr) return false;
        const std::string_view piece(at, static_cast<size_t>(bar - at));
        at = bar + 1;
        if (find_head(std::string_view(piece.data(), piece.size() + 1), next)) {
            fields = std::string_view(at, static_cast<size_t>(end - at));
            return true;
        }
        std::string_view key, value;
        if (!split_field(piece, key, value)) continue;
        const int code = names.code(key, ordinal++);
        if (code != kIgnored && parse_number(value, number)) store_field(code, number, row, own);
    }
    return false;
}

// DeepSpeed's pipeline engine keeps scale, norm and zeros to itself; Megatron then prints -1 and zeros in their place.
inline void drop_placeholders(Iteration& row) {
    if (row.values[kLossScale] != -1.0) return;
    const double missing = std::numeric_limits<double>::quiet_NaN();
    row.values[kLossScale] = missing;
    if (row.values[kGradNorm] == 0.0) row.values[kGradNorm] = missing;
    if (row.values[kNumZeros] == 0.0) row.values[kNumZeros] = missing;
}

inline bool is_timer_name(std::string_view name) {
    if (name.empty() || name.size() > kLongestKey || !is_letter(name.front())) return false;
    for (char c : name)
        if (!is_letter(c) && !is_digit(c) && std::string_view(" -_/,.").find(c) == std::string_view::npos) return false;
    return true;
}

class Timers {
public:
    // wanted: names of those to keep; all where there is no list.
    explicit Timers(std::optional<std::vector<std::string>> wanted) : wanted_(std::move(wanted)) {}

    // "time (ms) | name: 1.0 | name: 2.0", from behind the first bar up to what is no timer. The last number of a cut line is left out.
    void read_line(std::string_view line, int64_t number, bool terminated) {
        static constexpr std::string_view kStart = "time (ms)";
        for (size_t at = line.find(kStart); at != std::string_view::npos; at = line.find(kStart, at + 1)) {
            std::string_view rest = line.substr(at + kStart.size());
            while (!rest.empty() && is_blank(rest.front())) rest.remove_prefix(1);
            if (!rest.empty() && rest.front() == '|') read_pieces(rest.substr(1), number, terminated);
        }
    }

    // "    name .........: (1.0, 2.0)", of which the largest over the ranks is kept, or "    name .........: 2.0".
    void read_rows(std::string_view line, int64_t number, bool terminated) {
        static constexpr std::string_view kMark = "...: ";
        for (size_t at = line.find(kMark); at != std::string_view::npos; at = line.find(kMark, at + kMark.size())) {
            size_t start = at;
            while (start > 0 && line[start - 1] == '.') --start;
            if (start < 2 || line[start - 1] != ' ') continue;
            const size_t end = start - 1;
            size_t first = end;
            while (first > 0 && end - first < kLongestKey && !is_blank(line[first - 1])) --first;
            const std::string_view name = line.substr(first, end - first);
            double milliseconds;
            if (is_timer_name(name) && row_value(line.substr(at + kMark.size()), terminated, milliseconds))
                add(name, number, milliseconds);
        }
    }

    std::vector<Timer>& all() { return timers_; }
    size_t pending() const { return pending_; }

    void clear() {
        for (Timer& timer : timers_) timer.lines.clear(), timer.milliseconds.clear();
        pending_ = 0;
    }

private:
    void read_pieces(std::string_view pieces, int64_t number, bool terminated) {
        const char *at = pieces.data(), *const end = at + pieces.size();
        for (size_t ordinal = 0; at < end; ++ordinal) {
            double milliseconds;
            if (ordinal < last_.size() && scan_field(at, end, timers_[last_[ordinal]].name, milliseconds)) {
                if (at++ == end && !terminated) return;
                push(last_[ordinal], number, milliseconds);
                continue;
            }
            const char* bar = static_cast<const char*>(std::memchr(at, '|', static_cast<size_t>(end - at)));
            if (bar == nullptr && !terminated) return;
            const char* stop = bar == nullptr ? end : bar;
            std::string_view key, value;
            const bool is_field = split_field(std::string_view(at, static_cast<size_t>(stop - at)), key, value);
            if (!is_field || !parse_number(value, milliseconds) || !is_timer_name(key)) return;
            at = stop + 1;
            const size_t place = add(key, number, milliseconds);
            if (place == kMostTimers) continue;
            if (ordinal == last_.size()) last_.push_back(place);
            else if (ordinal < last_.size()) last_[ordinal] = place;
        }
    }

    static bool row_value(std::string_view rest, bool terminated, double& milliseconds) {
        if (rest.empty() || rest.front() != '(') {
            const size_t stop = rest.find_first_of(" \t");
            if (stop == std::string_view::npos && !terminated) return false;
            return parse_number(rest.substr(0, stop), milliseconds);
        }
        const size_t close = rest.substr(0, 2 * kLongestNumber + 4).find(')');
        if (close == std::string_view::npos) return false;
        const std::string_view inside = rest.substr(1, close - 1);
        const size_t comma = inside.find(", ");
        double lowest;
        return comma != std::string_view::npos && parse_number(inside.substr(0, comma), lowest) &&
               parse_number(inside.substr(comma + 2), milliseconds);
    }

    size_t add(std::string_view name, int64_t number, double milliseconds) {
        if (wanted_ && std::find(wanted_->begin(), wanted_->end(), name) == wanted_->end()) return kMostTimers;
        const std::string key(name);
        auto found = places_.find(key);
        if (found == places_.end()) {
            if (timers_.size() == kMostTimers) return kMostTimers;
            found = places_.emplace(key, timers_.size()).first;
            timers_.push_back({key, {}, {}});
        }
        push(found->second, number, milliseconds);
        return found->second;
    }

    void push(size_t place, int64_t number, double milliseconds) {
        timers_[place].lines.push_back(number);
        timers_[place].milliseconds.push_back(milliseconds);
        ++pending_;
    }

    const std::optional<std::vector<std::string>> wanted_;
    std::vector<Timer> timers_;
    std::unordered_map<std::string, size_t> places_;
    std::vector<size_t> last_;  // of the last line, in its order: runs repeat it
    size_t pending_ = 0;
};

}  // namespace megactl::native
