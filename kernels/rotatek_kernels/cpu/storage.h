// What segments store, and tokens of it as numbers. The fields of structures are declared in cpu_layout.py.

#pragma once

#include <algorithm>

#include "numbers.h"

namespace {

constexpr int TILE = 64;   // tokens
constexpr int AHEAD = 32;  // tokens that are fetched before they are met: memory is slow to answer

struct Block {
    BLOCK_FIELDS
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

struct Form {
    FORM_FIELDS
    const Block& block(int64_t index) const { return reinterpret_cast<const Block*>(blocks)[index]; }
};

struct Vector {
    VECTOR_FIELDS
    int64_t at(int64_t index) const { return integer_at(data, type, index * stride); }
};

struct Matrix {
    MATRIX_FIELDS
    bool has(int64_t r) const { return rows < 0 || (0 <= r && r < rows); }
    const char* of(int64_t h, int64_t r) const { return data + (h * head + r * row) * size_of(type); }
};

struct Stored {
    STORED_FIELDS
    const Form& of(int64_t head) const { return reinterpret_cast<const Form*>(forms)[form_count == 1 ? 0 : head]; }
    int64_t channels(int64_t head) const { return of(head).channels; }
    int64_t stride(int64_t head) const { return form_count == 1 ? token_stride : of(head).width; }
    const char* first(int64_t head) const {
        return data + (form_count == 1 ? head * head_stride : of(head).before * tokens) * size_of(type);
    }
    int64_t widest() const {
        int64_t channels = 0;
        for (int64_t i = 0; i < form_count; ++i) channels = std::max(channels, of(i).channels);
        return channels;
    }
};

enum Outside : int64_t { NOTHING, TOKENS, SLOTS, BASES };

struct Segment {
    SEGMENT_FIELDS

    int64_t length(int64_t row) const { return std::clamp<int64_t>(lengths.at(row), 0, max_length); }
    int64_t basis_row(int64_t row) const { return basis_rows.data ? basis_rows.at(row) : row; }
    int64_t slot(int64_t row, int64_t index) const {
        return integer_at(slots.data, slots.type, row * slots.stride + index);
    }
    // Of a row, what lies outside of what is stored, which a kernel must not read.
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

static_assert(sizeof(Block) == BLOCK_SIZE && sizeof(Form) == FORM_SIZE && sizeof(Vector) == VECTOR_SIZE &&
                  sizeof(Matrix) == MATRIX_SIZE && sizeof(Stored) == STORED_SIZE && sizeof(Segment) == SEGMENT_SIZE,
              "a structure holds more than the fields that Python writes");

// Tokens as numbers, whole vectors wide, and behind them AHEAD more addresses, of what is going to be read next.
struct Tile {
    const char* token[TILE + AHEAD];
    Type type;

    void copied(float* buffer, int count, int64_t width) {
        type = FLOAT32;
        for (int t = 0; t < count; ++t) token[t] = reinterpret_cast<const char*>(buffer + t * width);
    }
};

// Tokens `from` and following of a row and head: where they lie if they are numbers in whole vectors, else read to
// `buffer`. The row has tokens up to `end`.
void read_tile(const Segment& segment, const Stored& stored, int64_t row, int64_t head, int64_t from, int count,
               int64_t end, float* buffer, Tile& tile) {
    const Form& own = stored.of(head);
    const int64_t width = padded(own.channels), bytes = stored.stride(head) * size_of(stored.type);
    const int64_t start = segment.starts.at(row) + from;
    const char* first = stored.first(head);
    const int known = int(std::min<int64_t>(count + AHEAD, end - from));
    if (segment.slots.data) {
        for (int t = 0; t < known; ++t) tile.token[t] = first + segment.slot(row, start + t) * bytes;
    } else {
        for (int t = 0; t < known; ++t) tile.token[t] = first + (start + t) * bytes;
    }
    for (int t = known; t < count + AHEAD; ++t) tile.token[t] = tile.token[known - 1];
    tile.type = stored.type;
    if (own.block_count == 0 && own.channels == width) return;
    for (int t = 0; t < count; ++t) __builtin_prefetch(tile.token[t + AHEAD]);
    if (own.block_count == 0) {
        for (int t = 0; t < count; ++t) read_numbers(tile.token[t], stored.type, own.channels, buffer + t * width);
    }
    for (int64_t i = 0; i < own.block_count; ++i) {
        const Block& block = own.block(i);
        switch (block.bits) {
            case 8: read_block<8>(tile.token, count, block, buffer, width); break;
            case 4: read_block<4>(tile.token, count, block, buffer, width); break;
            default: read_block<2>(tile.token, count, block, buffer, width);
        }
    }
    if (own.channels < width) {
        for (int t = 0; t < count; ++t) std::fill(buffer + t * width + own.channels, buffer + (t + 1) * width, 0.0f);
    }
    tile.copied(buffer, count, width);
}

// Lines `from` and following of a decoder.
void read_decoder(const Matrix& decoder, const char* first, int64_t from, int count, int64_t channels, float* buffer,
                  Tile& tile) {
    const int64_t width = padded(channels);
    for (int t = 0; t < count; ++t) {
        float* line = buffer + t * width;
        read_numbers(first + (from + t) * decoder.line * size_of(decoder.type), decoder.type, channels, line);
        std::fill(line + channels, line + width, 0.0f);
    }
    tile.copied(buffer, count, width);
    std::fill(tile.token + count, tile.token + count + AHEAD, tile.token[0]);
}

}  // namespace
