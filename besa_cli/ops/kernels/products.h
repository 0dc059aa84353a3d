// What the loops of `tile_kernels.cpp` and `code_kernels.cpp` share, compiled once for every level of instructions (see
// `build.py`), which the compiler's own macros tell apart: AVX-512 with VBMI2, with or without BF16; AVX2; plain C++.
//
// Every row is summed by one thread in one order, so the results do not depend on the number of threads. Everything is
// in an unnamed namespace, so that the functions of one level are not linked into another.

#pragma once

#include <cstring>

#include "tiles.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

// Rows of a tile whose loop is unrolled: all where their sums fit into registers.
#if defined(__AVX512VBMI2__)
constexpr int kUnrolled = 16;
#else
constexpr int kUnrolled = 1;
#endif

struct Bfloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

template <typename T>
INLINE T read(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

INLINE float as_float(std::uint32_t bits) { return read<float>(&bits); }
INLINE std::uint32_t as_bits(float value) { return read<std::uint32_t>(&value); }

INLINE int count_bits(std::uint64_t mask) { return __builtin_popcountll(mask); }

// --- Vectors of fp32 numbers -------------------------------------------------------------------------------------

#if defined(__AVX512VBMI2__)

constexpr Index kLanes = 16;
using Floats = __m512;

INLINE Floats zeros() { return _mm512_setzero_ps(); }
INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
INLINE Floats widen(__m256i bits, Bfloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INLINE Floats widen(__m256i bits, Float16) { return _mm512_cvtph_ps(bits); }
template <typename Value>
INLINE Floats load(const Value* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), Value{});
}
INLINE Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE float total(Floats a) { return _mm512_reduce_add_ps(a); }

#elif defined(__AVX2__)

constexpr Index kLanes = 8;
using Floats = __m256;

