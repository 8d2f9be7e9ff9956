// Attention over segment views on a CPU, decoded from what the segments store.
//
// The tokens that a row and KV head see are cut into pieces. A piece goes through its tokens tile by tile: all queries
// of the head meet them in the first-level cache, where an online softmax keeps what is summed of the Values. Rows of
// numbers are read where they lie if they are whole vectors; others, and codes, become rows of float32 beside them.
// What the pieces of a row and head found is merged by its log-sum-exp, and coefficients of Values are rotated back
// once.
//
// All inner loops are two: products of rows (`dots`: scores, and rotating back) and weighted sums of rows (`sums`:
// outputs, and projecting queries). Vectors are as wide as those of the processor this is compiled for.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int TILE = 64;                  // tokens
constexpr int AHEAD = 32;                 // rows that are fetched before they are met: memory is slow to answer
constexpr int QUERIES = 64;               // of a piece; more of them are several pieces
constexpr int LEAST_PIECE = 128;          // tokens; a piece has a state to be merged
constexpr int PIECES = 4;                 // wanted for each thread, so that none waits long for the last
constexpr int64_t THREAD_WORK = 1 << 18;  // products that make another thread worth waking
constexpr int MAX_BLOCKS = 3;             // of codes: 8, 4 and 2 bits
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

constexpr int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

inline Floats all(float number) { return number - Floats{}; }

// ---- numbers ----

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16, INT8, UINT8, INT32, INT64, BOOL, FLOAT64 };

inline int64_t size_of(Type type) {
    switch (type) {
        case INT8:
        case UINT8:
        case BOOL: return 1;
        case BFLOAT16:
        case FLOAT16: return 2;
        case FLOAT32:
        case INT32: return 4;
        default: return 8;
    }
}

inline float as_float(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

inline uint32_t bits_of(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}

struct Brain {  // bfloat16
    uint16_t bits;

    Brain() = default;
    explicit Brain(float number) {
        const uint32_t wide = bits_of(number);
        if (number != number) {
            bits = uint16_t(wide >> 16 | 0x40);
        } else {
            bits = uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);  // to the nearest, ties to even
        }
    }
    operator float() const { return as_float(uint32_t(bits) << 16); }
};

struct Half {  // float16
    uint16_t bits;

    Half() = default;
    explicit Half(float number) {
        const uint32_t wide = bits_of(number), magnitude = wide & 0x7fffffff;
        uint32_t half;
        if (magnitude > 0x7f800000) {
            half = 0x7e00;  // not a number
        } else if (magnitude >= 0x477ff000) {
            half = 0x7c00;                    // rounds to more than the largest
        } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the lowest bits
            half = bits_of(as_float(magnitude) + 0.5f) - 0x3f000000;
        } else {
            half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
        }
        bits = uint16_t((wide >> 16 & 0x8000) | half);
    }
    operator float() const {
        const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
        const float scaled = as_float(magnitude) * 0x1p112f;  // subnormal numbers come out right
        const float number = magnitude >= (0x7c00u << 13) ? as_float(magnitude | 0x7f800000u) : scaled;
        return bits & 0x8000 ? -number : number;
    }
};

inline Floats load(const float* from) {
    Floats vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline Floats load(const Brain* from) {
    typedef uint16_t Stored __attribute__((vector_size(LANES * 2)));
    Stored stored;
    std::memcpy(&stored, from, sizeof stored);
    const Ints bits = __builtin_convertvector(stored, Ints) << 16;
    Floats vector;
    std::memcpy(&vector, &bits, sizeof vector);
    return vector;
}

inline Floats load(const Half* from) {
#if defined(__AVX512F__)
    return Floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__) && defined(__AVX2__)
    return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Floats vector;
    for (int i = 0; i < LANES; ++i) vector[i] = from[i];
    return vector;
#endif
}

inline void store(float* to, Floats vector) { std::memcpy(to, &vector, sizeof vector); }

template <typename Number>
inline Number at(const char* data, int64_t index) {
    return reinterpret_cast<const Number*>(data)[index];
}

inline float number_at(const char* data, Type type, int64_t index) {
    switch (type) {
        case FLOAT32: return at<float>(data, index);
        case BFLOAT16: return at<Brain>(data, index);
        case FLOAT16: return at<Half>(data, index);
        case FLOAT64: return float(at<double>(data, index));
        default: return at<int8_t>(data, index);
    }
}

