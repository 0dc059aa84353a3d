// The loops over tiles of quantized weights. A weight is (code - zero point) * scale in fp32, rounded once to the
// 16-bit type of the matrix. That number is multiplied, so the results are those of the dense matrix. LEVEL names the table.

#include "products.h"

#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

// How tiles are stored, see `tiles.h`. Halves: their columns below 32 and from 32 on may belong to two groups.
template <int Bits, bool Masked, bool Halves>
struct Format {
    static constexpr int bits = Bits, top = (1 << Bits) - 1;
    static constexpr bool masked = Masked, halves = Halves;
};

// Calls work(format) with the format of a product.
template <typename Work>
INLINE void with_format(const Product& product, const Work& work) {
    const bool halves = product.width % kCols && product.width < product.cols;
    const int number = (product.bits == 8) * 4 + product.masked * 2 + halves;
    switch (number) {
        case 0: return work(Format<4, false, false>{});
        case 1: return work(Format<4, false, true>{});
        case 2: return work(Format<4, true, false>{});
        case 3: return work(Format<4, true, true>{});
        case 4: return work(Format<8, false, false>{});
        case 5: return work(Format<8, false, true>{});
        case 6: return work(Format<8, true, false>{});
        case 7: return work(Format<8, true, true>{});
    }
}

// Steps through the codes of a tile, row after row. Codes of 4 bits are two streams: that of the first eight rows in the
// low halves of the bytes, that of the others in the high halves.
template <typename F>
struct Cursor {
    static constexpr int streams = F::bits == 4 ? 2 : 1;
    const std::uint8_t *masks, *next[2];
    explicit INLINE Cursor(const std::uint8_t* tile) : masks(tile), next{codes(tile), codes(tile)} {}
    static INLINE const std::uint8_t* codes(const std::uint8_t* tile) { return tile + (F::masked ? kMaskBytes : 0); }
    static constexpr int shift(Index row) { return F::bits == 4 && row >= kRows / 2 ? 4 : 0; }
    INLINE const std::uint8_t* mask(Index row) const { return masks + row * 8; }
    INLINE const std::uint8_t* take(Index row) {
        const std::uint8_t*& stream = next[row * streams / kRows];
        const std::uint8_t* codes = stream;
        stream += F::masked ? count_bits(read<std::uint64_t>(mask(row))) : kCols;
        return codes;
    }
    INLINE const std::uint8_t* end() const { return streams == 2 && next[1] > next[0] ? next[1] : next[0]; }
};

// --- The grids of a tile's rows, and the expansion of one row ------------------------------------------------------

#if defined(__AVX512VBMI2__)

INLINE __m512i join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

// Two vectors of fp32 as 32 numbers of 16 bits, rounded to nearest.
INLINE __m512i narrow(Floats low, Floats high, Float16) {
    return join(_mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT), _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
}
#if defined(__AVX512BF16__)
INLINE __m512i narrow(Floats low, Floats high, Bfloat16) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
#else
INLINE __m256i upper_halves(Floats wide) {
    const __m512i bits = _mm512_castps_si512(wide);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
INLINE __m512i narrow(Floats low, Floats high, Bfloat16) { return join(upper_halves(low), upper_halves(high)); }
#endif

struct Orders {
    std::uint16_t words[9][2][32];  // 64 columns as codes of 4 and of 8 bits are decoded
    std::uint8_t quarters[4][64];   // the 16 bytes of a quarter, each the second of four
    constexpr Orders() : words(), quarters() {
        for (int i = 0; i < 64; ++i) {
            words[4][i / 32][i % 32] = 2 * (i % 32) + i / 32;   // the even ones, the odd ones
            words[8][i / 32][i % 32] = 4 * (i % 16) + i / 16;   // every fourth, beginning with the first
        }
        for (int i = 0; i < 64; ++i) quarters[i / 16][4 * (i % 16) + 1] = i;
    }
};
alignas(64) constexpr Orders kOrders;

constexpr Index kAhead = 2048;  // bytes: without a hint, processors fetch too late what is decoded so quickly

// The codes of a row of a tile, 0 where none is stored.
template <typename F>
INLINE __m512i spread(Cursor<F>& cursor, Index row, __m512i zero) {
    const std::uint8_t* from = cursor.take(row);
    if (!cursor.shift(row)) __builtin_prefetch(from + kAhead);
    __m512i codes = _mm512_loadu_si512(from);
    if (!F::masked) return codes;
    asm("" : "+v"(codes));  // an instruction of its own, as in `tile_kernels.cpp`
    return _mm512_mask_expand_epi8(zero, read<std::uint64_t>(cursor.mask(row)), codes);
}

// The 16 weights that codes of 4 bits stand for, before they are multiplied by a scale.
INLINE Floats steps_of(__m512i zero) {
    const __m512i all = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i codes = _mm512_and_si512(_mm512_add_epi32(all, zero), _mm512_set1_epi32(15));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, zero));
}

