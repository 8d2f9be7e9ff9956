// The steps of a seal on a CPU: moments of states, read as they lie; the subspace iteration that finds the directions
// of a basis; coefficients; and their codes, with the clip range of least squared error per channel.
// `rotatek_cache.core.fitting`, `basis` and `quantization` are their specification.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "numbers.h"

namespace {

constexpr int STRETCH = 512;    // tokens whose squared errors are summed at once, for sums of many lose digits
constexpr int TILE = 64;        // tokens that are centred at once, beside the sums that they are added to
constexpr float RIDGE = 1e-4f;  // of the mean diagonal, as in the paper

// A matrix that is read number by number.
struct Factor {
    const float* data;
    int64_t row, column;  // strides
};

// to [n, stride] = from [n, inner] times by [inner, stride], whose rows are whole vectors; `VECTORS` of their columns.
template <int ROWS, int VECTORS, bool ADD>
inline void product_of(Factor from, const float* by, float* to, int64_t inner, int64_t stride) {
    Floats sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < inner; ++k) {
        Floats numbers[VECTORS];
        for (int v = 0; v < VECTORS; ++v) numbers[v] = load(by + k * stride + v * LANES);
        for (int r = 0; r < ROWS; ++r) {
            const Floats factor = all(from.data[r * from.row + k * from.column]);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * numbers[v];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) {
            float* place = to + r * stride + v * LANES;
            store(place, ADD ? load(place) + sums[r][v] : sums[r][v]);
        }
    }
}

// The same for all columns from `column`, a whole vector; `ADD`: to what `to` holds.
template <int ROWS, bool ADD>
void product_of_rows(Factor from, const float* by, float* to, int64_t inner, int64_t stride, int64_t column) {
    for (; column + 4 * LANES <= stride; column += 4 * LANES) {
        product_of<ROWS, 4, ADD>(from, by + column, to + column, inner, stride);
    }
    for (; column + 2 * LANES <= stride; column += 2 * LANES) {
        product_of<ROWS, 2, ADD>(from, by + column, to + column, inner, stride);
    }
    if (column < stride) product_of<ROWS, 1, ADD>(from, by + column, to + column, inner, stride);
}

void product(Factor from, const float* by, float* to, int64_t n, int64_t inner, int64_t stride) {
    int64_t row = 0;
    const auto rest = [&] { return Factor{from.data + row * from.row, from.row, from.column}; };
    for (; row + 4 <= n; row += 4) product_of_rows<4, false>(rest(), by, to + row * stride, inner, stride, 0);
    for (; row < n; ++row) product_of_rows<1, false>(rest(), by, to + row * stride, inner, stride, 0);
}

// States of a head, [tokens, width], numbers of a token side by side.
struct States {
    const char* data;
    Type type;
    int64_t tokens, width, stride;
    // Some tokens less `offset`, as rows of `room`; where that is wider than a token, zeros follow.
    void centred(int64_t from, int64_t to, const float* offset, float* room, int64_t room_stride) const {
        for (int64_t token = from; token < to; ++token) {
            float* row = room + (token - from) * room_stride;
            read_numbers(data + token * stride * size_of(type), type, width, row);
            for (int64_t i = 0; i < width; ++i) row[i] -= offset[i];
            std::fill(row + width, row + room_stride, 0.0f);
        }
    }
};

void mean_of(const States& states, float* mean) {
    std::vector<double> whole(states.width, 0.0);
    std::vector<float> sums(states.width), row(states.width);
    for (int64_t from = 0; from < states.tokens; from += STRETCH) {
        const int64_t to = std::min<int64_t>(states.tokens, from + STRETCH);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t token = from; token < to; ++token) {
            const char* at = states.data + token * states.stride * size_of(states.type);
            read_numbers(at, states.type, states.width, row.data());
            for (int64_t i = 0; i < states.width; ++i) sums[i] += row[i];
        }
        for (int64_t i = 0; i < states.width; ++i) whole[i] += sums[i];
    }
    for (int64_t i = 0; i < states.width; ++i) mean[i] = float(whole[i] / double(states.tokens));
}