inline int64_t integer_at(const char* data, Type type, int64_t index) {
    return type == INT32 ? at<int32_t>(data, index) : at<int64_t>(data, index);
}

inline void write_number(char* data, Type type, int64_t index, float number) {
    switch (type) {
        case BFLOAT16: reinterpret_cast<Brain*>(data)[index] = Brain(number); break;
        case FLOAT16: reinterpret_cast<Half*>(data)[index] = Half(number); break;
        default: reinterpret_cast<float*>(data)[index] = number;
    }
}

template <typename Number>
inline void read_as(const char* data, int64_t width, float* to) {
    for (int64_t i = 0; i < width; ++i) to[i] = at<Number>(data, i);
}

inline void read_numbers(const char* data, Type type, int64_t width, float* to) {
    switch (type) {
        case FLOAT32: return read_as<float>(data, width, to);
        case BFLOAT16: return read_as<Brain>(data, width, to);
        case FLOAT16: return read_as<Half>(data, width, to);
        default: return read_as<int8_t>(data, width, to);
    }
}

// ---- codes ----

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

// ---- what a segment is: Python's words in order ----

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

// ---- the two products ----

// Lane i of the result: the sum of all lanes of vectors[i].
template <int SIZE>
__attribute__((always_inline)) inline void fold(Floats* vectors) {
    if constexpr (SIZE > 0) {
        Ints lower, upper;  // of each group of 2 * SIZE lanes, the halves: of the first vector, then of the second
        for (int i = 0; i < LANES; ++i) {
            const int group = i / (2 * SIZE) * (2 * SIZE), second = i % (2 * SIZE) >= SIZE;
            lower[i] = group + i % SIZE + second * LANES;
            upper[i] = lower[i] + SIZE;
        }
#pragma GCC unroll 16
        for (int i = 0; i < SIZE; ++i) {
            const Floats x = vectors[i], y = vectors[i + SIZE];
#if defined(__clang__)
            Floats low, high;
            for (int j = 0; j < LANES; ++j) {
                low[j] = lower[j] < LANES ? x[lower[j] % LANES] : y[lower[j] % LANES];
                high[j] = upper[j] < LANES ? x[upper[j] % LANES] : y[upper[j] % LANES];
            }
            vectors[i] = low + high;
#else
            vectors[i] = __builtin_shuffle(x, y, lower) + __builtin_shuffle(x, y, upper);
#endif
        }
        fold<SIZE / 2>(vectors);
    }
}

// scores[m][t] = queries[m] . rows[t], of M queries and LANES / M rows.
template <typename Number, int M>
inline __attribute__((always_inline)) void dots_of(const float* queries, int64_t query_stride, const char* const* rows,
                                                   int64_t width, float* scores, int64_t score_stride) {
    constexpr int ROWS = LANES / M;
    Floats sums[LANES] = {};
    for (int64_t i = 0; i < width; i += LANES) {
        Floats query[M];
        for (int m = 0; m < M; ++m) query[m] = load(queries + m * query_stride + i);
        for (int t = 0; t < ROWS; ++t) {
            const Floats numbers = load(reinterpret_cast<const Number*>(rows[t]) + i);
            __builtin_prefetch(reinterpret_cast<const Number*>(rows[t + AHEAD]) + i);
            for (int m = 0; m < M; ++m) sums[m * ROWS + t] += query[m] * numbers;
        }
    }
    fold<LANES / 2>(sums);
    for (int m = 0; m < M; ++m) {
        std::memcpy(scores + m * score_stride, reinterpret_cast<float*>(sums) + m * ROWS, ROWS * sizeof(float));
    }
}

template <typename Number, int M>
void dots_of_rows(const float* queries, int64_t query_stride, const Tile& tile, int count, int64_t width, float* scores,
                  int64_t score_stride) {
    constexpr int ROWS = LANES / M;
    int t = 0;
    for (; t + ROWS <= count; t += ROWS) {
        dots_of<Number, M>(queries, query_stride, tile.row + t, width, scores + t, score_stride);
    }
    if (t < count) {  // fewer rows than a product takes: the last one again, for which the scores have room
        const char* rows[ROWS + AHEAD];
        for (int i = 0; i < ROWS + AHEAD; ++i) rows[i] = tile.row[std::min(t + i, count - 1)];
        dots_of<Number, M>(queries, query_stride, rows, width, scores + t, score_stride);
    }
}

