// The loops over tiles of 16-bit weights. LEVEL names the table.

#include "products.h"

namespace {

// --- Expansion of one row of a tile ------------------------------------------------------------------------------

#if defined(__AVX512VBMI2__)

// Spreads the first of 32 values over the bits of a mask; `zero` in the other lanes. The load stays an instruction of its
// own, since the form of VPEXPANDW that reads memory is microcoded on AMD's processors; and the zeros come from
// a register that the compiler cannot see through, since the zeroing form waits there for its old destination.
INLINE __m512i spread(const std::uint8_t* mask, const std::uint8_t* values, __m512i zero) {
    __m512i packed = _mm512_loadu_si512(values);
    asm("" : "+v"(packed));
    return _mm512_mask_expand_epi16(zero, read<std::uint32_t>(mask), packed);
}

INLINE void expand_row(const std::uint8_t* mask, const std::uint8_t* values, std::uint16_t* out) {
    const int low = count_bits(read<std::uint32_t>(mask));
    const __m512i zero = opaque_zero();
    _mm512_storeu_si512(out, spread(mask, values, zero));
    _mm512_storeu_si512(out + 32, spread(mask + 4, values + 2 * low, zero));
}

#elif defined(__AVX2__)

INLINE __m128i spread(std::uint8_t mask, const std::uint8_t* values) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.at[mask])));
}

INLINE void expand_row(const std::uint8_t* mask, const std::uint8_t* values, std::uint16_t* out) {
    for (int byte = 0; byte < 8; ++byte) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * byte), spread(mask[byte], values));
        values += 2 * count_bits(mask[byte]);
    }
}

#else

INLINE void expand_row(const std::uint8_t* mask, const std::uint8_t* values, std::uint16_t* out) {
    const std::uint64_t bits = read<std::uint64_t>(mask);
    for (int col = 0; col < kCols; ++col) {
        const bool stored = bits >> col & 1;
        out[col] = read<std::uint16_t>(values) & -std::uint16_t(stored);
        values += 2 * stored;
    }
}

#endif

// Expands a tile into 16 rows that are `stride` apart, and returns where the next one begins.
INLINE const std::uint8_t* expand_tile(const std::uint8_t* tile, std::uint16_t* out, Index stride) {
    const std::uint8_t* values = tile + kMaskBytes;
#pragma GCC unroll kUnrolled
    for (Index row = 0; row < kRows; ++row) {
        const std::uint8_t* mask = tile + row * 8;
        expand_row(mask, values, out + row * stride);
        values += 2 * count_bits(read<std::uint64_t>(mask));
    }
    return values;
}

// The tiles of a block, expanded one after the other.
struct Tiles {
    const std::uint8_t* at;
    INLINE Tiles(const Product& product, Index block)
        : at(static_cast<const std::uint8_t*>(product.weights) + product.blocks[block]) {}
    INLINE void expand(std::uint16_t* out, Index stride) { at = expand_tile(at, out, stride); }
};

void expand(const Product& product, std::uint16_t* out, Index first, Index last) {
    expand_blocks<Tiles>(product, out, first, last);
}

// --- Products ----------------------------------------------------------------------------------------------------

// The inputs of a tile's 64 columns, and what a row of it adds to a sum of products with them.
template <typename Value, typename Input>
struct TileInputs;

#if defined(__AVX512VBMI2__)

#if defined(__AVX512BF16__)
template <>
struct TileInputs<Bfloat16, Bfloat16> {
    __m512bh low, high;
    explicit INLINE TileInputs(const Bfloat16* from)
        : low((__m512bh)_mm512_loadu_si512(from)), high((__m512bh)_mm512_loadu_si512(from + 32)) {}
    INLINE Floats add_row(const std::uint8_t* mask, const std::uint8_t* values, __m512i zero, Floats sum) const {
        const int count = count_bits(read<std::uint32_t>(mask));
        sum = _mm512_dpbf16_ps(sum, (__m512bh)spread(mask, values, zero), low);
        return _mm512_dpbf16_ps(sum, (__m512bh)spread(mask + 4, values + 2 * count, zero), high);
    }
};
#endif

template <typename Value>
struct TileInputs<Value, float> {
    Floats at[4];
    explicit INLINE TileInputs(const float* from) : at{load(from), load(from + 16), load(from + 32), load(from + 48)} {}
    INLINE Floats add_row(const std::uint8_t* mask, const std::uint8_t* values, __m512i zero, Floats sum) const {
        const int count = count_bits(read<std::uint32_t>(mask));
        const __m512i low = spread(mask, values, zero), high = spread(mask + 4, values + 2 * count, zero);
        sum = multiply_add(widen(_mm512_castsi512_si256(low), Value{}), at[0], sum);
        sum = multiply_add(widen(_mm512_extracti64x4_epi64(low, 1), Value{}), at[1], sum);
        sum = multiply_add(widen(_mm512_castsi512_si256(high), Value{}), at[2], sum);
        return multiply_add(widen(_mm512_extracti64x4_epi64(high, 1), Value{}), at[3], sum);
    }
};

#elif defined(__AVX2__)

INLINE __m128i opaque_zero() { return _mm_setzero_si128(); }

