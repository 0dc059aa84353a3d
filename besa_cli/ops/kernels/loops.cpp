// The inner loops of learning, for the CPU: ranks within rows, the hard mask, and the gradient of the mixtures; weights
// on a grid, and the gradients of its scales and zero points. No header of torch is used: `native.py` hands over plain
// pointers, the plain forms are in `plain.py`.
//
// Every row is computed by one thread in one order, so the results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MANY_PROCESSORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MANY_PROCESSORS
#endif

// What a function for many processors calls has to become part of it, or is compiled for the plainest one.
#define ALWAYS_INLINE __attribute__((always_inline))

namespace {

using Index = std::int64_t;

// Calls body(first, last) on `threads` threads, each with its share of the rows.
template <typename Body>
void over_rows(Index rows, Index threads, const Body& body) {
    threads = std::max<Index>(1, std::min(threads, rows));
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    for (Index t = 1; t < threads; ++t) {
        others.emplace_back([=, &body] { body(rows * t / threads, rows * (t + 1) / threads); });
    }
    body(0, rows / threads);
    for (auto& other : others) other.join();
}

inline float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct Bfloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(Bfloat16 value) { return as_float(std::uint32_t(value.bits) << 16); }
// Of finite numbers: the exponent is 112 less than that of the same number in 32 bits. No branch.
inline float widen(Float16 value) {
    const float size = as_float(std::uint32_t(value.bits & 0x7fff) << 13) * 0x1p112f;
    return as_float(as_bits(size) | std::uint32_t(value.bits & 0x8000) << 16);
}

// To the nearest, of two the even one.
inline std::uint16_t narrow(float value) {
    const std::uint32_t bits = as_bits(value);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// A weight's bits where `keep` is all ones, +0 where it is 0. Branch-free, so that compilers use vectors.
template <typename Weight>
inline void put(Weight weight, std::uint32_t keep, float& out) { out = as_float(as_bits(widen(weight)) & keep); }
template <typename Weight>
inline void put(Weight weight, std::uint32_t keep, Bfloat16& out) { out.bits = narrow(widen(weight)) & keep; }
inline void put(Bfloat16 weight, std::uint32_t keep, Bfloat16& out) { out.bits = weight.bits & keep; }

template <typename Weight, typename Rank, typename Out>
inline ALWAYS_INLINE void mask_rows(
    const Weight* __restrict weight, const Rank* __restrict ranks, const std::int32_t* counts, Out* __restrict out,
    Index cols, Index first, Index last) {
    for (Index row = first; row < last; ++row) {
        const std::int32_t count = counts[row];
        for (Index at = row * cols; at < (row + 1) * cols; ++at) {
            put(weight[at], -std::uint32_t(ranks[at] >= count), out[at]);
        }
    }
}

// Sums of gradient·weight by the first candidate that prunes the weight's rank, then summed over the candidates.
template <typename Gradient, typename Weight, typename Rank>
inline ALWAYS_INLINE void sum_rows(
    const Gradient* gradient, const Weight* weight, const Rank* ranks, const std::uint16_t* first_pruned, float* out,
    Index cols, Index candidates, Index first, Index last) {
    constexpr Index width = 256;
    float products[width];
    for (Index row = first; row < last; ++row) {
        const Gradient* g = gradient + row * cols;
        const Weight* w = weight + row * cols;
        const Rank* rank = ranks + row * cols;
        float* sums = out + row * candidates;
        std::fill(sums, sums + candidates, 0.0f);
        for (Index start = 0; start < cols; start += width) {
            const Index count = std::min(width, cols - start);
            for (Index i = 0; i < count; ++i) products[i] = widen(g[start + i]) * widen(w[start + i]);
            for (Index i = 0; i < count; ++i) sums[first_pruned[rank[start + i]]] += products[i];
        }
        float total = 0.0f;
        for (Index d = 0; d < candidates; ++d) {
            total += sums[d];
            sums[d] = -total;
        }
    }
}

// Ranks by rising score, ties by column: a radix sort of the scores' bits, one byte at a time. Negative scores come
// first, −0 equals 0.
template <typename Rank>
void rank_rows(const float* scores, Rank* ranks, Index cols, Index first, Index last) {
    struct Item {
        std::uint32_t key;
        std::uint32_t col;
    };
    constexpr int bytes = 4, values = 256;
    std::vector<Item> items(cols), sorted(cols);
    for (Index row = first; row < last; ++row) {
        std::uint32_t places[bytes][values] = {};
        for (Index col = 0; col < cols; ++col) {
            std::uint32_t bits;
            std::memcpy(&bits, scores + row * cols + col, sizeof bits);
            if (bits == 0x80000000u) bits = 0;
            const std::uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
            items[col] = {key, std::uint32_t(col)};
            for (int byte = 0; byte < bytes; ++byte) ++places[byte][(key >> (8 * byte)) & 0xff];
        }
        for (int byte = 0; byte < bytes; ++byte) {
            std::uint32_t start = 0;
            for (auto& place : places[byte]) {
                const std::uint32_t count = place;
                place = start;
                start += count;
            }
            for (const Item& item : items) sorted[places[byte][(item.key >> (8 * byte)) & 0xff]++] = item;
            items.swap(sorted);
        }
        for (Index place = 0; place < cols; ++place) ranks[row * cols + items[place].col] = static_cast<Rank>(place);
    }
}

// One group's grid: its scale, zero point and greatest code.
struct Grid {
    float scale, zero, top;

    // The nearest code of a weight that is `steps` scales long, before it is clipped.
    inline float wished(float steps) const { return std::rint(steps) + zero; }
    inline float code(float wished) const { return std::min(std::max(wished, 0.0f), top); }
};

// Calls body(grid, group, start, end) for every group of the rows: `width` columns, fewer in the last of a row.
template <typename Body>
inline ALWAYS_INLINE void over_groups(const float* scales, const float* zeros, Index cols, Index width,
                                                       float top, Index first, Index last, const Body& body) {
    const Index groups = (cols + width - 1) / width;
    for (Index row = first; row < last; ++row) {
        for (Index group = 0; group < groups; ++group) {
            const Index at = row * groups + group, start = row * cols + group * width;
            body(Grid{scales[at], zeros[at], top}, at, start, std::min(start + width, (row + 1) * cols));
        }
    }
}

template <typename Weight>
inline ALWAYS_INLINE void grid_rows(const Weight* __restrict weight, const float* scales,
                                                     const float* zeros, float* __restrict out, Index cols, Index width,
                                                     Index top, Index first, Index last) {
    over_groups(scales, zeros, cols, width, float(top), first, last, [=](Grid grid, Index, Index start, Index end) ALWAYS_INLINE {
        for (Index i = start; i < end; ++i) {
            out[i] = (grid.code(grid.wished(widen(weight[i]) / grid.scale)) - grid.zero) * grid.scale;
        }
    });
}

// Of each weight: ∂L/∂Ŵ times what Ŵ gains with the scale, and where it is clipped ∂L/∂Ŵ. No branch, so that compilers
// use vectors: codes are whole numbers, so a clipped weight misses its own by 1 or more.
template <typename Weight>
inline ALWAYS_INLINE void slopes(const float* __restrict gradient, const Weight* __restrict weight,
                                                  Grid grid, float* __restrict by_scale, float* __restrict by_end,
                                                  Index count) {
    for (Index i = 0; i < count; ++i) {
        const float steps = widen(weight[i]) / grid.scale, wished = grid.wished(steps), code = grid.code(wished);
        const float clipped = std::min(std::fabs(wished - code), 1.0f);
        by_scale[i] = gradient[i] * ((code - grid.zero) - (1.0f - clipped) * steps);
        by_end[i] = gradient[i] * clipped;
    }
}

// The sums of these over each group, in `lanes` sums that are added in the end.
template <typename Weight>
inline ALWAYS_INLINE void slope_rows(const float* gradient, const Weight* weight, const float* scales,
                                                      const float* zeros, float* by_scale, float* by_zero, Index cols,
                                                      Index width, Index top, Index first, Index last) {
    constexpr Index lanes = 16, chunk = 256;
    over_groups(scales, zeros, cols, width, float(top), first, last, [=](Grid grid, Index at, Index start, Index end) ALWAYS_INLINE {
        float scale_sums[lanes] = {}, end_sums[lanes] = {}, by_h[chunk], by_e[chunk];
        for (Index from = start; from < end; from += chunk) {
            const Index count = std::min(chunk, end - from);
            slopes(gradient + from, weight + from, grid, by_h, by_e, count);
            for (Index i = count; i % lanes != 0; ++i) by_h[i] = by_e[i] = 0.0f;
            for (Index i = 0; i < count; i += lanes) {
                for (Index lane = 0; lane < lanes; ++lane) scale_sums[lane] += by_h[i + lane];
                for (Index lane = 0; lane < lanes; ++lane) end_sums[lane] += by_e[i + lane];
            }
        }
        float scale_sum = 0.0f, end_sum = 0.0f;
        for (Index lane = 0; lane < lanes; ++lane) {
            scale_sum += scale_sums[lane];
            end_sum += end_sums[lane];
        }
        by_scale[at] = scale_sum;
        by_zero[at] = -grid.scale * end_sum;
    });
}

}  // namespace

#define MASK(NAME, WEIGHT, RANK, OUT)                                                                              \
    MANY_PROCESSORS static void NAME##_rows(const WEIGHT* weight, const RANK* ranks, const std::int32_t* counts,   \
                                            OUT* out, Index cols, Index first, Index last) {                       \
        mask_rows(weight, ranks, counts, out, cols, first, last);                                                  \
    }                                                                                                              \
    extern "C" void NAME(const WEIGHT* weight, const RANK* ranks, const std::int32_t* counts, OUT* out, Index rows, \
                         Index cols, Index threads) {                                                              \
        over_rows(rows, threads, [=](Index first, Index last) {                                                    \
            NAME##_rows(weight, ranks, counts, out, cols, first, last);                                            \
        });                                                                                                        \
    }