template <typename Number>
void dots_as(const float* queries, int64_t query_stride, int n, const Tile& tile, int count, int64_t width,
             float* scores, int64_t score_stride) {
    int m = 0;
    for (; m + 4 <= n; m += 4) {
        dots_of_rows<Number, 4>(queries + m * query_stride, query_stride, tile, count, width, scores + m * score_stride,
                                score_stride);
    }
    if (m + 2 <= n) {
        dots_of_rows<Number, 2>(queries + m * query_stride, query_stride, tile, count, width, scores + m * score_stride,
                                score_stride);
        m += 2;
    }
    if (m < n) {
        dots_of_rows<Number, 1>(queries + m * query_stride, query_stride, tile, count, width, scores + m * score_stride,
                                score_stride);
    }
}

// scores [n, count] of queries [n, width] against the rows of a tile; a row of scores has room for whole vectors.
void dots(const float* queries, int64_t query_stride, int n, const Tile& tile, int count, int64_t width, float* scores,
          int64_t score_stride) {
    switch (tile.type) {
        case BFLOAT16: return dots_as<Brain>(queries, query_stride, n, tile, count, width, scores, score_stride);
        case FLOAT16: return dots_as<Half>(queries, query_stride, n, tile, count, width, scores, score_stride);
        default: return dots_as<float>(queries, query_stride, n, tile, count, width, scores, score_stride);
    }
}

// sums[m] = factors[m] * sums[m] + sum over t of weights[m][t] * rows[t], for M sums and VECTORS vectors of each, from
// column `column` of the rows on.
template <typename Number, int M, int VECTORS>
inline void sums_of(const float* weights, int64_t weight_stride, const Tile& tile, int count, int64_t column,
                    const float* factors, float* sums, int64_t sum_stride) {
    Floats held[M][VECTORS] = {};  // of the tile alone: thousands of tokens added up one by one would lose digits
    for (int t = 0; t < count; ++t) {
        const Number* row = reinterpret_cast<const Number*>(tile.row[t]) + column;
        const Number* next = reinterpret_cast<const Number*>(tile.row[t + AHEAD]) + column;
        Floats numbers[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            numbers[v] = load(row + v * LANES);
            __builtin_prefetch(next + v * LANES);
        }
        for (int m = 0; m < M; ++m) {
            const Floats weight = all(weights[m * weight_stride + t]);
            for (int v = 0; v < VECTORS; ++v) held[m][v] += weight * numbers[v];
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < VECTORS; ++v) {
            float* sum = sums + m * sum_stride + column + v * LANES;
            store(sum, load(sum) * all(factors[m]) + held[m][v]);
        }
    }
}

template <typename Number, int M, int VECTORS>
void sums_of_columns(const float* weights, int64_t weight_stride, const Tile& tile, int count, int64_t column,
                     const float* factors, float* sums, int64_t sum_stride, int64_t width) {
    for (; column + VECTORS * LANES <= width; column += VECTORS * LANES) {
        sums_of<Number, M, VECTORS>(weights, weight_stride, tile, count, column, factors, sums, sum_stride);
    }
    if constexpr (VECTORS > 1) {
        if (column < width) {
            sums_of_columns<Number, M, VECTORS / 2>(weights, weight_stride, tile, count, column, factors, sums,
                                                    sum_stride, width);
        }
    }
}

template <typename Number>
void sums_as(const float* weights, int64_t weight_stride, int n, const Tile& tile, int count, const float* factors,
             float* sums, int64_t sum_stride, int64_t width) {
    int m = 0;
    for (; m + 4 <= n; m += 4) {
        sums_of_columns<Number, 4, LANES / 4>(weights + m * weight_stride, weight_stride, tile, count, 0, factors + m,
                                              sums + m * sum_stride, sum_stride, width);
    }
    if (m + 2 <= n) {
        sums_of_columns<Number, 2, LANES / 2>(weights + m * weight_stride, weight_stride, tile, count, 0, factors + m,
                                              sums + m * sum_stride, sum_stride, width);
        m += 2;
    }
    if (m < n) {
        sums_of_columns<Number, 1, LANES / 2>(weights + m * weight_stride, weight_stride, tile, count, 0, factors + m,
                                              sums + m * sum_stride, sum_stride, width);
    }
}