template <typename F, typename Value>
struct Grids {
    static constexpr float kBase = 32768.0f;  // the second byte of its bits counts ones
    alignas(64) float scale[2][kRows], base[2][kRows];
    alignas(64) std::int32_t zero[2][kRows];
    __m512i table[F::bits == 4 ? kRows : 1];  // weights by their codes: those of one group twice, or of two

    INLINE void enter(int half, const std::uint16_t* scales, const std::uint8_t* zeros, int middle) {
        const __m512i wide = zeros ? _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)))
                                   : _mm512_set1_epi32(middle);
        _mm512_store_si512(zero[half], wide);
        const Floats h = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
        _mm512_store_ps(scale[half], h);
        _mm512_store_ps(base[half], (_mm512_cvtepi32_ps(wide) + kBase) * h);
    }
    INLINE void finish() {
        if (F::bits == 8) return;
        for (Index row = 0; row < kRows; ++row) {
            const Floats low = steps_of(_mm512_set1_epi32(zero[0][row])) * scale[0][row];
            const Floats high = F::halves ? steps_of(_mm512_set1_epi32(zero[1][row])) * scale[1][row] : low;
            table[row] = narrow(low, high, Value{});
        }
    }
    INLINE void expand_row(Cursor<F>& cursor, Index row, std::uint16_t* out) const {
        const __m512i codes = spread(cursor, row, opaque_zero());
        if constexpr (F::bits == 4) {
            __m512i even = cursor.shift(row) ? _mm512_srli_epi16(codes, 4) : codes;
            __m512i odd = _mm512_srli_epi16(codes, 8 + cursor.shift(row));
            if (F::halves) {  // VPERMW looks at five bits: the fifth chooses the group
                const __m512i group = join(_mm256_setzero_si256(), _mm256_set1_epi16(16)), code = _mm512_set1_epi16(15);
                even = _mm512_ternarylogic_epi32(even, code, group, 0xea);  // even & code | group
                odd = _mm512_ternarylogic_epi32(odd, code, group, 0xea);
            }
            even = _mm512_permutexvar_epi16(even, table[row]);
            odd = _mm512_permutexvar_epi16(odd, table[row]);
            const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
            const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
            const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
            _mm512_storeu_si512(out, _mm512_permutex2var_epi64(low, first, high));
            _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi64(low, second, high));
        } else {
            const __m512i low = _mm512_set1_epi8(char(zero[0][row]));
            const __m512i high = _mm512_set1_epi8(char(zero[1][row]));
            const __m512i bytes = _mm512_add_epi8(codes, F::halves ? _mm512_mask_mov_epi32(low, 0xff00, high) : low);
            const auto quarter = [&](int place) {
                const int half = F::halves && place >= 2;
                const __m512i number = _mm512_set1_epi32(as_bits(kBase));
                const __m512i index = _mm512_loadu_si512(kOrders.quarters[place]);
                const __m512i bits = _mm512_mask_permutexvar_epi8(number, 0x2222222222222222, index, bytes);
                return (_mm512_castsi512_ps(bits) - (kBase + zero[half][row])) * scale[half][row];
            };
            _mm512_storeu_si512(out, narrow(quarter(0), quarter(1), Value{}));
            _mm512_storeu_si512(out + 32, narrow(quarter(2), quarter(3), Value{}));
        }
    }
};

#else

template <typename F, typename Value>
struct Grids {
    float scale[2][kRows];
    std::int16_t zero[2][kRows];

