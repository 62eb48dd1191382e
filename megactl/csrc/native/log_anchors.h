// Finds any of some dozens of fixed strings in text, at a few bytes a cycle whatever the text is.
//
// Of each anchor four neighbouring 4-byte pieces are entered into a bitmap. The text is probed at every fourth byte: an anchor that
// lies there is met by one of its pieces, and almost nothing else is, so memcmp is rare. No step depends on the one before, which
// is what makes it fast without instructions of a particular processor. An anchor of two bytes is looked for with memchr.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace megactl::native {

constexpr size_t kPiece = 4;
constexpr size_t kStride = 4;
constexpr size_t kShortestAnchor = kPiece + kStride - 1;

struct Anchor {
    std::string text;
    uint64_t kinds = 0;
    uint32_t follow = 0;  // so many lines behind it belong to it
    std::string until;    // ... or fewer, up to and with the line that holds this
};

class AnchorSet {
public:
    explicit AnchorSet(std::vector<Anchor> anchors) : anchors_(std::move(anchors)), first_(kSlots, kNone) {
        for (uint32_t index = 0; index < anchors_.size(); ++index) {
            if (anchors_[index].text.size() == 2) pairs_.push_back(index);
            else enter(index);
        }
    }

    // A place at or before the end of the first long anchor wholly in [begin, end); nullptr where there is none.
    const char* find(const char* begin, const char* end) const {
        const char* at = begin;
        for (; end - at >= kWindow; at += 4 * kStride) {
            if (__builtin_expect(!probe4(at), 1)) continue;
            for (size_t step = 0; step < 4; ++step)
                if (is_met(at + step * kStride, begin, end)) return at + step * kStride;
        }
        for (; end - at >= static_cast<ptrdiff_t>(kPiece); at += kStride)
            if (probe(at) && is_met(at, begin, end)) return at;
        return nullptr;
    }

    // The first anchor of two bytes in [begin, end); nullptr where there is none.
    const char* find_pair(const char* begin, const char* end) const {
        const char* first = nullptr;
        for (uint32_t index : pairs_) {
            const char* found = pair_in(anchors_[index].text, begin, first == nullptr ? end : first + 1);
            if (found != nullptr) first = found;
        }
        return first;
    }

    // The kinds of every anchor in [begin, end), and the first anchor of the table with lines to follow (nullptr: none).
    uint64_t kinds(const char* begin, const char* end, const Anchor** opens) const {
        uint64_t found = 0;
        uint32_t opener = kNone;
        const auto use = [&](uint32_t anchor) {
            found |= anchors_[anchor].kinds;
            if (anchors_[anchor].follow && anchor < opener) opener = anchor;
            return false;
        };
        const char* at = begin;
        for (; end - at >= kWindow; at += 4 * kStride) {
            if (__builtin_expect(!probe4(at), 1)) continue;
            for (size_t step = 0; step < 4; ++step) each_met(at + step * kStride, begin, end, use);
        }
        for (; end - at >= static_cast<ptrdiff_t>(kPiece); at += kStride)
            if (probe(at)) each_met(at, begin, end, use);
        for (uint32_t index : pairs_)
            if (pair_in(anchors_[index].text, begin, end) != nullptr) use(index);
        *opens = opener == kNone ? nullptr : &anchors_[opener];
        return found;
    }

private:
    static constexpr uint32_t kNone = 0xffffffffu;
    static constexpr size_t kSlots = 1u << 16;
    static constexpr ptrdiff_t kWindow = 4 * kStride + kPiece;

    struct Entry {
        uint32_t piece, anchor, offset, next;
    };

    static uint32_t load(const char* at) {
        uint32_t piece;
        std::memcpy(&piece, at, kPiece);
        return piece;
    }

    static uint32_t slot(uint32_t piece) { return (piece * 0x9e3779b1u) >> 16; }

    bool probe(const char* at) const {
        const uint32_t place = slot(load(at));
        return (bits_[place >> 6] >> (place & 63)) & 1;
    }

    // Any of four probes; none waits for another.
    bool probe4(const char* at) const {
        return probe(at) | probe(at + kStride) | probe(at + 2 * kStride) | probe(at + 3 * kStride);
    }

    template <typename Use>
    bool each_met(const char* at, const char* begin, const char* end, Use use) const {
        const uint32_t piece = load(at);
        for (uint32_t entry = first_[slot(piece)]; entry != kNone; entry = entries_[entry].next) {
            const Entry& here = entries_[entry];
            const std::string& text = anchors_[here.anchor].text;
            if (here.piece != piece || at - begin < static_cast<ptrdiff_t>(here.offset)) continue;
            const char* start = at - here.offset;
            if (end - start < static_cast<ptrdiff_t>(text.size()) || std::memcmp(start, text.data(), text.size()) != 0) continue;
            if (use(here.anchor)) return true;
        }
        return false;
    }

    bool is_met(const char* at, const char* begin, const char* end) const {
        return each_met(at, begin, end, [](uint32_t) { return true; });
    }

    static const char* pair_in(const std::string& pair, const char* at, const char* end) {
        for (; end - at >= 2; ++at) {
            at = static_cast<const char*>(std::memchr(at, pair[0], static_cast<size_t>(end - at - 1)));
            if (at == nullptr || at[1] == pair[1]) return at;
        }
        return nullptr;
    }

    // How often a character is met in logs, roughly: which piece of an anchor is entered decides how often it is met in vain.
    static int commonness(char c) {
        if (std::strchr(" *-=etaoinsr0", c)) return 4;
        if (std::strchr("NCLIFOldchumpg_./1", c)) return 3;
        return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ? 2 : 1;
    }

    void enter(uint32_t index) {
        const std::string& text = anchors_[index].text;
        if (text.size() < kShortestAnchor) throw std::invalid_argument("anchor '" + text + "': must have 2 bytes, or 7 and more");
        size_t best = 0;
        int lowest = 1 << 20;
        for (size_t offset = 0; offset + kShortestAnchor <= text.size(); ++offset) {
            int sum = 0;
            for (size_t i = 0; i < kShortestAnchor; ++i) sum += commonness(text[offset + i]);
            if (sum < lowest) lowest = sum, best = offset;
        }
        for (size_t offset = best; offset < best + kStride; ++offset) {
            const uint32_t piece = load(text.data() + offset), place = slot(piece);
            entries_.push_back({piece, index, static_cast<uint32_t>(offset), first_[place]});
            first_[place] = static_cast<uint32_t>(entries_.size() - 1);
            bits_[place >> 6] |= uint64_t{1} << (place & 63);
        }
    }

    std::vector<Anchor> anchors_;
    std::array<uint64_t, kSlots / 64> bits_{};
    std::vector<uint32_t> first_;
    std::vector<Entry> entries_;
    std::vector<uint32_t> pairs_;
};

}  // namespace megactl::native