// Weighted sums of the rows of a tile, added to `sums` [n, width] times `factors` [n].
void sums(const float* weights, int64_t weight_stride, int n, const Tile& tile, int count, const float* factors,
          float* sums, int64_t sum_stride, int64_t width) {
    switch (tile.type) {
        case BFLOAT16: return sums_as<Brain>(weights, weight_stride, n, tile, count, factors, sums, sum_stride, width);
        case FLOAT16: return sums_as<Half>(weights, weight_stride, n, tile, count, factors, sums, sum_stride, width);
        default: return sums_as<float>(weights, weight_stride, n, tile, count, factors, sums, sum_stride, width);
    }
}

// exp of numbers up to 0, to 2 units in the last place; 0 for what would be subnormal. A polynomial of degree 6 for
// exp(x) on |x| <= ln(2) / 2, after the multiple of ln(2) is taken out in two parts.
inline Floats exponential(Floats x) {
    const Ints tiny = x < all(-87.0f);
    x = tiny ? all(0.0f) : x;
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
    const Floats shifted = x * all(1.44269504088896341f) + magic;
    const Floats whole = shifted - magic;
    const Floats r = (x - whole * all(0.693359375f)) - whole * all(-2.12194440e-4f);
    Floats sum = all(1.0f / 720);
    sum = sum * r + all(1.0f / 120);
    sum = sum * r + all(1.0f / 24);
    sum = sum * r + all(1.0f / 6);
    sum = sum * r + all(0.5f);
    sum = sum * r + all(1.0f);
    sum = sum * r + all(1.0f);
    const Ints power = __builtin_convertvector(whole, Ints) + 127;
    Floats scale;
    const Ints bits = power << 23;
    std::memcpy(&scale, &bits, sizeof scale);
    return tiny ? all(0.0f) : sum * scale;
}

// ---- attention ----

struct Problem {
    const char* query;
    Type type;
    int64_t batch, heads, group, queries, width, value_width;
    int64_t query_row, query_head, query_position;
    char* out;
    float* lse;
    int64_t threads;
    double scale;
    std::vector<Segment> segments;
};

struct Piece {
    int64_t row, head, segment, query, queries;  // of `group * queries`, the first and how many
    int64_t from, to;
};

// Queries [n, padded(channels)] as they meet what a segment stores, scaled, and what all its logits have in common.
void project(const Problem& problem, const Segment& segment, const Piece& piece, float* projected, float* shifts,
             float* room) {
    const int64_t n = piece.queries, width = padded(problem.width);
    std::vector<float> plain(n * width, 0.0f);
    for (int64_t m = 0; m < n; ++m) {
        const int64_t index = piece.query + m, head = piece.head * problem.group + index / problem.queries;
        const int64_t offset = piece.row * problem.query_row + head * problem.query_head +
                               index % problem.queries * problem.query_position;
        read_numbers(problem.query + offset * size_of(problem.type), problem.type, problem.width, &plain[m * width]);
        for (int64_t i = 0; i < problem.width; ++i) plain[m * width + i] *= float(problem.scale);
    }
    std::fill(shifts, shifts + n, 0.0f);
    const Rows& keys = segment.keys;
    if (!keys.decoder.data) {
        std::copy(plain.begin(), plain.end(), projected);
        return;
    }
    const int64_t basis_row = segment.basis_row(piece.row), channels = keys.channels(piece.head);
    const int64_t inner = padded(channels);
    if (keys.delta.data) {
        const char* delta = keys.delta.of(piece.head, basis_row);
        for (int64_t m = 0; m < n; ++m) {
            float sum = 0;
            for (int64_t i = 0; i < problem.width; ++i) {
                sum += plain[m * width + i] * number_at(delta, keys.delta.type, i);
            }
            shifts[m] = sum;
        }
    }
    std::fill(projected, projected + n * inner, 0.0f);
    const std::vector<float> ones(n, 1.0f);
    const char* decoder = keys.decoder.of(piece.head, basis_row);
    Tile tile;
    for (int64_t d = 0; d < problem.width; d += TILE) {
        const int count = int(std::min<int64_t>(TILE, problem.width - d));
        read_decoder(keys.decoder, decoder, d, count, channels, room, tile);
        sums(&plain[d], width, int(n), tile, count, ones.data(), projected, inner, inner);
    }
    if (keys.scale.data) {
        const char* scale = keys.scale.of(piece.head, basis_row);
        for (int64_t i = 0; i < channels; ++i) {
            const float factor = number_at(scale, keys.scale.type, i);
            for (int64_t m = 0; m < n; ++m) projected[m * inner + i] *= factor;
        }
    }
}