    INLINE void enter(int half, const std::uint16_t* scales, const std::uint8_t* zeros, int middle) {
        for (Index row = 0; row < kRows; row += kLanes) {
            const Floats wide = load(reinterpret_cast<const Float16*>(scales + row));
            std::memcpy(scale[half] + row, &wide, sizeof wide);
        }
        for (Index row = 0; row < kRows; ++row) zero[half][row] = zeros ? zeros[row] : middle;
    }
    INLINE void finish() {}
    INLINE void expand_row(Cursor<F>& cursor, Index row, std::uint16_t* out) const;
};

#if defined(__AVX2__)

INLINE __m128i narrow(Floats wide, Float16) { return _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT); }
INLINE __m128i narrow(Floats wide, Bfloat16) {
    const __m256i bits = _mm256_castps_si256(wide);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i words = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

template <typename F, typename Value>
INLINE void Grids<F, Value>::expand_row(Cursor<F>& cursor, Index row, std::uint16_t* out) const {
    const std::uint8_t *codes = cursor.take(row), *mask = cursor.mask(row);
    for (int byte = 0; byte < 8; ++byte) {
        __m128i words = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
        words = _mm_srli_epi16(words, cursor.shift(row));
        const __m128i z = _mm_set1_epi16(zero[byte / 4][row]);
        words = _mm_sub_epi16(_mm_and_si128(_mm_add_epi16(words, z), _mm_set1_epi16(F::top)), z);
        if (F::masked) {
            words = _mm_shuffle_epi8(words, _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.at[mask[byte]])));
        }
        codes += F::masked ? count_bits(mask[byte]) : 8;
        const Floats steps = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(words));
        const Floats wide = _mm256_mul_ps(steps, _mm256_set1_ps(scale[byte / 4][row]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * byte), narrow(wide, Value{}));
    }
}

#else

INLINE std::uint16_t narrow(float value, Bfloat16) { return narrow_bfloat16(value); }
INLINE std::uint16_t narrow(float value, Float16) { return narrow_float16(value); }

template <typename F, typename Value>
INLINE void Grids<F, Value>::expand_row(Cursor<F>& cursor, Index row, std::uint16_t* out) const {
    const std::uint8_t* codes = cursor.take(row);
    const std::uint64_t stored = F::masked ? read<std::uint64_t>(cursor.mask(row)) : ~std::uint64_t(0);
    for (Index col = 0; col < kCols; ++col) {
        const bool here = stored >> col & 1;
        const int half = col >= kCols / 2, z = zero[half][row], code = ((*codes >> cursor.shift(row)) + z) & F::top;
        out[col] = here ? narrow((code - z) * scale[half][row], Value{}) : 0;
        codes += here;
    }
}

#endif
#endif

// The tiles of a block, one after the other.
template <typename F, typename Value>
struct CodeTiles {
    const Product& product;
    const std::uint8_t* at;
    Index block, col = 0, same = 0;  // up to column `same` the groups stay
    Grids<F, Value> grids;

    INLINE CodeTiles(const Product& product, Index block)
        : product(product), at(static_cast<const std::uint8_t*>(product.weights) + product.blocks[block]), block(block) {}

    // Makes the grids those of the tile that begins at `col`, and counts the columns on.
    INLINE void enter(int count = 1, bool tables = true) {
        const Index groups = (product.cols + product.width - 1) / product.width, group = col / product.width;
        if (F::halves || col >= same) {
            for (int half = 0; half < 2; ++half) {
                const Index later = (col + half * kCols / 2) / product.width;
                const Index place = (block * groups + (!F::halves || later == groups ? group : later)) * kRows;
                const std::uint8_t* zeros = product.zeros ? product.zeros + place : nullptr;
                grids.enter(half, product.scales + place, zeros, product.middle);
            }
            if (tables) grids.finish();
            same = (group + 1) * product.width;
        }
        col += count * kCols;
    }

    __attribute__((noinline)) void expand(std::uint16_t* out, Index stride) {
        enter();
        Cursor<F> cursor(at);
#pragma GCC unroll kUnrolled
        for (Index row = 0; row < kRows; ++row) grids.expand_row(cursor, row, out + row * stride);
        at = cursor.end();
    }
};

