// Pieces of text as the log scanner meets them: views, trimming, numbers, terminal colours.
#pragma once

#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>

namespace megactl::native {

constexpr size_t kLongestNumber = 64;

inline bool is_blank(char c) { return c == ' ' || c == '\t'; }
inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

// Sums of bytes, emptied before they overflow: sums of 64 bits, as std::count keeps, take eight times the registers.
inline int64_t count_newlines(const char* at, const char* end) {
    constexpr int kLanes = 32;
    int64_t count = 0;
    while (end - at >= kLanes) {
        uint8_t sums[kLanes] = {};
        for (int round = 0; round < 255 && end - at >= kLanes; ++round, at += kLanes)
            for (int lane = 0; lane < kLanes; ++lane) sums[lane] += at[lane] == '\n';
        for (uint8_t sum : sums) count += sum;
    }
    for (; at < end; ++at) count += *at == '\n';
    return count;
}

// memcmp for the keys of fields, which are short: without the call.
inline bool same(const char* left, const char* right, size_t size) {
    uint64_t a, b;
    if (size < sizeof a) return std::memcmp(left, right, size) == 0;
    for (size_t at = 0; at + sizeof a < size; at += sizeof a) {
        std::memcpy(&a, left + at, sizeof a), std::memcpy(&b, right + at, sizeof b);
        if (a != b) return false;
    }
    std::memcpy(&a, left + size - sizeof a, sizeof a), std::memcpy(&b, right + size - sizeof b, sizeof b);
    return a == b;
}

inline std::string_view trimmed(std::string_view text) {
    while (!text.empty() && is_blank(text.front())) text.remove_prefix(1);
    while (!text.empty() && is_blank(text.back())) text.remove_suffix(1);
    return text;
}

inline bool equals_ignoring_case(std::string_view text, std::string_view lower) {
    if (text.size() != lower.size()) return false;
    for (size_t i = 0; i < text.size(); ++i)
        if ((text[i] | 0x20) != lower[i]) return false;
    return true;
}

// What is written with digits, as strtod would read it, without looking at the locale.
inline double converted(std::string_view digits, int64_t exponent) {
    double value = 0.0;
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (result.ec == std::errc::result_out_of_range) return exponent > 0 ? HUGE_VAL : 0.0;
    return value;
}

constexpr double kPowers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                              1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
constexpr uint64_t kWholePowers[] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000};

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
// How many of the eight bytes at `at` are digits from the first on, and their values in `word`, a byte each.
inline int digits_of_eight(const char* at, uint64_t& word) {
    std::memcpy(&word, at, sizeof word);
    word ^= 0x3030303030303030u;
    const uint64_t others = ((word + 0x7676767676767676u) | word) & 0x8080808080808080u;
    return others ? __builtin_ctzll(others) >> 3 : 8;
}

// The number that the first `count` (1 to 8) of eight digits make: ones, then pairs, fours and eights are summed in one register.
inline uint64_t value_of_digits(uint64_t word, int count) {
    word <<= 8 * (8 - count);
    word = word * 10 + (word >> 8);
    return (((word & 0x000000ff000000ffu) * 0x000f424000000064u) + (((word >> 16) & 0x000000ff000000ffu) * 0x0000271000000001u)) >> 32;
}

// The numbers that logs have most: up to seven digits, a point and up to seven more, an exponent of two digits. Without loops, for the
// processor cannot foresee their ends. False, and nothing done, for any other number and near the end of the text.
inline bool scan_short(const char*& at, const char* end, double& value) {
    if (end - at < 32) return false;
    uint64_t word;
    const char* here = at;
    int count = digits_of_eight(here, word), fraction = 0;
    if (count == 0 || count == 8) return false;
    uint64_t mantissa = value_of_digits(word, count);
    here += count;
    if (*here == '.') {
        fraction = digits_of_eight(++here, word);
        if (fraction == 0 || fraction == 8) return false;
        mantissa = mantissa * kWholePowers[fraction] + value_of_digits(word, fraction);
        here += fraction;
    }
    if ((*here | 0x20) != 'e') {
        value = static_cast<double>(mantissa) / kPowers[fraction];
        return at = here, true;
    }
    if ((here[1] != '+' && here[1] != '-') || !is_digit(here[2]) || !is_digit(here[3]) || is_digit(here[4])) return false;
    const int size = (here[2] - '0') * 10 + here[3] - '0', power = (here[1] == '-' ? -size : size) - fraction;
    if (power < -22 || power > 22) return false;
    // Both operands are exact, so the one operation rounds correctly (Clinger 1990).
    value = power < 0 ? static_cast<double>(mantissa) / kPowers[-power] : static_cast<double>(mantissa) * kPowers[power];
    return at = here + 4, true;
}
#else
inline bool scan_short(const char*&, const char*, double&) { return false; }
#endif