// Adds a mask to scores [n, TILE], or hides with it.
void hide(const Problem& problem, const Segment& segment, const Piece& piece, int64_t from, int count, float* scores) {
    for (int64_t m = 0; m < piece.queries; ++m) {
        const int64_t query = (piece.query + m) % problem.queries;
        const int64_t first = piece.row * segment.mask_row + query * segment.mask_query + from * segment.mask_token;
        float* of_query = scores + m * TILE;
        for (int t = 0; t < count; ++t) {
            const int64_t index = first + t * segment.mask_token;
            if (segment.mask_type == BOOL) {
                if (!segment.mask[index]) of_query[t] = NONE;
            } else {
                const float number = number_at(segment.mask, segment.mask_type, index);
                of_query[t] = number <= segment.hidden ? NONE : of_query[t] + number;
            }
        }
    }
}

// Scratch memory of a thread.
struct Scratch {
    std::unique_ptr<float[]> room, scores, projected;
    explicit Scratch(int64_t widest)
        : room(new float[TILE * widest]), scores(new float[QUERIES * TILE]), projected(new float[QUERIES * widest]) {}
};

// The state of a piece: sums [n, width] of Values with weights exp(logit - most), the greatest logits, sums of weights.
void attend(const Problem& problem, const Piece& piece, Scratch& scratch, float* state, int64_t width, float* most,
            float* total) {
    const Segment& segment = problem.segments[piece.segment];
    const int64_t n = piece.queries, inner = padded(segment.keys.channels(piece.head));
    const int64_t value_width = padded(segment.values.channels(piece.head));
    float shifts[QUERIES], factors[QUERIES];
    Tile tile;
    std::fill(state, state + n * width, 0.0f);
    std::fill(most, most + n, NONE);
    std::fill(total, total + n, 0.0f);
    if (piece.from == piece.to) return;  // a row without tokens, whose basis may be none
    project(problem, segment, piece, scratch.projected.get(), shifts, scratch.room.get());
    for (int64_t from = piece.from; from < piece.to; from += TILE) {
        const int count = int(std::min<int64_t>(TILE, piece.to - from));
        float* scores = scratch.scores.get();
        read_tile(segment, segment.keys, piece.row, piece.head, from, count, piece.to, scratch.room.get(), tile);
        dots(scratch.projected.get(), inner, int(n), tile, count, inner, scores, TILE);
        if (segment.mask) hide(problem, segment, piece, from, count, scores);
        for (int64_t m = 0; m < n; ++m) {
            float* of_query = scores + m * TILE;
            for (int t = count; t < padded(count); ++t) of_query[t] = NONE;
            Floats greatest = load(of_query);
            for (int t = LANES; t < count; t += LANES) {
                const Floats next = load(of_query + t);
                greatest = next > greatest ? next : greatest;
            }
            float peak = greatest[0];
            for (int i = 1; i < LANES; ++i) peak = std::max(peak, greatest[i]);
            peak = std::max(most[m], peak + shifts[m]);
            const float base = peak == NONE ? 0.0f : peak;
            factors[m] = std::exp(most[m] - base);
            most[m] = peak;
            Floats sum = {};
            for (int t = 0; t < count; t += LANES) {
                const Floats weights = exponential(load(of_query + t) + all(shifts[m] - base));
                store(of_query + t, weights);
                sum += weights;
            }
            float added = 0;
            for (int i = 0; i < LANES; ++i) added += sum[i];
            total[m] = total[m] * factors[m] + added;
        }
        read_tile(segment, segment.values, piece.row, piece.head, from, count, piece.to, scratch.room.get(), tile);
        sums(scores, TILE, int(n), tile, count, factors, state, width, value_width);
    }
}

struct States {
    int64_t width;
    std::vector<int64_t> first;  // of a piece's queries among all
    std::unique_ptr<float[]> sums, most, total;
};

