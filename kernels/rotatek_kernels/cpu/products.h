// The inner loops: products of tokens (`dots`: scores, and rotating back), weighted sums of tokens (`sums`: outputs,
// and projecting queries), and exponentials.

#pragma once

#include "storage.h"

namespace {

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

// scores[m][t] = queries[m] . tokens[t], of M queries and LANES / M tokens.
template <typename Number, int M>
inline __attribute__((always_inline)) void dots_of(const float* queries, int64_t query_stride,
                                                   const char* const* tokens, int64_t width, float* scores,
                                                   int64_t score_stride) {
    constexpr int TOKENS = LANES / M;
    Floats sums[LANES] = {};
    for (int64_t i = 0; i < width; i += LANES) {
        Floats query[M];
        for (int m = 0; m < M; ++m) query[m] = load(queries + m * query_stride + i);
        for (int t = 0; t < TOKENS; ++t) {
            const Floats numbers = load(reinterpret_cast<const Number*>(tokens[t]) + i);
            __builtin_prefetch(reinterpret_cast<const Number*>(tokens[t + AHEAD]) + i);
            for (int m = 0; m < M; ++m) sums[m * TOKENS + t] += query[m] * numbers;
        }
    }
    fold<LANES / 2>(sums);
    for (int m = 0; m < M; ++m) {
        std::memcpy(scores + m * score_stride, reinterpret_cast<float*>(sums) + m * TOKENS, TOKENS * sizeof(float));
    }
}

template <typename Number, int M>
void dots_of_tokens(const float* queries, int64_t query_stride, const Tile& tile, int count, int64_t width,
                    float* scores, int64_t score_stride) {
    constexpr int TOKENS = LANES / M;
    int t = 0;
    for (; t + TOKENS <= count; t += TOKENS) {
        dots_of<Number, M>(queries, query_stride, tile.token + t, width, scores + t, score_stride);
    }
    if (t < count) {  // fewer tokens than a product takes: the last one again, for which there is space in the scores
        const char* tokens[TOKENS + AHEAD];
        for (int i = 0; i < TOKENS + AHEAD; ++i) tokens[i] = tile.token[std::min(t + i, count - 1)];
        dots_of<Number, M>(queries, query_stride, tokens, width, scores + t, score_stride);
    }
}

template <typename Number>
void dots_as(const float* queries, int64_t query_stride, int n, const Tile& tile, int count, int64_t width,
             float* scores, int64_t score_stride) {
    int m = 0;
    for (; m + 4 <= n; m += 4) {
        dots_of_tokens<Number, 4>(queries + m * query_stride, query_stride, tile, count, width,
                                  scores + m * score_stride, score_stride);
    }
    if (m + 2 <= n) {
        dots_of_tokens<Number, 2>(queries + m * query_stride, query_stride, tile, count, width,
                                  scores + m * score_stride, score_stride);
        m += 2;
    }
    if (m < n) {
        dots_of_tokens<Number, 1>(queries + m * query_stride, query_stride, tile, count, width,
                                  scores + m * score_stride, score_stride);
    }
}

// scores [n, count] of queries [n, width] against the tokens of a tile; the scores of a query take whole vectors.
void dots(const float* queries, int64_t query_stride, int n, const Tile& tile, int count, int64_t width, float* scores,
          int64_t score_stride) {
    switch (tile.type) {
        case BFLOAT16: return dots_as<Brain>(queries, query_stride, n, tile, count, width, scores, score_stride);
        case FLOAT16: return dots_as<Half>(queries, query_stride, n, tile, count, width, scores, score_stride);
        default: return dots_as<float>(queries, query_stride, n, tile, count, width, scores, score_stride);
    }
}

// sums[m] = factors[m] * sums[m] + sum over t of weights[m][t] * tokens[t], for M sums and VECTORS vectors of each,
// from column `column` of the tokens on.
template <typename Number, int M, int VECTORS>
inline void sums_of(const float* weights, int64_t weight_stride, const Tile& tile, int count, int64_t column,
                    const float* factors, float* sums, int64_t sum_stride) {
    Floats held[M][VECTORS] = {};  // of the tile alone: thousands of tokens added up one by one would lose digits
    for (int t = 0; t < count; ++t) {
        const Number* token = reinterpret_cast<const Number*>(tile.token[t]) + column;
        const Number* next = reinterpret_cast<const Number*>(tile.token[t + AHEAD]) + column;
        Floats numbers[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            numbers[v] = load(token + v * LANES);
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

// Weighted sums of the tokens of a tile, added to `sums` [n, width] times `factors` [n].
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

}  // namespace
