// Products of pruned matrices with vectors, for the CPU: packing into tiles (`tiles.h`), threads, and the choice of the
// loops (`tile_kernels.cpp`) that the processor can run. `native_tiles.py` calls the functions at the end.

#include "tiles.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

extern const Kernels tiles_plain;
#if defined(__x86_64__)
// Null where the compiler does not know the instructions.
extern const Kernels tiles_avx2 __attribute__((weak));
extern const Kernels tiles_avx512 __attribute__((weak));
extern const Kernels tiles_avx512bf16 __attribute__((weak));
#endif

// The OpenMP runtime that torch has loaded, where it is GNU's: its threads are awake already.
#if defined(__linux__)
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags)
    __attribute__((weak));
#else
constexpr void (*GOMP_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
#endif

namespace {

const Kernels* supported(Index level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
    if (level == 1 && has_avx2) return &tiles_avx2;
    if (level == 2 && has_avx512) return &tiles_avx512;
    if (level == 3 && has_avx512 && __builtin_cpu_supports("avx512bf16")) return &tiles_avx512bf16;
#endif
    return level == 0 ? &tiles_plain : nullptr;
}

// Calls body(first, last) for `threads` shares of the blocks.
template <typename Body>
void over_blocks(Index blocks, Index threads, const Body& body) {
    threads = std::max<Index>(1, std::min(threads, blocks));
    std::atomic<Index> next{0};
    auto take = [&] {
        for (Index t; (t = next++) < threads;) body(blocks * t / threads, blocks * (t + 1) / threads);
    };
    if (threads == 1) return take();
    if (GOMP_parallel) {
        return GOMP_parallel([](void* data) { (*static_cast<decltype(take)*>(data))(); }, &take, threads, 0);
    }
    std::vector<std::thread> others;
    for (Index t = 1; t < threads; ++t) others.emplace_back(take);
    take();
    for (auto& other : others) other.join();
}

float widen(std::uint16_t bits, Type type) {
    std::uint32_t wide;
    if (type == kBfloat16) {
        wide = std::uint32_t(bits) << 16;
    } else if ((bits & 0x7c00) == 0x7c00) {  // infinity or NaN
        wide = std::uint32_t(bits & 0x8000) << 16 | 0x7f800000 | std::uint32_t(bits & 0x3ff) << 13;
    } else {
        wide = std::uint32_t(bits & 0x7fff) << 13;
        float size;
        std::memcpy(&size, &wide, sizeof size);
        size *= 0x1p112f;
        std::memcpy(&wide, &size, sizeof size);
        wide |= std::uint32_t(bits & 0x8000) << 16;
    }
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Copies the inputs, of type `from`, in the type and with the padding that the kernels need, aligned to a cache line.
// `storage` holds the copy.
const void* prepare(
    const void* inputs, Type from, Type to, Index vectors, Index cols, Index padded, std::vector<char>& storage) {
    constexpr std::uintptr_t line = 64;
    const Index size = to == kFloat32 ? 4 : 2;
    storage.assign(vectors * padded * size + line, 0);
    char* copy = storage.data() + (-reinterpret_cast<std::uintptr_t>(storage.data()) & (line - 1));
    for (Index n = 0; n < vectors; ++n) {
        char* row = copy + n * padded * size;
        if (from == to) {
            std::memcpy(row, static_cast<const char*>(inputs) + n * cols * size, cols * size);
            continue;
        }
        const auto* narrow = static_cast<const std::uint16_t*>(inputs) + n * cols;
        for (Index col = 0; col < cols; ++col) {
            const float wide = widen(narrow[col], from);
            std::memcpy(row + col * size, &wide, size);
        }
    }
    return copy;
}

Index blocks_of(Index rows) { return (rows + kRows - 1) / kRows; }

void multiply(
    const void* weights, const Index* blocks, const void* inputs, void* outputs, Index rows, Index cols, Index vectors,
    Index value, Index input, Index level, Index threads) {
    const Kernels& kernels = *supported(level);
    const Index padded = (cols + kCols - 1) / kCols * kCols;
    const Type needed = kernels.computes_in(Type(value), Type(input));
    std::vector<char> storage;
    const void* copy = prepare(inputs, Type(input), needed, vectors, cols, padded, storage);
    const Product product{weights, blocks, copy, outputs, rows, cols, padded, vectors, Type(value), Type(input)};
    over_blocks(blocks_of(rows), threads, [&](Index first, Index last) {
        blocks ? kernels.sparse(product, first, last) : kernels.dense(product, first, last);
    });
}

}  // namespace

extern "C" {

// Whether the processor can run the loops of a level: 0 plain, 1 avx2, 2 avx512, 3 avx512bf16.
int tiles_supports(Index level) { return supported(level) != nullptr; }

// Packs a matrix of 16-bit values. `mask` has (cols + 7) / 8 bytes a row, `starts` the index of each row's first value,
// `blocks` the byte of each block in `tiles`.
void tiles_pack(
    const std::uint8_t* mask, const std::uint16_t* values, const Index* starts, const Index* blocks,
    std::uint8_t* tiles, Index rows, Index cols, Index threads) {
    const Index row_bytes = (cols + 7) / 8;
    over_blocks(blocks_of(rows), threads, [&](Index first, Index last) {
        for (Index block = first; block < last; ++block) {
            std::uint8_t* to = tiles + blocks[block];
            const Index height = std::min(kRows, rows - block * kRows);
            Index next[kRows];
            std::copy_n(starts + block * kRows, height, next);
            for (Index byte = 0; byte < row_bytes; byte += kCols / 8) {
                std::uint64_t masks[kRows] = {};
                for (Index row = 0; row < height; ++row) {
                    const std::uint8_t* from = mask + (block * kRows + row) * row_bytes + byte;
                    std::memcpy(&masks[row], from, std::min<Index>(kCols / 8, row_bytes - byte));
                }
                std::memcpy(to, masks, sizeof masks);
                to += sizeof masks;
                for (Index row = 0; row < height; ++row) {
                    const Index count = __builtin_popcountll(masks[row]);
                    if (count == 0) continue;
                    std::memcpy(to, values + next[row], count * sizeof *values);
                    to += count * sizeof *values;
                    next[row] += count;
                }
            }
        }
    });
}

// Writes the rows of blocks [first, last) as a dense matrix.
void tiles_expand(
    const std::uint8_t* tiles, const Index* blocks, std::uint16_t* out, Index rows, Index cols,
    Index first, Index last, Index level, Index threads) {
    const Kernels& kernels = *supported(level);
    Product product{};
    product.weights = tiles;
    product.blocks = blocks;
    product.rows = rows;
    product.cols = cols;
    over_blocks(last - first, threads, [&](Index from, Index to) {
        kernels.expand(product, out + from * kRows * cols, first + from, first + to);
    });
}

// Multiplies tiles with 1 to kMost vectors, (vectors, cols) → (vectors, rows), both of type `input`.
void tiles_multiply(
    const std::uint8_t* tiles, const Index* blocks, const void* inputs, void* outputs, Index rows, Index cols,
    Index vectors, Index value, Index input, Index level, Index threads) {
    multiply(tiles, blocks, inputs, outputs, rows, cols, vectors, value, input, level, threads);
}

// The same of a dense matrix, with one vector.
void dense_multiply(
    const void* weights, const void* inputs, void* outputs, Index rows, Index cols, Index value, Index input,
    Index level, Index threads) {
    multiply(weights, nullptr, inputs, outputs, rows, cols, 1, value, input, level, threads);
}

}  // extern "C"
