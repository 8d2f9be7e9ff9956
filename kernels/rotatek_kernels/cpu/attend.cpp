// Attention over segment views on a CPU, decoded from what the segments store.
//
// The tokens that a row and KV head see are cut into pieces. A piece goes through its tokens tile by tile: all queries
// of the head meet them in the first-level cache, where an online softmax keeps what is summed of the Values. Numbers
// are read where they lie if a token is whole vectors; others, and codes, become float32 beside them. What the pieces
// of a row and head found is merged by its log-sum-exp, and coefficients of Values are rotated back once.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "products.h"

namespace {

constexpr int QUERIES = 64;               // of a piece; more of them are several pieces
constexpr int LEAST_PIECE = 128;          // tokens; a piece has a state to be merged
constexpr int PIECES = 4;                 // wanted for each thread, so that none waits long for the last
constexpr int64_t THREAD_WORK = 1 << 18;  // products that make another thread worth waking
constexpr float NONE = -std::numeric_limits<float>::infinity();

struct Problem {
    PROBLEM_FIELDS
    const Segment& segment(int64_t index) const { return reinterpret_cast<const Segment*>(segments)[index]; }
};

static_assert(sizeof(Problem) == PROBLEM_SIZE, "a structure holds more than the fields that Python writes");

struct Piece {
    int64_t row, head, segment, query, queries;  // of `group * queries`, the first and how many
    int64_t from, to;
};

// Queries [n, padded(channels)] as they meet what a segment stores, scaled, and what all its logits have in common.
void project(const Problem& problem, const Segment& segment, const Piece& piece, float* projected, float* shifts,
             float* buffer) {
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
    const Stored& keys = segment.keys;
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
        read_decoder(keys.decoder, decoder, d, count, channels, buffer, tile);
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
    std::unique_ptr<float[]> buffer, scores, projected;
    explicit Scratch(int64_t widest)
        : buffer(new float[TILE * widest]), scores(new float[QUERIES * TILE]), projected(new float[QUERIES * widest]) {}
};

// Computes the state of a piece: sums acc [n, width] of Values with weights exp(logit - m_i), the greatest logits m_i,
// sums l_i of weights.
void attend(const Problem& problem, const Piece& piece, Scratch& scratch, float* acc, int64_t width, float* m_i,
            float* l_i) {
    const Segment& segment = problem.segment(piece.segment);
    const int64_t n = piece.queries, inner = padded(segment.keys.channels(piece.head));
    const int64_t value_width = padded(segment.values.channels(piece.head));
    float shifts[QUERIES], alpha[QUERIES];
    Tile tile;
    std::fill(acc, acc + n * width, 0.0f);
    std::fill(m_i, m_i + n, NONE);
    std::fill(l_i, l_i + n, 0.0f);
    if (piece.from == piece.to) return;  // a row without tokens, whose basis may be none
    project(problem, segment, piece, scratch.projected.get(), shifts, scratch.buffer.get());
    for (int64_t from = piece.from; from < piece.to; from += TILE) {
        const int count = int(std::min<int64_t>(TILE, piece.to - from));
        float* scores = scratch.scores.get();
        read_tile(segment, segment.keys, piece.row, piece.head, from, count, piece.to, scratch.buffer.get(), tile);
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
            peak = std::max(m_i[m], peak + shifts[m]);
            const float base = peak == NONE ? 0.0f : peak;
            alpha[m] = std::exp(m_i[m] - base);
            m_i[m] = peak;
            Floats sum = {};
            for (int t = 0; t < count; t += LANES) {
                const Floats weights = exponential(load(of_query + t) + all(shifts[m] - base));
                store(of_query + t, weights);
                sum += weights;
            }
            float added = 0;
            for (int i = 0; i < LANES; ++i) added += sum[i];
            l_i[m] = l_i[m] * alpha[m] + added;
        }
        read_tile(segment, segment.values, piece.row, piece.head, from, count, piece.to, scratch.buffer.get(), tile);
        sums(scores, TILE, int(n), tile, count, alpha, acc, width, value_width);
    }
}