// Output and log-sum-exp of pieces `from` to `to`, which are those of some queries of a row and head.
void merge(const Problem& problem, const std::vector<Piece>& pieces, std::size_t from, std::size_t to,
           const States& states, Scratch& scratch) {
    const Piece& one = pieces[from];
    const int64_t n = one.queries, value_width = problem.value_width;
    std::vector<float> peaks(n, NONE), totals(n, 0.0f), out(n * padded(value_width) + LANES, 0.0f), held(n);
    std::vector<float> sum(n * states.width), products(n * TILE);
    Tile tile;
    for (std::size_t i = from; i < to; ++i) {
        for (int64_t m = 0; m < n; ++m) peaks[m] = std::max(peaks[m], states.most[states.first[i] + m]);
    }
    for (std::size_t i = from; i < to;) {
        if (pieces[i].from == pieces[i].to) {
            ++i;
            continue;
        }
        const Segment& segment = problem.segments[pieces[i].segment];
        std::fill(sum.begin(), sum.end(), 0.0f);
        std::fill(held.begin(), held.end(), 0.0f);
        const Rows& values = segment.values;
        const int64_t channels = values.channels(one.head), inner = padded(channels);
        const int64_t index = pieces[i].segment;
        for (; i < to && pieces[i].segment == index; ++i) {
            for (int64_t m = 0; m < n; ++m) {
                const int64_t state = states.first[i] + m;
                if (states.total[state] == 0) continue;
                const float weight = std::exp(states.most[state] - peaks[m]);
                held[m] += weight * states.total[state];
                const float* numbers = &states.sums[state * states.width];
                for (int64_t d = 0; d < inner; ++d) sum[m * states.width + d] += weight * numbers[d];
            }
        }
        for (int64_t m = 0; m < n; ++m) totals[m] += held[m];
        if (!values.decoder.data) {
            for (int64_t m = 0; m < n; ++m) {
                for (int64_t d = 0; d < value_width; ++d) out[m * value_width + d] += sum[m * states.width + d];
            }
            continue;
        }
        const int64_t basis_row = segment.basis_row(one.row);
        if (values.scale.data) {
            const char* scale = values.scale.of(one.head, basis_row);
            for (int64_t c = 0; c < channels; ++c) {
                const float factor = number_at(scale, values.scale.type, c);
                for (int64_t m = 0; m < n; ++m) sum[m * states.width + c] *= factor;
            }
        }
        const char* decoder = values.decoder.of(one.head, basis_row);
        for (int64_t d = 0; d < value_width; d += TILE) {
            const int count = int(std::min<int64_t>(TILE, value_width - d));
            read_decoder(values.decoder, decoder, d, count, channels, scratch.room.get(), tile);
            dots(sum.data(), states.width, int(n), tile, count, inner, products.data(), TILE);
            for (int64_t m = 0; m < n; ++m) {
                for (int t = 0; t < count; ++t) out[m * value_width + d + t] += products[m * TILE + t];
            }
        }
        if (values.delta.data) {
            const char* delta = values.delta.of(one.head, basis_row);
            for (int64_t d = 0; d < value_width; ++d) {
                const float number = number_at(delta, values.delta.type, d);
                for (int64_t m = 0; m < n; ++m) out[m * value_width + d] += held[m] * number;
            }
        }
    }
    const int64_t q_heads = problem.heads * problem.group;
    for (int64_t m = 0; m < n; ++m) {
        const int64_t index = one.query + m, position = index % problem.queries;
        const int64_t head = one.head * problem.group + index / problem.queries;
        problem.lse[(one.row * q_heads + head) * problem.queries + position] =
            totals[m] == 0 ? NONE : peaks[m] + std::log(totals[m]);
        const float factor = totals[m] == 0 ? 0.0f : 1 / totals[m];
        const int64_t first = ((one.row * problem.queries + position) * q_heads + head) * value_width;
        for (int64_t d = 0; d < value_width; ++d) {
            write_number(problem.out, problem.type, first + d, out[m * value_width + d] * factor);
        }
    }
}

// Products of numbers, about.
int64_t work_of(const Problem& problem) {
    int64_t numbers = 0;
    for (const Segment& segment : problem.segments) {
        int64_t tokens = 0, channels = 0;
        for (int64_t row = 0; row < problem.batch; ++row) tokens += segment.length(row);
        for (int64_t head = 0; head < problem.heads; ++head) {
            channels += segment.keys.channels(head) + segment.values.channels(head);
        }
        numbers += tokens * channels;
    }
    return numbers * problem.group * problem.queries;
}