// Rows `first : last` of the scatter of states around `mean`, in `to` [width, width], from the diagonal on.
void scatter_of(const States& states, const float* mean, int64_t first, int64_t last, float* to) {
    const int64_t width = states.width, stride = padded(width);
    std::vector<float> room(TILE * stride), sums((last - first) * stride, 0.0f);
    for (int64_t from = 0; from < states.tokens; from += TILE) {
        const int64_t count = std::min<int64_t>(TILE, states.tokens - from);
        states.centred(from, from + count, mean, room.data(), stride);
        int64_t row = first;
        for (; row + 4 <= last; row += 4) {
            product_of_rows<4, true>({&room[row], 1, stride}, room.data(), &sums[(row - first) * stride], count, stride,
                                     row / LANES * LANES);
        }
        for (; row < last; ++row) {
            product_of_rows<1, true>({&room[row], 1, stride}, room.data(), &sums[(row - first) * stride], count, stride,
                                     row / LANES * LANES);
        }
    }
    for (int64_t row = first; row < last; ++row) {
        std::copy_n(&sums[(row - first) * stride + row], width - row, to + row * width + row);
    }
}

// sums += factor * row, for the vectors that hold the numbers `from : to`.
inline void add_to(float* sums, const float* row, float factor, int64_t from, int64_t to) {
    const Floats every = all(factor);
    for (int64_t i = from / LANES * LANES; i < to; i += LANES) store(sums + i, load(sums + i) + every * load(row + i));
}

// Columns of `basis` [width, rank] to nearly orthonormal ones: times the inverse of the Cholesky factor of their
// products with a ridge. Written to `to`; `gram` and `inverse` [rank, stride] are room to work in.
void orthonormalise(const float* basis, int64_t width, int64_t rank, int64_t stride, float* gram, float* inverse,
                    float* to) {
    product({basis, 1, stride}, basis, gram, rank, width, stride);
    float mean = 0;
    for (int64_t i = 0; i < rank; ++i) mean += gram[i * stride + i];
    const float ridge = RIDGE * mean / float(rank) + std::numeric_limits<float>::min();
    for (int64_t i = 0; i < rank; ++i) gram[i * stride + i] += ridge;
    std::fill(inverse, inverse + rank * stride, 0.0f);
    for (int64_t k = 0; k < rank; ++k) {  // the upper factor, row by row; what is left of its diagonal is not read
        float* row = gram + k * stride;
        const float scale = 1.0f / std::sqrt(row[k]);
        for (int64_t i = k; i < rank; ++i) row[i] *= scale;
        for (int64_t i = k + 1; i < rank; ++i) add_to(gram + i * stride, row, -row[i], i, rank);
    }
    for (int64_t k = rank - 1; k >= 0; --k) {  // the inverse of it, from the last row on
        float* row = inverse + k * stride;
        const float* factor = gram + k * stride;
        const float scale = 1.0f / factor[k];
        for (int64_t i = k + 1; i < rank; ++i) add_to(row, inverse + i * stride, -factor[i] * scale, i, rank);
        row[k] = scale;
    }
    product({basis, stride, 1}, inverse, to, width, rank, stride);
}

// The orthonormal factor of `basis` [width, rank] by reflections, into `to`: also where columns depend on each other.
void reflect(float* basis, int64_t width, int64_t rank, int64_t stride, float* to) {
    std::vector<float> scale(rank, 0.0f), sums(stride);
    std::vector<float> mirror(width * rank, 0.0f);  // a reflection a row
    const auto apply = [&](float* matrix, int64_t j, int64_t from) {
        const float* normal = &mirror[j * width];
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t d = j; d < width; ++d) add_to(sums.data(), matrix + d * stride, normal[d], from, rank);
        for (int64_t d = j; d < width; ++d) add_to(matrix + d * stride, sums.data(), -scale[j] * normal[d], from, rank);
    };
    for (int64_t j = 0; j < rank; ++j) {
        float rest = 0;
        for (int64_t d = j + 1; d < width; ++d) rest += basis[d * stride + j] * basis[d * stride + j];
        const float first = basis[j * stride + j];
        mirror[j * width + j] = 1.0f;
        if (rest == 0.0f) continue;  // nothing to mirror
        const float length = std::sqrt(first * first + rest), mirrored = first > 0 ? -length : length;
        scale[j] = (mirrored - first) / mirrored;
        for (int64_t d = j + 1; d < width; ++d) mirror[j * width + d] = basis[d * stride + j] / (first - mirrored);
        apply(basis, j, j);
    }
    std::fill(to, to + width * stride, 0.0f);
    for (int64_t j = 0; j < rank; ++j) to[j * stride + j] = 1.0f;
    for (int64_t j = rank - 1; j >= 0; --j) {
        if (scale[j] != 0.0f) apply(to, j, j);
    }
}

