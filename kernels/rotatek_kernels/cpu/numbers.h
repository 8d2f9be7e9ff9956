// Vectors as wide as those of the processor this is compiled for, and numbers of the types that are stored.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {  // all of it is one translation unit

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

constexpr int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

inline Floats all(float number) { return number - Floats{}; }

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

}  // namespace