#define SUMS(NAME, GRADIENT, WEIGHT, RANK)                                                                         \
    MANY_PROCESSORS static void NAME##_rows(const GRADIENT* gradient, const WEIGHT* weight, const RANK* ranks,     \
                                            const std::uint16_t* first_pruned, float* out, Index cols,             \
                                            Index candidates, Index first, Index last) {                           \
        sum_rows(gradient, weight, ranks, first_pruned, out, cols, candidates, first, last);                       \
    }                                                                                                              \
    extern "C" void NAME(const GRADIENT* gradient, const WEIGHT* weight, const RANK* ranks,                        \
                         const std::uint16_t* first_pruned, float* out, Index rows, Index cols, Index candidates,  \
                         Index threads) {                                                                          \
        over_rows(rows, threads, [=](Index first, Index last) {                                                    \
            NAME##_rows(gradient, weight, ranks, first_pruned, out, cols, candidates, first, last);                \
        });                                                                                                        \
    }

#define RANKS(NAME, RANK)                                                                                     \
    extern "C" void NAME(const float* scores, RANK* ranks, Index rows, Index cols, Index threads) {           \
        over_rows(rows, threads,                                                                              \
                  [=](Index first, Index last) { rank_rows(scores, ranks, cols, first, last); });             \
    }

