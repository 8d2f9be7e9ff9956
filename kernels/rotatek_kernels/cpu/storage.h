// What segments store, and rows of it as numbers.

#pragma once

#include <algorithm>
#include <vector>

#include "numbers.h"

namespace {

constexpr int TILE = 64;       // tokens
constexpr int AHEAD = 32;      // rows that are fetched before they are met: memory is slow to answer
constexpr int MAX_BLOCKS = 3;  // of codes: 8, 4 and 2 bits

struct Block {
    int64_t bits, bytes, offset, channel;
};

// Codes of BITS in N bytes of each token, from column `from` of the block on. Both are known where it is compiled, so
// that a token is a load, and each part of its bytes a conversion and a store.
template <int BITS, int N>
inline void read_columns(const char* const* tokens, int count, const Block& block, int64_t from, float* to,
                         int64_t stride) {
    for (int t = 0; t < count; ++t) {
        const uint8_t* __restrict bytes = reinterpret_cast<const uint8_t*>(tokens[t]) + block.offset + from;
        float* __restrict first = to + t * stride + block.channel + from;
        for (int part = 0; part < 8 / BITS; ++part) {
            float numbers[N];
            for (int i = 0; i < N; ++i) numbers[i] = float(bytes[i] >> (part * BITS) & ((1 << BITS) - 1));
            std::memcpy(first + part * block.bytes, numbers, sizeof numbers);
        }
    }
}

template <int BITS>
inline void read_block(const char* const* tokens, int count, const Block& block, float* to, int64_t stride) {
    int64_t i = 0;
    for (; i + 16 <= block.bytes; i += 16) read_columns<BITS, 16>(tokens, count, block, i, to, stride);
    for (; i + 8 <= block.bytes; i += 8) read_columns<BITS, 8>(tokens, count, block, i, to, stride);
    for (; i + 2 <= block.bytes; i += 2) read_columns<BITS, 2>(tokens, count, block, i, to, stride);
}

// ---- a segment, from Python's words in order ----

struct Words {
    const int64_t* next;
    int64_t integer() { return *next++; }
    Type type() { return Type(*next++); }
    const char* address() { return reinterpret_cast<const char*>(*next++); }
};

struct Vector {  // of integers, one for each row
    const char* data;
    Type type;
    int64_t stride;
    int64_t at(int64_t index) const { return integer_at(data, type, index * stride); }
    explicit Vector(Words& words) : data(words.address()), type(words.type()), stride(words.integer()) {}
};

struct Matrix {  // of a basis: heads, rows, and what is inside
    const char* data;
    Type type;
    int64_t rows;  // -1 where there is none
    int64_t head, row, line;
    explicit Matrix(Words& words)
        : data(words.address()),
          type(words.type()),
          rows(words.integer()),
          head(words.integer()),
          row(words.integer()),
          line(words.integer()) {}
    bool has(int64_t r) const { return rows < 0 || (0 <= r && r < rows); }
    const char* of(int64_t h, int64_t r) const { return data + (h * head + r * row) * size_of(type); }
};

struct HeadRows {  // how a head stores a token
    int64_t width, before, channels, blocks;
    Block block[MAX_BLOCKS];
};

struct Rows {  // Keys or Values of a segment
    const char* data;
    Type type;
    int64_t head_stride, token_stride, tokens;
    std::vector<HeadRows> heads;  // one for all, or one each
    Matrix decoder, delta, scale;

    explicit Rows(Words& words)
        : data(words.address()),
          type(words.type()),
          head_stride(words.integer()),
          token_stride(words.integer()),
          tokens(words.integer()),
          heads(table(words)),
          decoder(words),
          delta(words),
          scale(words) {}

    static std::vector<HeadRows> table(Words& words) {
        std::vector<HeadRows> heads(words.integer());
        for (HeadRows& head : heads) {
            head = {words.integer(), words.integer(), words.integer(), words.integer(), {}};
            for (int64_t i = 0; i < head.blocks; ++i) {
                head.block[i] = {words.integer(), words.integer(), words.integer(), words.integer()};
            }
        }
        return heads;
    }

    const HeadRows& of(int64_t head) const { return heads[heads.size() == 1 ? 0 : head]; }
    int64_t channels(int64_t head) const { return of(head).channels; }
    int64_t stride(int64_t head) const { return heads.size() == 1 ? token_stride : of(head).width; }
    const char* first(int64_t head) const {
        return data + (heads.size() == 1 ? head * head_stride : of(head).before * tokens) * size_of(type);
    }
};

enum Outside : int64_t { NOTHING, TOKENS, SLOTS, BASES };

struct Segment {
    Rows keys, values;
    Vector starts, lengths, basis_rows;
    Vector slots;     // of token j of a row, whose numbers are `stride` apart
    int64_t columns;  // that starts and lengths are within: of slots, or tokens
    int64_t max_length;
    const char* mask;
    Type mask_type;
    int64_t mask_row, mask_query, mask_token;
    double hidden;