template <typename Value>
struct TileInputs<Value, float> {
    const float* at;
    explicit INLINE TileInputs(const float* from) : at(from) {}
    INLINE Floats add_row(const std::uint8_t* mask, const std::uint8_t* values, __m128i, Floats sum) const {
        for (int byte = 0; byte < 8; ++byte) {
            sum = multiply_add(widen(spread(mask[byte], values), Value{}), load(at + 8 * byte), sum);
            values += 2 * count_bits(mask[byte]);
        }
        return sum;
    }
};

#else

struct Zero {};
INLINE Zero opaque_zero() { return {}; }

template <typename Value>
struct TileInputs<Value, float> {
    const float* at;
    explicit INLINE TileInputs(const float* from) : at(from) {}
    INLINE Floats add_row(const std::uint8_t* mask, const std::uint8_t* values, Zero, Floats sum) const {
        Value row[kCols];
        expand_row(mask, values, reinterpret_cast<std::uint16_t*>(row));
        for (Index col = 0; col < kCols; col += kLanes) sum = multiply_add(load(row + col), load(at + col), sum);
        return sum;
    }
};

#endif

// One vector: a block's 16 rows side by side, so that inputs are loaded once for all and the tiles are read in order.
template <typename Value, typename Input>
INLINE void multiply_one(const Product& product, Index block) {
    const auto* tile = static_cast<const std::uint8_t*>(product.weights) + product.blocks[block];
    const auto* inputs = static_cast<const Input*>(product.inputs);
    const auto zero = opaque_zero();
    Floats sums[kRows];
#pragma GCC unroll kUnrolled
    for (auto& sum : sums) sum = zeros();
    for (Index col = 0; col < product.cols; col += kCols) {
        const TileInputs<Value, Input> x(inputs + col);
        const std::uint8_t* values = tile + kMaskBytes;
#pragma GCC unroll kUnrolled
        for (Index row = 0; row < kRows; ++row) {
            const std::uint8_t* mask = tile + row * 8;
            sums[row] = x.add_row(mask, values, zero, sums[row]);
            values += 2 * count_bits(read<std::uint64_t>(mask));
        }
        tile = values;
    }
    for (Index row = 0; row < kRows && block * kRows + row < product.rows; ++row) {
        store(product, 0, block * kRows + row, total(sums[row]));
    }
}

template <typename Value, typename Input>
void multiply(const Product& product, Index first, Index last) {
    for (Index block = first; block < last; ++block) {
        if (product.vectors == 1) {
            multiply_one<Value, Input>(product, block);
            continue;
        }
        Tiles tiles(product, block);
        multiply_several<Value, Input>(product, block, [&](std::uint16_t* out, Index stride) { tiles.expand(out, stride); });
    }
}

// R rows of a dense matrix times one vector.
template <int R, int U, typename Value, typename Input>
INLINE void multiply_dense_rows(const Product& product, Index row) {
    constexpr Index widest = 256;
    const auto* weights = static_cast<const Value*>(product.weights) + row * product.cols;
    const auto* inputs = static_cast<const Input*>(product.inputs);
    const Index whole = product.cols / widest * widest, rest = product.cols - whole;
    Floats sums[R];
    for (auto& sum : sums) sum = zeros();
    add_dots<R, 1, U>(weights, product.cols, inputs, product.padded, whole, sums);
    if (rest) {
        alignas(64) Value ends[R * widest] = {};
        for (int r = 0; r < R; ++r) std::memcpy(ends + r * widest, weights + r * product.cols + whole, rest * sizeof(Value));
        const Index width = (rest + kCols - 1) / kCols * kCols;
        add_dots<R, 1, 1>(ends, widest, inputs + whole, product.padded, width, sums);
    }
    for (int r = 0; r < R; ++r) store(product, 0, row + r, total(sums[r]));
}

// Wide rows go eight at a time, since loading the inputs anew for each would evict them from the first cache; short ones
// one at a time, since so many streams a power of two apart would evict each other.
template <typename Value, typename Input>
void multiply_dense(const Product& product, Index first, Index last) {
    constexpr Index short_row = 4096;
    const Index end = last * kRows < product.rows ? last * kRows : product.rows;
    Index row = first * kRows;
    if (product.cols > short_row) {
        for (; row + 8 <= end; row += 8) multiply_dense_rows<8, 1, Value, Input>(product, row);
    }
    for (; row < end; ++row) multiply_dense_rows<1, 4, Value, Input>(product, row);
}

void sparse(const Product& product, Index first, Index last) {
#if defined(__AVX512BF16__)
    if (computes_in(product.value, product.output) == kBfloat16) return multiply<Bfloat16, Bfloat16>(product, first, last);
#endif
    if (product.value == kBfloat16) return multiply<Bfloat16, float>(product, first, last);
    multiply<Float16, float>(product, first, last);
}

void dense(const Product& product, Index first, Index last) {
#if defined(__AVX512BF16__)
    if (computes_in(product.value, product.output) == kBfloat16) {
        return multiply_dense<Bfloat16, Bfloat16>(product, first, last);
    }
#endif
    if (product.value == kBfloat16) return multiply_dense<Bfloat16, float>(product, first, last);
    multiply_dense<Float16, float>(product, first, last);
}

}  // namespace

extern const Kernels LEVEL;
const Kernels LEVEL = {computes_in, sparse, dense, expand};