void directions_of(const float* matrix, int64_t width, int64_t rank, int64_t iterations, float* out) {
    const int64_t stride = padded(rank);
    std::vector<float> scaled(matrix, matrix + width * width), basis(width * stride, 0.0f), other(width * stride);
    std::vector<float> gram(rank * stride), inverse(rank * stride);
    std::vector<int64_t> order(width);
    for (int64_t d = 0; d < width; ++d) order[d] = d;
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return matrix[a * (width + 1)] > matrix[b * (width + 1)]; });
    float trace = 0;
    for (int64_t d = 0; d < width; ++d) trace += matrix[d * (width + 1)];
    if (trace > 0) {
        for (float& number : scaled) number /= trace;
    }
    for (int64_t i = 0; i < rank; ++i) basis[order[i] * stride + i] = 1.0f;
    for (int64_t round = 0; round < iterations; ++round) {
        product({scaled.data(), width, 1}, basis.data(), other.data(), width, width, stride);
        orthonormalise(other.data(), width, rank, stride, gram.data(), inverse.data(), basis.data());
    }
    reflect(basis.data(), width, rank, stride, other.data());
    for (int64_t d = 0; d < width; ++d) std::copy_n(&other[d * stride], rank, out + d * rank);
}

constexpr int CLIPS = 8;  // at most

// The nearest whole numbers, ties to even, of numbers below 2^22 in size.
inline Floats nearest(Floats x) {
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23
    return (x + magic) - magic;
}

inline Floats least_of(Floats a, Floats b) { return a < b ? a : b; }
inline Floats most_of(Floats a, Floats b) { return a > b ? a : b; }

struct Codes {
    const float* coefficients;  // [heads, tokens, channels]
    int64_t head_stride, tokens, channels;
    const int64_t* blocks;  // bits and channels of each
    int64_t block_count;
    const float* clips;  // shares of the full range, of which the best is found
    int64_t clip_count;  // 0: `low` and `step` are given
    uint8_t* packed;     // [heads, tokens, bytes]
    int64_t packed_head_stride, token_bytes;
    float *low, *step;  // [heads, channels]
};

// What a range of numbers is clipped to and divided by.
struct Range {
    Floats low, step, divisor;
};

// As torch computes it: the product is rounded before it is subtracted.
Range range_of(Floats centre, Floats half, float share, Floats levels) {
    Range range;
    for (int i = 0; i < LANES; ++i) {
        volatile float part = share * half[i], twice = (2.0f * share) * half[i];
        range.low[i] = centre[i] - part;
        range.step[i] = twice / levels[i];
        range.divisor[i] = range.step[i] > 0 ? range.step[i] : 1.0f;
    }
    return range;
}

inline Floats code_of(Floats number, const Range& range, Floats levels) {
    return least_of(most_of(nearest((number - range.low) / range.divisor), all(0.0f)), levels);
}