// --- Products ------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

// Inputs of 64 columns in the order in which weights are decoded.
template <typename F>
struct Ordered {
    __m512bh first, second;
    explicit INLINE Ordered(const Bfloat16* from) {
        const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 32);
        first = (__m512bh)_mm512_permutex2var_epi16(low, _mm512_loadu_si512(kOrders.words[F::bits][0]), high);
        second = (__m512bh)_mm512_permutex2var_epi16(low, _mm512_loadu_si512(kOrders.words[F::bits][1]), high);
    }
    INLINE Floats add(__m512i weights, __m512i others, Floats sum) const {
        return _mm512_dpbf16_ps(_mm512_dpbf16_ps(sum, (__m512bh)weights, first), (__m512bh)others, second);
    }
};

template <int N>
struct Number {
    static constexpr int value = N;
};

// Calls body(row) for the rows of a tile with numbers known to the compiler, so that their sums stay in registers.
template <int Row = 0, typename Body>
INLINE void each_row(const Body& body) {
    body(Number<Row>{});
    if constexpr (Row + 1 < kRows) each_row<Row + 1>(body);
}

// Adds the products of `Count` tiles of the same groups to the sums of their rows, and returns where the next tile
// begins. Fresh: the tables of codes of 4 bits are made here, of symmetric grids, since storing them takes longer.
template <int Count, bool Fresh, typename F>
INLINE const std::uint8_t* add_tiles(
    const std::uint8_t* tile, const Bfloat16* inputs, const Grids<F, Bfloat16>& grids, Floats (&sums)[kRows]) {
    const __m512i nothing = opaque_zero();
    const Ordered<F> x(inputs), y(inputs + (Count - 1) * kCols);
    Cursor<F> cursor(tile), other(tile);
    if (Count == 2) {
        Cursor<F> last(tile);
        each_row([&](auto number) INLINE_LAMBDA { last.take(number.value); });
        other = Cursor<F>(last.end());
    }
    if constexpr (F::bits == 4) {
        const Floats steps = steps_of(_mm512_set1_epi32(grids.zero[0][0]));
        each_row([&](auto number) INLINE_LAMBDA {
            constexpr Index row = number.value;
            constexpr int shift = Cursor<F>::shift(row);
            const Floats weights = steps * grids.scale[0][row];
            const __m512i table = Fresh ? narrow(weights, weights, Bfloat16{}) : grids.table[row];
            const auto add = [&](__m512i codes, const Ordered<F>& inputs) INLINE_LAMBDA {
                const __m512i even = shift ? _mm512_srli_epi16(codes, shift) : codes;
                const __m512i odd = _mm512_srli_epi16(codes, 8 + shift);
                return inputs.add(_mm512_permutexvar_epi16(even, table), _mm512_permutexvar_epi16(odd, table), sums[row]);
            };
            sums[row] = add(spread(cursor, row, nothing), x);
            if (Count == 2) sums[row] = add(spread(other, row, nothing), y);
        });
    } else {
        each_row([&](auto number) INLINE_LAMBDA {
            constexpr Index row = number.value;
            const Floats h = _mm512_set1_ps(grids.scale[0][row]), base = _mm512_set1_ps(grids.base[0][row]);
            // (kBase + 128 + code) * h - (kBase + 128) * h: the second product is exact, so the weight is rounded once.
            // Codes are signed: the exclusive or adds 128.
            const auto weight = [&](__m512i codes) INLINE_LAMBDA {
                const __m512i byte = _mm512_set1_epi32(0xff00);
                const __m512i number = _mm512_set1_epi32(as_bits(grids.kBase + 128.0f));
                const __m512i bits = _mm512_ternarylogic_epi32(codes, byte, number, 0x6a);  // (codes & byte) ^ number
                return _mm512_fmsub_ps(_mm512_castsi512_ps(bits), h, base);
            };
            const auto add = [&](__m512i codes, const Ordered<F>& inputs) INLINE_LAMBDA {
                const Floats a = weight(_mm512_slli_epi32(codes, 8)), b = weight(codes);
                const Floats c = weight(_mm512_srli_epi32(codes, 8)), d = weight(_mm512_srli_epi32(codes, 16));
                return inputs.add(narrow(a, b, Bfloat16{}), narrow(c, d, Bfloat16{}), sums[row]);
            };
            sums[row] = add(spread(cursor, row, nothing), x);
            if (Count == 2) sums[row] = add(spread(other, row, nothing), y);
        });
    }
    return Count == 2 ? other.end() : cursor.end();
}