struct States {
    int64_t width;
    std::vector<int64_t> first;  // of a piece's queries among all
    std::unique_ptr<float[]> acc, m_i, l_i;
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
        for (int64_t m = 0; m < n; ++m) peaks[m] = std::max(peaks[m], states.m_i[states.first[i] + m]);
    }
    for (std::size_t i = from; i < to;) {
        if (pieces[i].from == pieces[i].to) {
            ++i;
            continue;
        }
        const Segment& segment = problem.segment(pieces[i].segment);
        std::fill(sum.begin(), sum.end(), 0.0f);
        std::fill(held.begin(), held.end(), 0.0f);
        const Stored& values = segment.values;
        const int64_t channels = values.channels(one.head), inner = padded(channels);
        const int64_t index = pieces[i].segment;
        for (; i < to && pieces[i].segment == index; ++i) {
            for (int64_t m = 0; m < n; ++m) {
                const int64_t state = states.first[i] + m;
                if (states.l_i[state] == 0) continue;
                const float weight = std::exp(states.m_i[state] - peaks[m]);
                held[m] += weight * states.l_i[state];
                const float* numbers = &states.acc[state * states.width];
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
            read_decoder(values.decoder, decoder, d, count, channels, scratch.buffer.get(), tile);
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
        reinterpret_cast<float*>(problem.lse)[(one.row * q_heads + head) * problem.queries + position] =
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
    for (int64_t s = 0; s < problem.segment_count; ++s) {
        const Segment& segment = problem.segment(s);
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
    for (int64_t s = 0; s < problem.segment_count; ++s) {
        for (int64_t row = 0; row < problem.batch; ++row) tokens += problem.segment(s).length(row);
    }
    const int64_t wanted = tokens * problem.heads * blocks / std::max<int64_t>(1, problem.threads * PIECES) + 1;
    const int64_t longest = (std::max<int64_t>(LEAST_PIECE, wanted) + TILE - 1) / TILE * TILE;
    for (int64_t row = 0; row < problem.batch; ++row) {
        for (int64_t head = 0; head < problem.heads; ++head) {
            for (int64_t query = 0; query < all_queries; query += QUERIES) {
                runs.push_back(pieces.size());
                const int64_t n = std::min<int64_t>(QUERIES, all_queries - query);
                for (int64_t s = 0; s < problem.segment_count; ++s) {
                    const int64_t length = problem.segment(s).length(row);
                    for (int64_t from = 0; from < length || (s == 0 && from == 0); from += longest) {
                        const int64_t to = std::min(length, from + longest);
                        pieces.push_back({row, head, s, query, n, from, to});
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
extern "C" int64_t rotatek_attend(const void* described) {
    Problem problem = *static_cast<const Problem*>(described);
    int64_t widest = padded(std::max(problem.width, problem.value_width)), state_width = padded(problem.value_width);
    for (int64_t s = 0; s < problem.segment_count; ++s) {
        widest = std::max(widest, padded(problem.segment(s).keys.widest()));
        state_width = std::max(state_width, padded(problem.segment(s).values.widest()));
    }
    for (int64_t s = 0; s < problem.segment_count; ++s) {
        for (int64_t row = 0; row < problem.batch; ++row) {
            const Outside outside = problem.segment(s).outside(row);
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
    states.acc.reset(new float[total * state_width]);
    states.m_i.reset(new float[total]);
    states.l_i.reset(new float[total]);
#pragma omp parallel num_threads(int(problem.threads))
    {
        Scratch scratch(widest);
#pragma omp for schedule(dynamic)
        for (std::size_t i = 0; i < pieces.size(); ++i) {
            const int64_t first = states.first[i];
            attend(problem, pieces[i], scratch, &states.acc[first * state_width], state_width, &states.m_i[first],
                   &states.l_i[first]);
        }
#pragma omp for schedule(static)
        for (std::size_t i = 0; i < last_run; ++i) {
            merge(problem, pieces, runs[i], runs[i + 1], states, scratch);
        }
    }
    return 0;
}
