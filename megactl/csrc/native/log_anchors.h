// Finds any of some dozens of fixed strings in text, at a few bytes a cycle whatever the text is.
//
// Of each anchor four neighbouring 4-byte pieces are entered into a table. The text is probed at every fourth byte: an anchor that
// lies there is met by one of its pieces, and almost nothing else is, so memcmp is rare. No step depends on the one before, which
// is what makes it fast without instructions of a particular processor. An anchor of two bytes is looked for with memchr.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "log_text.h"

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
    // `common`: text such as logs are full of. Of each anchor those pieces are entered that are not in it, as far as there are any: a
    // piece that is met in vain costs as much as a hundred bytes without one. What is found does not depend on it.
    AnchorSet(std::vector<Anchor> anchors, const std::string& common) : anchors_(std::move(anchors)) {
        std::unordered_set<uint32_t> avoided;
        for (size_t at = 0; at + kPiece <= common.size(); ++at) avoided.insert(load(common.data() + at));
        for (uint32_t index = 0; index < anchors_.size(); ++index) {
            if (anchors_[index].text.size() == 2) pairs_.push_back(index);
            else enter(index, avoided);
        }
    }

    // A place at or before the end of the first long anchor wholly in [begin, end); nullptr where there is none.
    const char* find(const char* begin, const char* end) const {
        const char* at = begin;
        for (; end - at >= kWindow; at += 4 * kStride) {
            if (__builtin_expect(!probe4(at), 1)) continue;
            for (size_t step = 0; step < 4; ++step)
                if (probe(at + step * kStride) && is_met(at + step * kStride, begin, end)) return at + step * kStride;
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

    // The kinds of every anchor in [begin, end), and the first anchor of the table with lines to follow (nullptr: none). has_pair: false
    // where it is known that no anchor of two bytes is there.
    uint64_t kinds(const char* begin, const char* end, bool has_pair, const Anchor** opens) const {
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
            for (size_t step = 0; step < 4; ++step)
                if (probe(at + step * kStride)) each_met(at + step * kStride, begin, end, use);
        }
        for (; end - at >= static_cast<ptrdiff_t>(kPiece); at += kStride)
            if (probe(at)) each_met(at, begin, end, use);
        for (uint32_t index : pairs_)
            if (has_pair && pair_in(anchors_[index].text, begin, end) != nullptr) use(index);
        *opens = opener == kNone ? nullptr : &anchors_[opener];
        return found;
    }

private:
    static constexpr uint32_t kNone = 0xffffffffu;
    static constexpr size_t kSlots = 1u << 16, kChains = 256;
    static constexpr ptrdiff_t kWindow = 4 * kStride + kPiece;

    struct Entry {
        uint32_t piece, neighbour, anchor;
        int32_t beside, offset, rest;  // of the piece: to the neighbour, from the anchor's start, to its end
    };

    static uint32_t load(const char* at) {
        uint32_t piece;
        std::memcpy(&piece, at, kPiece);
        return piece;
    }

    static uint32_t slot(uint32_t piece) { return (piece * 0x9e3779b1u) >> 16; }

    bool probe(const char* at) const { return entered_[slot(load(at))] != 0; }

    // Any of four probes; none waits for another.
    bool probe4(const char* at) const {
        const auto entered = [&](size_t step) { return entered_[slot(load(at + step * kStride))]; };
        return (entered(0) | entered(1) | entered(2) | entered(3)) != 0;
    }

    template <typename Use>
    bool each_met(const char* at, const char* begin, const char* end, Use use) const {
        const uint32_t piece = load(at);
        for (const Entry& here : chains_[entered_[slot(piece)]]) {
            if (here.piece != piece || at - begin < here.offset || end - at < here.rest) continue;
            // Four bytes beside the piece decide nearly always: "number of", say, is common, and the anchor that it begins is not.
            if (load(at + here.beside) != here.neighbour) continue;
            const std::string& text = anchors_[here.anchor].text;
            if (!same(at - here.offset, text.data(), text.size())) continue;
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
        if (std::string_view(" *-=etaoinsr0").find(c) != std::string_view::npos) return 4;
        if (std::string_view("NCLIFOldchumpg_./1").find(c) != std::string_view::npos) return 3;
        return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ? 2 : 1;
    }

    void enter(uint32_t index, const std::unordered_set<uint32_t>& avoided) {
        const std::string& text = anchors_[index].text;
        if (text.size() < kShortestAnchor) throw std::invalid_argument("anchor '" + text + "': must have 2 bytes, or 7 and more");
        size_t best = 0;
        int lowest = 1 << 20;
        for (size_t offset = 0; offset + kShortestAnchor <= text.size(); ++offset) {
            int sum = 0;
            for (size_t i = 0; i < kShortestAnchor; ++i) sum += commonness(text[offset + i]);
            for (size_t i = 0; i < kStride; ++i) sum += avoided.count(load(text.data() + offset + i)) ? 100 : 0;
            if (sum < lowest) lowest = sum, best = offset;
        }
        for (size_t offset = best; offset < best + kStride; ++offset) {
            const uint32_t piece = load(text.data() + offset);
            uint8_t& chain = entered_[slot(piece)];
            if (chain == 0) chain = static_cast<uint8_t>(1 + used_++ % (kChains - 1));
            const int32_t from = static_cast<int32_t>(offset), rest = static_cast<int32_t>(text.size() - offset);
            const int32_t beside = rest >= static_cast<int32_t>(2 * kPiece) ? kPiece : (from >= static_cast<int32_t>(kPiece) ? -4 : rest - 4);
            chains_[chain].push_back({piece, load(text.data() + from + beside), index, beside, from, rest});
        }
    }

    std::vector<Anchor> anchors_;
    // The chain of a piece; 0: none. A byte for each slot: twice as fast as a bit, and still in the second-level cache.
    std::array<uint8_t, kSlots> entered_{};
    std::array<std::vector<Entry>, kChains> chains_;
    size_t used_ = 0;
    std::vector<uint32_t> pairs_;
};

}  // namespace megactl::native