INLINE Floats zeros() { return _mm256_setzero_ps(); }
INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
INLINE Floats widen(__m128i bits, Bfloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
INLINE Floats widen(__m128i bits, Float16) { return _mm256_cvtph_ps(bits); }
template <typename Value>
INLINE Floats load(const Value* from) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), Value{});
}
INLINE Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE float total(Floats a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

#else

constexpr Index kLanes = 8;
struct Floats {
    float at[kLanes];
};

INLINE Floats zeros() { return {}; }
INLINE Floats load(const float* from) { return read<Floats>(from); }
INLINE float widen(Bfloat16 value) { return as_float(std::uint32_t(value.bits) << 16); }
// Of finite numbers: the exponent is 112 less than that of the same number in 32 bits.
INLINE float widen(Float16 value) {
    const float size = as_float(std::uint32_t(value.bits & 0x7fff) << 13) * 0x1p112f;
    return as_float(as_bits(size) | std::uint32_t(value.bits & 0x8000) << 16);
}
template <typename Value>
INLINE Floats load(const Value* from) {
    Floats wide;
    for (Index i = 0; i < kLanes; ++i) wide.at[i] = widen(from[i]);
    return wide;
}
INLINE Floats multiply_add(Floats a, Floats b, Floats sum) {
    for (Index i = 0; i < kLanes; ++i) sum.at[i] += a.at[i] * b.at[i];
    return sum;
}
INLINE Floats add(Floats a, Floats b) {
    for (Index i = 0; i < kLanes; ++i) a.at[i] += b.at[i];
    return a;
}
INLINE float total(Floats a) {
    float sum = 0.0f;
    for (Index i = 0; i < kLanes; ++i) sum += a.at[i];
    return sum;
}

#endif

// How weights of type Value meet inputs of type Input: `step` columns at a time, summed in fp32.
template <typename Value, typename Input>
struct Arithmetic {
    using Weights = Floats;
    using Inputs = Floats;
    static constexpr Index step = kLanes;
    static INLINE Weights weights(const Value* from) { return load(from); }
    static INLINE Inputs inputs(const Input* from) { return load(from); }
    static INLINE Floats multiply_add(Weights w, Inputs x, Floats sum) { return ::multiply_add(w, x, sum); }
};

#if defined(__AVX512BF16__)
// Sums of two products at once, exact before the addition.
template <>
struct Arithmetic<Bfloat16, Bfloat16> {
    using Weights = __m512bh;
    using Inputs = __m512bh;
    static constexpr Index step = 32;
    static INLINE Weights weights(const Bfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
    static INLINE Inputs inputs(const Bfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
    static INLINE Floats multiply_add(Weights w, Inputs x, Floats sum) { return _mm512_dpbf16_ps(sum, w, x); }
};
#endif

#if defined(__AVX512VBMI2__)

INLINE __m512i opaque_zero() {
    __m512i zero = _mm512_setzero_si512();
    asm("" : "+v"(zero));
    return zero;
}

#elif defined(__AVX2__)

// For every mask of 8 bits, the bytes that PSHUFB takes to spread 16-bit values over its bits; 0x80 gives zeros.
struct Shuffles {
    std::uint8_t at[256][16];
    constexpr Shuffles() : at() {
        for (int mask = 0; mask < 256; ++mask) {
            int next = 0;
            for (int bit = 0; bit < 8; ++bit) {
                const bool stored = mask >> bit & 1;
                at[mask][2 * bit] = stored ? 2 * next : 0x80;
                at[mask][2 * bit + 1] = stored ? 2 * next + 1 : 0x80;
                next += stored;
            }
        }
    }
};
alignas(16) constexpr Shuffles kShuffles;

#endif

// --- Results and products with several vectors --------------------------------------------------------------------

// To the nearest, of two the even one.
INLINE std::uint16_t narrow_bfloat16(float value) {
    const std::uint32_t bits = as_bits(value);
    if (value != value) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE std::uint16_t narrow_float16(float value) {
    const std::uint32_t bits = as_bits(value), size = bits & 0x7fffffff;
    const std::uint16_t sign = bits >> 16 & 0x8000;
    if (size > 0x7f800000) return sign | 0x7e00;   // NaN
    if (size >= 0x477ff000) return sign | 0x7c00;  // 65520 and more: infinity
    if (size < 0x38800000) return sign | (as_bits(as_float(size) + 0.5f) - 0x3f000000);  // below 2^-14: multiples of 2^-24
    return sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

INLINE void store(const Product& product, Index vector, Index row, float sum) {
    const Index at = vector * product.rows + row;
    switch (product.output) {
        case kBfloat16: static_cast<std::uint16_t*>(product.outputs)[at] = narrow_bfloat16(sum); break;
        case kFloat16: static_cast<std::uint16_t*>(product.outputs)[at] = narrow_float16(sum); break;
        case kFloat32: static_cast<float*>(product.outputs)[at] = sum; break;
    }
}

// Adds the products of R rows with N vectors over `width` columns to `sums`, in which vectors are kRows apart. U chains of
// additions each.
template <int R, int N, int U, typename Value, typename Input>
INLINE void add_dots(
    const Value* weights, Index stride, const Input* inputs, Index padded, Index width, Floats* sums) {
    using Maths = Arithmetic<Value, Input>;
    Floats chains[R][N][U];
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            chains[r][n][0] = sums[n * kRows + r];
            for (int u = 1; u < U; ++u) chains[r][n][u] = zeros();
        }
    }
    for (Index col = 0; col < width; col += U * Maths::step) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
            const Index at = col + u * Maths::step;
            typename Maths::Inputs x[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) x[n] = Maths::inputs(inputs + n * padded + at);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const auto w = Maths::weights(weights + r * stride + at);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) chains[r][n][u] = Maths::multiply_add(w, x[n], chains[r][n][u]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            for (int u = 1; u < U; ++u) chains[r][n][0] = add(chains[r][n][0], chains[r][n][u]);
            sums[n * kRows + r] = chains[r][n][0];
        }
    }
}

// Rows of an expanded block whose products with up to four vectors fit into registers.
#if defined(__AVX512VBMI2__)
constexpr int kRowsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 2;
#endif

// A panel of a block, expanded, times N vectors.
template <int N, typename Value, typename Input>
INLINE void add_panel(const Value* panel, Index stride, const Input* inputs, Index padded, Index width, Floats* sums) {
    for (Index row = 0; row < kRows; row += kRowsAtOnce) {
        add_dots<kRowsAtOnce, N, 1>(panel + row * stride, stride, inputs, padded, width, sums + row);
    }
}

// Several vectors: panels of a block are expanded into the first cache and meet up to four vectors at a time.
// expand(out, stride) writes the next tile of the block.
template <typename Value, typename Input, typename Expand>
INLINE void multiply_several(const Product& product, Index block, Expand expand) {
    constexpr Index panel_cols = 256;
    alignas(64) std::uint16_t panel[kRows * panel_cols];
    const auto* values = reinterpret_cast<const Value*>(panel);
    Floats sums[kMost * kRows];
    for (Index i = 0; i < product.vectors * kRows; ++i) sums[i] = zeros();
    for (Index start = 0; start < product.padded; start += panel_cols) {
        const Index width = start + panel_cols <= product.padded ? panel_cols : product.padded - start;
        for (Index col = 0; col < width; col += kCols) expand(panel + col, panel_cols);
        for (Index n = 0; n < product.vectors;) {
            const auto* inputs = static_cast<const Input*>(product.inputs) + n * product.padded + start;
            Floats* to = sums + n * kRows;
            switch (product.vectors - n) {
                case 1: add_panel<1>(values, panel_cols, inputs, product.padded, width, to); n += 1; break;
                case 2: case 3: add_panel<2>(values, panel_cols, inputs, product.padded, width, to); n += 2; break;
                default: add_panel<4>(values, panel_cols, inputs, product.padded, width, to); n += 4;
            }
        }
    }
    for (Index n = 0; n < product.vectors; ++n) {
        for (Index row = 0; row < kRows && block * kRows + row < product.rows; ++row) {
            store(product, n, block * kRows + row, total(sums[n * kRows + row]));
        }
    }
}

// Writes the rows of blocks [first, last), tile by tile.
template <typename Tiles>
INLINE void expand_blocks(const Product& product, std::uint16_t* out, Index first, Index last) {
    alignas(64) std::uint16_t tile[kRows * kCols];
    for (Index block = first; block < last; ++block) {
        Tiles tiles(product, block);
        const Index rows = block * kRows + kRows <= product.rows ? kRows : product.rows - block * kRows;
        for (Index col = 0; col < product.cols; col += kCols) {
            std::uint16_t* to = out + (block - first) * kRows * product.cols + col;
            const Index cols = col + kCols <= product.cols ? kCols : product.cols - col;
            if (rows == kRows && cols == kCols) {
                tiles.expand(to, product.cols);
                continue;
            }
            tiles.expand(tile, kCols);
            for (Index row = 0; row < rows; ++row) {
                std::memcpy(to + row * product.cols, tile + row * kCols, cols * sizeof *tile);
            }
        }
    }
}

Type computes_in([[maybe_unused]] Type value, [[maybe_unused]] Type input) {
#if defined(__AVX512BF16__)
    if (value == kBfloat16 && input == kBfloat16) return kBfloat16;
#endif
    return kFloat32;
}

}  // namespace