// One vector in bf16: weights stay in registers. Groups are multiples of `Count` tiles, and symmetric with 8 bits.
template <int Count, bool Fresh, typename F>
__attribute__((noinline)) void multiply_tiles(const Product& product, Index block) {
    const auto* inputs = static_cast<const Bfloat16*>(product.inputs);
    CodeTiles<F, Bfloat16> tiles(product, block);
    Floats sums[kRows];
    each_row([&](auto number) INLINE_LAMBDA { sums[number.value] = zeros(); });
    Index col = 0;
    for (; col + (Count - 1) * kCols < product.cols; col += Count * kCols) {
        tiles.enter(Count, !Fresh);
        tiles.at = add_tiles<Count, Fresh>(tiles.at, inputs + col, tiles.grids, sums);
    }
    if (col < product.cols) {
        tiles.enter(1, !Fresh);
        add_tiles<1, Fresh>(tiles.at, inputs + col, tiles.grids, sums);
    }
    each_row([&](auto number) INLINE_LAMBDA {
        const Index row = block * kRows + number.value;
        if (row < product.rows) store(product, 0, row, total(sums[number.value]));
    });
}

template <typename F>
void multiply_one(const Product& product, Index block) {
    const bool pairs = product.width % (2 * kCols) == 0 && product.width < product.cols;
    if constexpr (F::bits == 4 && F::masked) {
        if (pairs && !product.zeros) return multiply_tiles<2, true, F>(product, block);
    }
    multiply_tiles<1, false, F>(product, block);
}

#endif

// Expands the next tile of `tiles`, of whatever format, so that what follows is compiled once for all formats.
struct Expander {
    void* tiles;
    void (*function)(void* tiles, std::uint16_t* out, Index stride);
    template <typename Tiles>
    explicit Expander(Tiles& of)
        : tiles(&of), function([](void* tiles, std::uint16_t* out, Index stride) { static_cast<Tiles*>(tiles)->expand(out, stride); }) {}
    void operator()(std::uint16_t* out, Index stride) const { function(tiles, out, stride); }
};

template <typename Value, typename Input>
__attribute__((noinline)) void multiply_expanded(const Product& product, Index block, Expander expander) {
    multiply_several<Value, Input>(product, block, expander);
}

template <typename Value, typename Input>
void multiply(const Product& product, Index first, Index last) {
    with_format(product, [&](auto format) {
        using F = decltype(format);
        for (Index block = first; block < last; ++block) {
#if defined(__AVX512BF16__)
            if constexpr (sizeof(Input) == sizeof(Bfloat16)) {
                if constexpr (!F::halves) {
                    if (product.vectors == 1 && (F::bits == 4 || !product.zeros)) {
                        multiply_one<F>(product, block);
                        continue;
                    }
                }
            }
#endif
            CodeTiles<F, Value> tiles(product, block);
            multiply_expanded<Value, Input>(product, block, Expander(tiles));
        }
    });
}

void sparse(const Product& product, Index first, Index last) {
#if defined(__AVX512BF16__)
    if (computes_in(product.value, product.output) == kBfloat16) return multiply<Bfloat16, Bfloat16>(product, first, last);
#endif
    if (product.value == kBfloat16) return multiply<Bfloat16, float>(product, first, last);
    multiply<Float16, float>(product, first, last);
}

void expand(const Product& product, std::uint16_t* out, Index first, Index last) {
    with_format(product, [&](auto format) {
        using F = decltype(format);
        if (product.value == kBfloat16) return expand_blocks<CodeTiles<F, Bfloat16>>(product, out, first, last);
        expand_blocks<CodeTiles<F, Float16>>(product, out, first, last);
    });
}

}  // namespace

extern const Kernels LEVEL;
const Kernels LEVEL = {computes_in, sparse, nullptr, expand};
