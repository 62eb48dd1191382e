// Reads the log of a training run, fed in pieces of any size: iteration lines and timers become columns, other lines with an
// anchor become notes for the parser of their system. Linear in the input: no step goes back over text, and of a line only the
// first `cap` bytes are looked at. No pybind11, so that a fuzzer can be compiled from it alone.
//
// The Python twin is megactl/report/logs/python_scanner.py; the two must agree on every input.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "log_anchors.h"
#include "log_records.h"
#include "log_text.h"

namespace megactl::native {

// Bits of kinds that the scanner acts on itself; the rest only go into notes.
constexpr uint64_t kIterationLine = 1u << 0;
constexpr uint64_t kTimerLine = 1u << 1;
constexpr uint64_t kAcrossRanks = 1u << 2;  // the lines that follow may be rows of timers
constexpr uint64_t kBlockLine = 1u << 4;   // in notes: the line follows an anchor that has lines to follow
constexpr uint64_t kRewind = 1u << 5;      // in notes: the iteration number fell without a new start
constexpr uint64_t kFirst = 1u << 8;       // in notes: the first iteration line since a start
constexpr uint64_t kStart = 1u << 6;       // a run starts: its iterations are not compared with the ones before
constexpr uint64_t kInterruption = 1u << 7;  // a save or an evaluation: the next iteration's time may contain it
constexpr uint64_t kActedOn = kIterationLine | kTimerLine | kAcrossRanks | kStart | kInterruption;

struct Note {
    int64_t line;
    uint64_t kinds;
    std::string text;
};

class LogScanner {
public:
    // timers: names of those to keep; all where there is no list.
    LogScanner(std::vector<Anchor> anchors, const std::string& common, size_t cap, std::optional<std::vector<std::string>> timers = {})
        : anchors_(std::move(anchors), common), cap_(cap), timers_(std::move(timers)) {}

    void feed(const char* data, size_t size) {
        const char *at = data, *end = data + size;
        if (open_) {
            const char* stop = next_break(at, end);
            append_open(at, stop);
            if (stop == end) return;
            close_open(true);
            line_ += *stop == '\n';
            at = stop + 1;
        }
        const char* last = last_break(at, end);
        if (last != nullptr) {
            scan_lines(at, last + 1);
            at = last + 1;
        }
        append_open(at, end);
    }

    // The input is over: what is left of it is a line without an end.
    void finish() {
        if (open_) close_open(false);
    }

    // With a column, of the same length as the others, for every loss met so far.
    IterationColumns& rows() {
        rows_.losses.resize(names_.losses().size());
        for (auto& column : rows_.losses) column.resize(rows_.iteration.size(), std::numeric_limits<double>::quiet_NaN());
        return rows_;
    }
    std::vector<Note>& notes() { return notes_; }
    Timers& timers() { return timers_; }
    const std::vector<std::string>& loss_names() const { return names_.losses(); }
    bool saw_own_line() const { return own_; }
    int64_t duplicates() const { return duplicates_; }
    int64_t line() const { return line_; }

    // Values held back until they are taken, to tell when it is time to.
    size_t pending() const { return rows_.iteration.size() * (kColumns + 4) + notes_.size() * 8 + timers_.pending() * 2; }

    void clear() {
        rows_.clear();
        notes_.clear();
        timers_.clear();
    }

private:
    static const char* next_break(const char* at, const char* end) {
        const char* newline = static_cast<const char*>(std::memchr(at, '\n', static_cast<size_t>(end - at)));
        if (newline == nullptr) newline = end;
        const char* carriage = static_cast<const char*>(std::memchr(at, '\r', static_cast<size_t>(newline - at)));
        return carriage == nullptr ? newline : carriage;
    }

    static const char* last_break(const char* begin, const char* end) {
        for (const char* at = end; at > begin;)
            if (*--at == '\n' || *at == '\r') return at;
        return nullptr;
    }