    explicit Segment(Words& words)
        : keys(words),
          values(words),
          starts(words),
          lengths(words),
          basis_rows(words),
          slots(words),
          columns(words.integer()),
          max_length(words.integer()),
          mask(words.address()),
          mask_type(words.type()),
          mask_row(words.integer()),
          mask_query(words.integer()),
          mask_token(words.integer()) {
        std::memcpy(&hidden, words.next++, sizeof hidden);
    }

    int64_t length(int64_t row) const { return std::clamp<int64_t>(lengths.at(row), 0, max_length); }
    int64_t basis_row(int64_t row) const { return basis_rows.data ? basis_rows.at(row) : row; }
    int64_t slot(int64_t row, int64_t index) const {
        return integer_at(slots.data, slots.type, row * slots.stride + index);
    }
    // What of a row is outside of what is stored, which a kernel must not read.
    Outside outside(int64_t row) const {
        const int64_t count = length(row), start = starts.at(row);
        if (count == 0) return NOTHING;
        if (start < 0 || start > columns - count) return TOKENS;
        if (slots.data) {
            int64_t least = 0, most = 0;
            for (int64_t i = start; i < start + count; ++i) {
                least = std::min(least, slot(row, i));
                most = std::max(most, slot(row, i));
            }
            if (least < 0 || most >= keys.tokens) return SLOTS;
        }
        const int64_t basis = basis_row(row);
        return keys.decoder.has(basis) && values.decoder.has(basis) ? NOTHING : BASES;
    }
};

// Rows of numbers, whole vectors wide, and behind them AHEAD more addresses, of what is going to be read next.
struct Tile {
    const char* row[TILE + AHEAD];
    Type type;

    void copied(float* room, int count, int64_t width) {
        type = FLOAT32;
        for (int t = 0; t < count; ++t) row[t] = reinterpret_cast<const char*>(room + t * width);
    }
};

// Tokens `from` and following of a row and head: where they lie if they are numbers in whole vectors, else read to
// `room`. The row has tokens up to `end`.
void read_tile(const Segment& segment, const Rows& stored, int64_t row, int64_t head, int64_t from, int count,
               int64_t end, float* room, Tile& tile) {
    const HeadRows& own = stored.of(head);
    const int64_t width = padded(own.channels), bytes = stored.stride(head) * size_of(stored.type);
    const int64_t start = segment.starts.at(row) + from;
    const char* first = stored.first(head);
    const int known = int(std::min<int64_t>(count + AHEAD, end - from));
    if (segment.slots.data) {
        for (int t = 0; t < known; ++t) tile.row[t] = first + segment.slot(row, start + t) * bytes;
    } else {
        for (int t = 0; t < known; ++t) tile.row[t] = first + (start + t) * bytes;
    }
    for (int t = known; t < count + AHEAD; ++t) tile.row[t] = tile.row[known - 1];
    tile.type = stored.type;
    if (own.blocks == 0 && own.channels == width) return;
    for (int t = 0; t < count; ++t) __builtin_prefetch(tile.row[t + AHEAD]);
    if (own.blocks == 0) {
        for (int t = 0; t < count; ++t) read_numbers(tile.row[t], stored.type, own.channels, room + t * width);
    }
    for (int64_t i = 0; i < own.blocks; ++i) {
        const Block& block = own.block[i];
        switch (block.bits) {
            case 8: read_block<8>(tile.row, count, block, room, width); break;
            case 4: read_block<4>(tile.row, count, block, room, width); break;
            default: read_block<2>(tile.row, count, block, room, width);
        }
    }
    if (own.channels < width) {
        for (int t = 0; t < count; ++t) std::fill(room + t * width + own.channels, room + (t + 1) * width, 0.0f);
    }
    tile.copied(room, count, width);
}

// Lines `from` and following of a decoder.
void read_decoder(const Matrix& decoder, const char* first, int64_t from, int count, int64_t channels, float* room,
                  Tile& tile) {
    const int64_t width = padded(channels);
    for (int t = 0; t < count; ++t) {
        float* line = room + t * width;
        read_numbers(first + (from + t) * decoder.line * size_of(decoder.type), decoder.type, channels, line);
        std::fill(line + channels, line + width, 0.0f);
    }
    tile.copied(room, count, width);
    std::fill(tile.row + count, tile.row + count + AHEAD, tile.row[0]);
}

}  // namespace