#define GRID(SUFFIX, WEIGHT)                                                                                           \
    MANY_PROCESSORS static void grid_##SUFFIX##_rows(const WEIGHT* weight, const float* scales, const float* zeros,    \
                                                     float* out, Index cols, Index width, Index top, Index first,      \
                                                     Index last) {                                                     \
        grid_rows(weight, scales, zeros, out, cols, width, top, first, last);                                          \
    }                                                                                                                  \
    extern "C" void grid_##SUFFIX(const WEIGHT* weight, const float* scales, const float* zeros, float* out,           \
                                  Index rows, Index cols, Index width, Index top, Index threads) {                     \
        over_rows(rows, threads, [=](Index first, Index last) {                                                        \
            grid_##SUFFIX##_rows(weight, scales, zeros, out, cols, width, top, first, last);                           \
        });                                                                                                            \
    }

#define SLOPES(SUFFIX, WEIGHT)                                                                                         \
    MANY_PROCESSORS static void slopes_##SUFFIX##_rows(                                                                \
        const float* gradient, const WEIGHT* weight, const float* scales, const float* zeros, float* by_scale,         \
        float* by_zero, Index cols, Index width, Index top, Index first, Index last) {                                 \
        slope_rows(gradient, weight, scales, zeros, by_scale, by_zero, cols, width, top, first, last);                 \
    }                                                                                                                  \
    extern "C" void slopes_##SUFFIX(const float* gradient, const WEIGHT* weight, const float* scales,                  \
                                    const float* zeros, float* by_scale, float* by_zero, Index rows, Index cols,       \
                                    Index width, Index top, Index threads) {                                           \
        over_rows(rows, threads, [=](Index first, Index last) {                                                        \
            slopes_##SUFFIX##_rows(gradient, weight, scales, zeros, by_scale, by_zero, cols, width, top, first, last); \
        });                                                                                                            \
    }

GRID(float, float)
GRID(bfloat16, Bfloat16)
GRID(float16, Float16)
SLOPES(float, float)
SLOPES(bfloat16, Bfloat16)
SLOPES(float16, Float16)

#define FOR_WEIGHT(NAME, WEIGHT, SUFFIX, RANK)                     \
    MASK(mask_##NAME##_float_##SUFFIX, WEIGHT, RANK, float)        \
    MASK(mask_##NAME##_bfloat16_##SUFFIX, WEIGHT, RANK, Bfloat16)  \
    SUMS(sums_float_##NAME##_##SUFFIX, float, WEIGHT, RANK)        \
    SUMS(sums_bfloat16_##NAME##_##SUFFIX, Bfloat16, WEIGHT, RANK)

#define FOR_RANK(SUFFIX, RANK)                     \
    FOR_WEIGHT(float, float, SUFFIX, RANK)         \
    FOR_WEIGHT(bfloat16, Bfloat16, SUFFIX, RANK)   \
    FOR_WEIGHT(float16, Float16, SUFFIX, RANK)     \
    RANKS(ranks_##SUFFIX, RANK)

FOR_RANK(short, std::int16_t)
FOR_RANK(int, std::int32_t)