    void append_open(const char* at, const char* end) {
        if (at == end) return;
        open_ = true;
        const size_t size = static_cast<size_t>(end - at), taken = std::min(size, cap_ - carry_.size());
        carry_.append(at, taken);
        cut_ |= taken < size;
    }

    void close_open(bool terminated) {
        read_line(carry_, line_, {terminated && !cut_, true, true});
        carry_.clear();
        open_ = cut_ = false;
    }

    // The next place of something in a text that is gone through once: what was found further on is remembered, since looking for it
    // again from every line would cost a pass over the text each time.
    class Next {
    public:
        template <typename Find>
        const char* from(const char* at, Find find) {
            if (place_ == nullptr || place_ < at) place_ = find(at);
            return place_;
        }

    private:
        const char* place_ = nullptr;
    };

    // Whole lines: jumps from anchor to anchor, line by line only where lines follow an anchor.
    void scan_lines(const char* begin, const char* end) {
        const char *at = begin, *counted = begin;
        Next next_anchor, next_pair, newline, carriage, escape;
        while (at < end) {
            const char* anchor = next_anchor.from(at, [&](const char* from) { return found_or(anchors_.find(from, end), end); });
            const char* pair = next_pair.from(at, [&](const char* from) { return found_or(anchors_.find_pair(from, end), end); });
            const char* hit = left_ > 0 ? at : std::min(anchor, pair);
            if (hit == end) break;
            const char* start = line_start(at, hit);
            const char* stop = std::min(newline.from(hit, [&](const char* from) { return find_byte(from, end, '\n'); }),
                                        carriage.from(hit, [&](const char* from) { return find_byte(from, end, '\r'); }));
            line_ += count_newlines(counted, start);
            counted = start;
            const size_t size = static_cast<size_t>(stop - start);
            const bool colours = escape.from(start, [&](const char* from) { return find_byte(from, end, '\x1b'); }) < stop;
            read_line(std::string_view(start, std::min(size, cap_)), line_, {size <= cap_, colours, pair < stop});
            at = stop + 1;
        }
        line_ += count_newlines(counted, end);
    }

    static const char* found_or(const char* found, const char* end) { return found == nullptr ? end : found; }

    // Behind the last break in [begin, at), eight bytes at a time: a byte is zero in `x ^ pattern` where a break is.
    static const char* line_start(const char* begin, const char* at) {
        constexpr uint64_t kOnes = 0x0101010101010101u, kHigh = 0x8080808080808080u;
        for (uint64_t word; at - begin >= 8; at -= 8) {
            std::memcpy(&word, at - 8, 8);
            const uint64_t newline = word ^ (kOnes * '\n'), carriage = word ^ (kOnes * '\r');
            if ((((newline - kOnes) & ~newline) | ((carriage - kOnes) & ~carriage)) & kHigh) break;
        }
        while (at > begin && at[-1] != '\n' && at[-1] != '\r') --at;
        return at;
    }

    static const char* find_byte(const char* at, const char* end, char byte) {
        const void* found = std::memchr(at, byte, static_cast<size_t>(end - at));
        return found == nullptr ? end : static_cast<const char*>(found);
    }

    // What is known of a line: whether it was whole, and whether it may hold escape sequences and anchors of two bytes.
    struct About {
        bool terminated, escapes, pairs;
    };

    void read_line(std::string_view line, int64_t number, About about) {
        const Anchor* opens = nullptr;
        const uint64_t kinds = anchors_.kinds(line.data(), line.data() + line.size(), about.pairs, &opens);
        const bool in_block = left_ > 0, terminated = about.terminated;
        if (kinds == 0 && !in_block) return;
        if (about.escapes && line.find('\x1b') != std::string_view::npos) line = clean_ = without_escapes(line);
        if (kinds & kStart) recent_.clear(), last_iteration_ = -1;
        if (kinds & kIterationLine) read_iterations(line, number);
        if (kinds & kTimerLine) timers_.read_line(line, number, terminated);
        if ((kinds & kAcrossRanks) || (in_block && block_->kinds & kAcrossRanks)) timers_.read_rows(line, number, terminated);
        interrupted_ |= (kinds & kInterruption) != 0;
        const bool noted = in_block && !(block_->kinds & kAcrossRanks);
        if (in_block) leave_block(line);
        if (opens != nullptr) left_ = opens->follow, block_ = opens;
        if ((kinds & ~kActedOn) || noted) notes_.push_back({number, kinds | (noted ? kBlockLine : 0), std::string(line)});
    }