// The clip range of some channels, whose numbers `numbers` gives, that loses the fewest squares.
template <typename Numbers>
Range best_range(const Codes& task, const Numbers& numbers, Floats top) {
    Floats most = numbers(0), least = most;
    for (int64_t token = 1; token < task.tokens; ++token) {
        const Floats number = numbers(token);
        most = most_of(most, number);
        least = least_of(least, number);
    }
    const Floats centre = (least + most) / all(2.0f), half = (most - least) / all(2.0f);
    Range ranges[CLIPS];
    Floats errors[CLIPS] = {};
    for (int64_t c = 0; c < task.clip_count; ++c) ranges[c] = range_of(centre, half, task.clips[c], top);
    for (int64_t from = 0; from < task.tokens; from += STRETCH) {
        const int64_t to = std::min<int64_t>(task.tokens, from + STRETCH);
        for (int64_t c = 0; c < task.clip_count; ++c) {
            const Range range = ranges[c];
            Floats sum = {};
            for (int64_t token = from; token < to; ++token) {
                const Floats number = numbers(token);
                const Floats error = code_of(number, range, top) * range.step + range.low - number;
                sum += error * error;
            }
            errors[c] += sum;
        }
    }
    Range best = ranges[0];
    Floats fewest = errors[0];
    for (int64_t c = 1; c < task.clip_count; ++c) {
        const Ints better = errors[c] < fewest;
        fewest = better ? errors[c] : fewest;
        best = {better ? ranges[c].low : best.low, better ? ranges[c].step : best.step,
                better ? ranges[c].divisor : best.divisor};
    }
    return best;
}

Range given_range(const Codes& task, int64_t head, int64_t first, int64_t own) {
    Range range{};
    for (int i = 0; i < LANES; ++i) {
        const int64_t place = head * task.channels + first + i;
        range.low[i] = i < own ? task.low[place] : 0.0f;
        range.step[i] = i < own ? task.step[place] : 0.0f;
        range.divisor[i] = range.step[i] > 0 ? range.step[i] : 1.0f;
    }
    return range;
}

// Ranges and codes of some channels of a head; channels past the last are read as zeros and not written.
void code_channels(const Codes& task, int64_t head, int64_t first, const float* levels, uint8_t* codes) {
    const int64_t own = std::min<int64_t>(LANES, task.channels - first);
    const float* begin = task.coefficients + head * task.head_stride + first;
    const auto numbers = [&](int64_t token) {
        const float* at = begin + token * task.channels;
        if (own == LANES) return load(at);
        Floats vector = {};
        for (int i = 0; i < own; ++i) vector[i] = at[i];
        return vector;
    };
    Floats top;
    for (int i = 0; i < LANES; ++i) top[i] = i < own ? levels[first + i] : 1.0f;
    Range best = task.clip_count ? best_range(task, numbers, top) : given_range(task, head, first, own);
    for (int64_t token = 0; token < task.tokens; ++token) {
        const Floats code = code_of(numbers(token), best, top);
        const Ints whole = __builtin_convertvector(code, Ints);
        for (int i = 0; i < own; ++i) codes[token * task.channels + first + i] = uint8_t(whole[i]);
    }
    for (int i = 0; i < own; ++i) {
        task.low[head * task.channels + first + i] = best.low[i];
        task.step[head * task.channels + first + i] = best.step[i];
    }
}
void pack(const Codes& task, int64_t head, const uint8_t* codes) {
    for (int64_t token = 0; token < task.tokens; ++token) {
        const uint8_t* from = codes + token * task.channels;
        uint8_t* to = task.packed + head * task.packed_head_stride + token * task.token_bytes;
        for (int64_t block = 0; block < task.block_count; ++block) {
            const int64_t bits = task.blocks[2 * block], channels = task.blocks[2 * block + 1];
            const int64_t parts = 8 / bits, bytes = channels / parts;
            for (int64_t i = 0; i < bytes; ++i) {
                unsigned byte = 0;
                for (int64_t part = 0; part < parts; ++part) byte |= unsigned(from[part * bytes + i]) << (bits * part);
                to[i] = uint8_t(byte);
            }
            from += channels;
            to += bytes;
        }
    }
}

}  // namespace

// Means [heads, width] and centred scatters [heads, width, width] of states [heads, tokens, width].
extern "C" void rotatek_moments(const void* states, int64_t type, int64_t heads, int64_t tokens, int64_t width,
                                int64_t head_stride, int64_t token_stride, float* means, float* scatters,
                                int64_t threads) {
    const auto head_of = [&](int64_t head) {
        const char* data = static_cast<const char*>(states) + head * head_stride * size_of(Type(type));
        return States{data, Type(type), tokens, width, token_stride};
    };
    const int64_t rows = threads > heads ? 32 : width, parts = (width + rows - 1) / rows;
#pragma omp parallel num_threads(int(std::clamp<int64_t>(threads, 1, heads * parts)))
    {
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < heads; ++head) mean_of(head_of(head), means + head * width);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < heads * parts; ++i) {
            const int64_t head = i / parts, first = i % parts * rows;
            scatter_of(head_of(head), means + head * width, first, std::min(width, first + rows),
                       scatters + head * width * width);
        }
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < heads; ++head) {
            float* scatter = scatters + head * width * width;
            for (int64_t row = 1; row < width; ++row) {
                for (int64_t column = 0; column < row; ++column) {
                    scatter[row * width + column] = scatter[column * width + row];
                }
            }
        }
    }
}