// A decimal number at `at`, which moves behind it; false, and `at` as it was, where there is none or it has more than 64 characters.
inline bool scan_decimal(const char*& at, const char* end, double& value) {
    const char *here = at, *const start = at;
    if (end - here > static_cast<ptrdiff_t>(kLongestNumber) + 1) end = here + kLongestNumber + 1;
    const bool negative = here < end && *here == '-';
    if (here < end && (*here == '-' || *here == '+')) ++here;
    const char* const unsigned_start = here;
    uint64_t mantissa = 0;
    const auto digits = [&] {
        const char* const before = here;
        for (; here < end && is_digit(*here); ++here) mantissa = mantissa * 10 + static_cast<uint64_t>(*here - '0');
        return static_cast<int>(here - before);
    };
    const int whole = digits();
    int fraction = 0;
    if (here < end && *here == '.') ++here, fraction = digits();
    if (whole + fraction == 0) return false;
    int64_t exponent = 0;
    if (here < end && (*here | 0x20) == 'e') {
        ++here;
        const bool down = here < end && *here == '-';
        if (here < end && (*here == '-' || *here == '+')) ++here;
        if (here == end || !is_digit(*here)) return false;
        for (; here < end && is_digit(*here); ++here) exponent = exponent < 100000 ? exponent * 10 + (*here - '0') : exponent;
        if (down) exponent = -exponent;
    }
    if (here - start > static_cast<ptrdiff_t>(kLongestNumber)) return false;
    const int64_t power = exponent - fraction;
    if (whole + fraction <= 19 && mantissa <= (uint64_t{1} << 53) && power >= -22 && power <= 22) {
        value = power < 0 ? static_cast<double>(mantissa) / kPowers[-power] : static_cast<double>(mantissa) * kPowers[power];
    } else {
        value = converted(std::string_view(unsigned_start, static_cast<size_t>(here - unsigned_start)), exponent);
    }
    if (negative) value = -value;
    at = here;
    return true;
}

// The whole of `text` as a decimal number, nan or inf; false where it is anything else.
inline bool parse_number(std::string_view text, double& value) {
    if (text.empty() || text.size() > kLongestNumber) return false;
    const char *at = text.data(), *const end = at + text.size();
    if (scan_decimal(at, end, value)) return at == end;
    const bool negative = text.front() == '-';
    if (negative || text.front() == '+') text.remove_prefix(1);
    if (equals_ignoring_case(text, "nan")) return value = std::numeric_limits<double>::quiet_NaN(), true;
    if (!equals_ignoring_case(text, "inf") && !equals_ignoring_case(text, "infinity")) return false;
    return value = negative ? -HUGE_VAL : HUGE_VAL, true;
}

// `key: number` at `at`, blanks around both allowed, up to `|` or the end of the text; moves `at` there. The way most fields go.
inline bool scan_field(const char*& at, const char* end, std::string_view key, double& value) {
    const char* here = at;
    while (here < end && is_blank(*here)) ++here;
    if (end - here <= static_cast<ptrdiff_t>(key.size()) || !same(here, key.data(), key.size())) return false;
    here += key.size();
    if (*here++ != ':') return false;
    while (here < end && is_blank(*here)) ++here;
    if (!scan_short(here, end, value) && !scan_decimal(here, end, value)) return false;
    while (here < end && is_blank(*here)) ++here;
    if (here < end && *here != '|') return false;
    at = here;
    return true;
}

// Digits as a count; false for none or more than 18.
inline bool parse_count(std::string_view digits, int64_t& value) {
    if (digits.empty() || digits.size() > 18) return false;
    value = 0;
    for (char c : digits) value = value * 10 + (c - '0');
    return true;
}

// `text` without escape sequences: ESC [ ... final byte, ESC ] ... BEL, and ESC with one other byte.
inline std::string without_escapes(std::string_view text) {
    std::string kept;
    kept.reserve(text.size());
    for (size_t i = 0; i < text.size();) {
        if (text[i] != '\x1b') {
            kept.push_back(text[i++]);
        } else if (i + 1 < text.size() && text[i + 1] == '[') {
            for (i += 2; i < text.size() && (text[i] < 0x40 || text[i] > 0x7e);) ++i;
            ++i;
        } else if (i + 1 < text.size() && text[i + 1] == ']') {
            for (i += 2; i < text.size() && text[i] != '\x07';) ++i;
            ++i;
        } else {
            i += 2;
        }
    }
    return kept;
}

}  // namespace megactl::native