    void leave_block(std::string_view line) {
        --left_;
        if (!block_->until.empty() && line.find(block_->until) != std::string_view::npos) left_ = 0;
    }

    void read_iterations(std::string_view line, int64_t number) {
        const std::string_view content = trimmed(line);
        if (!content.empty() && content.front() == '#') return;  // a job script's own comments, printed into its log
        Head head, next;
        bool more = find_head(line, head);
        for (std::string_view fields = line.substr(more ? head.fields : 0); more; head = next) {
            row_.reset(names_.losses().size());
            more = read_fields(fields, names_, row_, next, own_);
            row_.iteration = head.iteration, row_.total = head.total;
            if (!std::isnan(row_.values[kSeconds])) add_row(line, number);
        }
    }

    // Several ranks may print the same iteration, some a little late; a number that falls otherwise is a run that starts over.
    void add_row(std::string_view line, int64_t number) {
        drop_placeholders(row_);
        const auto mark = std::make_pair(row_.iteration, first_loss_bits());
        const bool falls = row_.iteration < last_iteration_;
        if (row_.iteration == last_iteration_ || (falls && std::find(recent_.begin(), recent_.end(), mark) != recent_.end())) {
            ++duplicates_;
            return;
        }
        if (falls) recent_.clear();
        if (falls || last_iteration_ < 0) notes_.push_back({number, falls ? kRewind : kFirst, std::string(line)});
        if (recent_.size() == kRecent) recent_.erase(recent_.begin());
        recent_.push_back(mark);
        last_iteration_ = row_.iteration;
        store_row(number);
    }

    uint64_t first_loss_bits() const {
        for (double loss : row_.losses) {
            uint64_t bits;
            std::memcpy(&bits, &loss, sizeof bits);
            if (!std::isnan(loss)) return bits;
        }
        return 0;
    }

    void store_row(int64_t number) {
        const size_t before = rows_.iteration.size();
        rows_.iteration.push_back(row_.iteration);
        rows_.total.push_back(row_.total);
        rows_.line.push_back(number);
        rows_.interrupted.push_back(interrupted_);
        interrupted_ = false;
        for (int column = 0; column < kColumns; ++column) rows_.values[column].push_back(row_.values[column]);
        const double missing = std::numeric_limits<double>::quiet_NaN();
        rows_.losses.resize(names_.losses().size());
        for (size_t loss = 0; loss < rows_.losses.size(); ++loss) {
            rows_.losses[loss].resize(before, missing);
            rows_.losses[loss].push_back(loss < row_.losses.size() ? row_.losses[loss] : missing);
        }
    }

    AnchorSet anchors_;
    const size_t cap_;
    std::string carry_, clean_;  // a line that reaches over the end of what was fed; a line without its escape sequences
    bool open_ = false, cut_ = false;
    int64_t line_ = 1;

    uint32_t left_ = 0;  // lines still to come of a block
    const Anchor* block_ = nullptr;  // the anchor that opened it
    bool interrupted_ = false, own_ = false;

    FieldNames names_;
    Iteration row_;
    std::vector<std::pair<int64_t, uint64_t>> recent_;
    int64_t last_iteration_ = -1, duplicates_ = 0;

    IterationColumns rows_;
    std::vector<Note> notes_;
    Timers timers_;
};

}  // namespace megactl::native