// (states - offset) A [heads, tokens, rank], of states [heads, tokens, width], offsets [heads, width] and encoders A
// [heads, width, rank].
extern "C" void rotatek_encode(const void* states, int64_t type, int64_t heads, int64_t tokens, int64_t width,
                               int64_t head_stride, int64_t token_stride, const float* offsets, const float* encoders,
                               int64_t rank, float* out, int64_t threads) {
    const int64_t piece = 16 * TILE, pieces = (tokens + piece - 1) / piece, stride = padded(rank);
#pragma omp parallel num_threads(int(std::clamp<int64_t>(threads, 1, heads * pieces)))
    {
        std::vector<float> room(TILE * width), encoder(width * stride, 0.0f), made(TILE * stride);
        int64_t held = -1;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads * pieces; ++i) {
            const int64_t head = i / pieces, end = std::min(tokens, (i % pieces + 1) * piece);
            if (held != head) {
                for (int64_t d = 0; d < width; ++d) {
                    std::copy_n(encoders + (head * width + d) * rank, rank, &encoder[d * stride]);
                }
                held = head;
            }
            const char* data = static_cast<const char*>(states) + head * head_stride * size_of(Type(type));
            const States own{data, Type(type), tokens, width, token_stride};
            for (int64_t from = i % pieces * piece; from < end; from += TILE) {
                const int64_t count = std::min<int64_t>(TILE, end - from);
                own.centred(from, from + count, offsets + head * width, room.data(), width);
                float* to = out + (head * tokens + from) * rank;
                product({room.data(), width, 1}, encoder.data(), stride == rank ? to : made.data(), count, width,
                        stride);
                for (int64_t n = 0; n < count && stride != rank; ++n) {
                    std::copy_n(&made[n * stride], rank, to + n * rank);
                }
            }
        }
    }
}

// Directions [n, width, rank] of symmetric positive matrices [n, width, width].
extern "C" void rotatek_directions(const float* matrices, int64_t n, int64_t width, int64_t rank, int64_t iterations,
                                   float* out, int64_t threads) {
#pragma omp parallel for num_threads(int(std::clamp<int64_t>(threads, 1, n))) schedule(dynamic)
    for (int64_t i = 0; i < n; ++i) {
        directions_of(matrices + i * width * width, width, rank, iterations, out + i * width * rank);
    }
}

extern "C" void rotatek_codes(const float* coefficients, int64_t head_stride, int64_t heads, int64_t tokens,
                              int64_t channels, const int64_t* blocks, int64_t block_count, const float* clips,
                              int64_t clip_count, uint8_t* packed, int64_t packed_head_stride, float* low, float* step,
                              int64_t threads) {
    int64_t token_bytes = 0;
    std::vector<float> levels;
    for (int64_t block = 0; block < block_count; ++block) {
        const int64_t bits = blocks[2 * block], own = blocks[2 * block + 1];
        token_bytes += own * bits / 8;
        levels.insert(levels.end(), own, float((1 << bits) - 1));
    }
    const Codes task{coefficients, head_stride,        tokens,      channels, blocks, block_count, clips, clip_count,
                     packed,       packed_head_stride, token_bytes, low,      step};
#pragma omp parallel for num_threads(int(std::clamp<int64_t>(threads, 1, heads))) schedule(dynamic)
    for (int64_t head = 0; head < heads; ++head) {
        std::vector<uint8_t> codes(tokens * channels);
        for (int64_t first = 0; first < channels; first += LANES) {
            code_channels(task, head, first, levels.data(), codes.data());
        }
        pack(task, head, codes.data());
    }
}
