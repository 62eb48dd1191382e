// Feeds mutated lines to the log scanner, twice: whole, and cut into pieces at random places. Both must find the same.
// Compiled alone, with sanitizers, by tests/report/test_log_fuzz.py:  fuzz_log_scanner TABLE COMMON LINES COUNT SEED
// TABLE has a line "kinds follow text" for each anchor; LINES has the lines that are mutated.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "native/log_scanner.h"

using megactl::native::Anchor;
using megactl::native::LogScanner;

namespace {

std::vector<std::string> lines_of(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<std::string> lines;
    for (std::string line; std::getline(file, line);) lines.push_back(line);
    if (lines.empty()) std::fprintf(stderr, "%s: empty\n", path), std::exit(2);
    return lines;
}

std::vector<Anchor> table_of(const char* path) {
    std::vector<Anchor> anchors;
    for (const std::string& line : lines_of(path)) {
        std::istringstream parts(line);
        Anchor anchor;
        parts >> anchor.kinds >> anchor.follow;
        std::getline(parts, anchor.text);
        anchor.text.erase(0, 1);
        if (anchor.follow > 100) anchor.until = "end of";
        anchors.push_back(anchor);
    }
    return anchors;
}

class Mutator {
public:
    Mutator(std::vector<std::string> lines, uint64_t seed) : lines_(std::move(lines)), random_(seed) {}

    size_t below(size_t limit) { return limit ? random_() % limit : 0; }

    std::string line() {
        static const char* const kPieces[] = {"|", ":", " ", "nan", "-inf", "1e999", "\x1b[1m", "\x1b", "iteration 5/ 10 |", "...: ", "%|", "(", "time (ms) |"};
        std::string line = lines_[below(lines_.size())];
        for (size_t left = below(4); left > 0; --left) {
            const size_t at = below(line.size() + 1);
            switch (below(6)) {
                case 0: line.erase(at, 1 + below(40)); break;
                case 1: line.insert(at, kPieces[below(std::size(kPieces))]); break;
                case 2: line.insert(at, lines_[below(lines_.size())]); break;
                case 3: if (at < line.size()) line[at] = static_cast<char>(below(256)); break;
                case 4: line.insert(at, std::string(below(30), "0123456789.eE+-"[below(15)])); break;
                default: line.insert(at, line.substr(at, below(60))); break;
            }
        }
        return line + (below(8) ? "\n" : below(2) ? "\r" : "\r\n");
    }

private:
    std::vector<std::string> lines_;
    std::mt19937_64 random_;
};

struct Sums {
    size_t rows = 0, notes = 0, timers = 0, lines = 0;
    bool operator==(const Sums& other) const {
        return rows == other.rows && notes == other.notes && timers == other.timers && lines == other.lines;
    }
};

Sums sums_of(LogScanner& scanner) {
    scanner.finish();
    Sums sums{scanner.rows().iteration.size(), 0, scanner.timers().pending(), static_cast<size_t>(scanner.line())};
    for (const auto& column : scanner.rows().values)
        if (column.size() != sums.rows) std::abort();
    for (const auto& column : scanner.rows().losses)
        if (column.size() != sums.rows) std::abort();
    for (const auto& note : scanner.notes()) sums.notes += note.text.size() + static_cast<size_t>(note.line);
    return sums;
}

}  // namespace

int main(int count, char** words) {
    if (count != 6) return std::fprintf(stderr, "usage: fuzz_log_scanner TABLE COMMON LINES COUNT SEED\n"), 2;
    const std::vector<Anchor> anchors = table_of(words[1]);
    const std::string common = lines_of(words[2])[0];
    Mutator mutator(lines_of(words[3]), std::strtoull(words[5], nullptr, 10));
    size_t left = std::strtoull(words[4], nullptr, 10), rows = 0;
    while (left > 0) {
        const size_t some = std::min<size_t>(left, 2000);
        const size_t cap = mutator.below(3) ? size_t{1} << 16 : 1 + mutator.below(300);
        std::string text;
        for (size_t i = 0; i < some; ++i) text += mutator.line();
        // Without room behind its end, so that a byte read too far is seen.
        std::vector<char> exact(text.begin(), text.end());
        LogScanner whole(anchors, common, cap), cut(anchors, std::string(), cap);
        whole.feed(exact.data(), exact.size());
        for (size_t at = 0; at < exact.size();) {
            const size_t size = std::min(exact.size() - at, 1 + mutator.below(5000));
            const std::vector<char> piece(exact.begin() + static_cast<ptrdiff_t>(at), exact.begin() + static_cast<ptrdiff_t>(at + size));
            cut.feed(piece.data(), piece.size());
            at += size;
        }
        LogScanner few(anchors, common, cap, std::vector<std::string>{"save-checkpoint", "forward-compute"});
        few.feed(exact.data(), exact.size());
        const Sums one = sums_of(whole), other = sums_of(cut);
        if (!(one == other)) return std::fprintf(stderr, "cut and whole differ with %zu lines left\n", left), 1;
        Sums fewer = sums_of(few);
        if (fewer.timers > one.timers) return std::fprintf(stderr, "more timers than there are with %zu lines left\n", left), 1;
        fewer.timers = one.timers;
        if (!(one == fewer)) return std::fprintf(stderr, "leaving out timers changed something else with %zu lines left\n", left), 1;
        rows += one.rows;
        left -= some;
    }
    std::printf("%zu iterations\n", rows);
    return rows == 0;
}