// Pieces of all rows and heads, those of the same queries side by side, and where each such run begins.
std::vector<Piece> cut(const Problem& problem, std::vector<std::size_t>& runs) {
    std::vector<Piece> pieces;
    const int64_t all_queries = problem.group * problem.queries;
    const int64_t blocks = (all_queries + QUERIES - 1) / QUERIES;
    int64_t tokens = 0;
    for (const Segment& segment : problem.segments) {
        for (int64_t row = 0; row < problem.batch; ++row) tokens += segment.length(row);
    }
    const int64_t wanted = tokens * problem.heads * blocks / std::max<int64_t>(1, problem.threads * PIECES) + 1;
    const int64_t longest = (std::max<int64_t>(LEAST_PIECE, wanted) + TILE - 1) / TILE * TILE;
    for (int64_t row = 0; row < problem.batch; ++row) {
        for (int64_t head = 0; head < problem.heads; ++head) {
            for (int64_t query = 0; query < all_queries; query += QUERIES) {
                runs.push_back(pieces.size());
                const int64_t n = std::min<int64_t>(QUERIES, all_queries - query);
                for (std::size_t s = 0; s < problem.segments.size(); ++s) {
                    const int64_t length = problem.segments[s].length(row);
                    for (int64_t from = 0; from < length || (s == 0 && from == 0); from += longest) {
                        const int64_t to = std::min(length, from + longest);
                        pieces.push_back({row, head, int64_t(s), query, n, from, to});
                    }
                }
            }
        }
    }
    runs.push_back(pieces.size());
    return pieces;
}

}  // namespace

// 0 if all could be read; else nothing is written, and it is (segment * batch + row) * 4 + what of it is outside.
extern "C" int64_t rotatek_attend(const int64_t* described, double scale) {
    Words words{described};
    Problem problem;
    problem.query = words.address();
    problem.type = words.type();
    problem.batch = words.integer();
    problem.heads = words.integer();
    problem.group = words.integer();
    problem.queries = words.integer();
    problem.width = words.integer();
    problem.value_width = words.integer();
    problem.query_row = words.integer();
    problem.query_head = words.integer();
    problem.query_position = words.integer();
    problem.out = const_cast<char*>(words.address());
    problem.lse = reinterpret_cast<float*>(const_cast<char*>(words.address()));
    problem.threads = words.integer();
    problem.scale = scale;
    const int64_t count = words.integer();
    int64_t widest = padded(std::max(problem.width, problem.value_width)), state_width = padded(problem.value_width);
    for (int64_t s = 0; s < count; ++s) {
        problem.segments.emplace_back(words);
        for (const HeadRows& head : problem.segments.back().keys.heads)
            widest = std::max(widest, padded(head.channels));
        for (const HeadRows& head : problem.segments.back().values.heads) {
            state_width = std::max(state_width, padded(head.channels));
        }
    }
    for (int64_t s = 0; s < count; ++s) {
        for (int64_t row = 0; row < problem.batch; ++row) {
            const Outside outside = problem.segments[s].outside(row);
            if (outside != NOTHING) return (s * problem.batch + row) * 4 + outside;
        }
    }
    widest = std::max(widest, state_width);
    problem.threads = std::clamp<int64_t>(work_of(problem) / THREAD_WORK, 1, problem.threads);
    std::vector<std::size_t> runs;
    const std::vector<Piece> pieces = cut(problem, runs);
    const std::size_t last_run = runs.size() - 1;
    States states{state_width, {}, {}, {}, {}};
    int64_t total = 0;
    for (const Piece& piece : pieces) {
        states.first.push_back(total);
        total += piece.queries;
    }
    states.sums.reset(new float[total * state_width]);
    states.most.reset(new float[total]);
    states.total.reset(new float[total]);
#pragma omp parallel num_threads(int(problem.threads))
    {
        Scratch scratch(widest);
#pragma omp for schedule(dynamic)
        for (std::size_t i = 0; i < pieces.size(); ++i) {
            const int64_t first = states.first[i];
            attend(problem, pieces[i], scratch, &states.sums[first * state_width], state_width, &states.most[first],
                   &states.total[first]);
        }
#pragma omp for schedule(static)
        for (std::size_t i = 0; i < last_run; ++i) {
            merge(problem, pieces, runs[i], runs[i + 1], states, scratch);
        }
    }
    return 0;
}
