// Products of pruned matrices with vectors, for the CPU: packing into tiles (`tiles.h`), threads, and the choice of the
// loops (`tile_kernels.cpp`, `code_kernels.cpp`) that the processor can run. `native_tiles.py` and `native_codes.py` call
// the functions at the end.

#include "tiles.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

extern const Kernels tiles_plain, codes_plain;
#if defined(__x86_64__)
// Null where the compiler does not know the instructions.
extern const Kernels tiles_avx2 __attribute__((weak)), codes_avx2 __attribute__((weak));
extern const Kernels tiles_avx512 __attribute__((weak)), codes_avx512 __attribute__((weak));
extern const Kernels tiles_avx512bf16 __attribute__((weak)), codes_avx512bf16 __attribute__((weak));
#endif

// The OpenMP runtime that torch has loaded, where it is GNU's: its threads are awake already.
#if defined(__linux__)
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags)
    __attribute__((weak));
#else
constexpr void (*GOMP_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
#endif

namespace {

struct Loops {
    const Kernels *tiles, *codes;  // null where the processor or the compiler cannot
};

Loops supported(Index level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                            __builtin_cpu_supports("avx512vbmi2");
    if (level == 1 && has_avx2) return {&tiles_avx2, &codes_avx2};
    if (level == 2 && has_avx512) return {&tiles_avx512, &codes_avx512};
    if (level == 3 && has_avx512 && __builtin_cpu_supports("avx512bf16")) return {&tiles_avx512bf16, &codes_avx512bf16};
#endif
    if (level == 0) return {&tiles_plain, &codes_plain};
    return {nullptr, nullptr};
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

// Multiplies a matrix with vectors of type `product.output` at `inputs`.
void multiply(const Kernels& kernels, Product product, const void* inputs, Index threads) {
    const Type needed = kernels.computes_in(product.value, product.output);
    std::vector<char> storage;
    product.padded = (product.cols + kCols - 1) / kCols * kCols;
    product.inputs = prepare(inputs, product.output, needed, product.vectors, product.cols, product.padded, storage);
    over_blocks(blocks_of(product.rows), threads, [&](Index first, Index last) {
        product.blocks ? kernels.sparse(product, first, last) : kernels.dense(product, first, last);
    });
}

// Writes the rows of blocks [first, last) as a dense matrix.
void expand(
    const Kernels& kernels, const Product& product, std::uint16_t* out, Index first, Index last, Index threads) {
    over_blocks(last - first, threads, [&](Index from, Index to) {
        kernels.expand(product, out + from * kRows * product.cols, first + from, first + to);
    });
}

Product product_of(const void* weights, const Index* blocks, void* outputs, Index rows, Index cols, Index vectors) {
    Product product{};
    product.weights = weights;
    product.blocks = blocks;
    product.outputs = outputs;
    product.rows = rows;
    product.cols = cols;
    product.vectors = vectors;
    return product;
}

void set_grid(
    Product& product, const std::uint16_t* scales, const std::uint8_t* zeros, Index width, Index middle, Index bits,
    Index masked, Index value) {
    product.scales = scales;
    product.zeros = zeros;
    product.width = width;
    product.middle = int(middle);
    product.bits = int(bits);
    product.masked = masked;
    product.value = Type(value);
}

}  // namespace

extern "C" {

// Whether the processor can run the loops of a level: 0 plain, 1 avx2, 2 avx512, 3 avx512bf16.
int tiles_supports(Index level) { return supported(level).tiles && supported(level).codes; }

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
    const Product product = product_of(tiles, blocks, nullptr, rows, cols, 0);
    expand(*supported(level).tiles, product, out, first, last, threads);
}

// Multiplies tiles with 1 to kMost vectors, (vectors, cols) → (vectors, rows), both of type `input`.
void tiles_multiply(
    const std::uint8_t* tiles, const Index* blocks, const void* inputs, void* outputs, Index rows, Index cols,
    Index vectors, Index value, Index input, Index level, Index threads) {
    Product product = product_of(tiles, blocks, outputs, rows, cols, vectors);
    product.value = Type(value);
    product.output = Type(input);
    multiply(*supported(level).tiles, product, inputs, threads);
}

// The same of a dense matrix, with one vector.
void dense_multiply(
    const void* weights, const void* inputs, void* outputs, Index rows, Index cols, Index value, Index input,
    Index level, Index threads) {
    Product product = product_of(weights, nullptr, outputs, rows, cols, 1);
    product.value = Type(value);
    product.output = Type(input);
    multiply(*supported(level).tiles, product, inputs, threads);
}

// Packs a matrix of codes, a byte each. `zeros` has the zero points of each block, group and row; `blocks` the byte of each
// block in `tiles`; `bits` is 4 or 8.
void codes_pack(
    const std::uint8_t* codes, const std::uint8_t* zeros, const Index* blocks, std::uint8_t* tiles,
    Index rows, Index cols, Index width, Index bits, Index masked, Index threads) {
    const Index groups = (cols + width - 1) / width, top = (Index(1) << bits) - 1;
    over_blocks(blocks_of(rows), threads, [&](Index first_block, Index last_block) {
        for (Index block = first_block; block < last_block; ++block) {
            std::uint8_t* to = tiles + blocks[block];
            const Index height = std::min(kRows, rows - block * kRows);
            for (Index start = 0; start < cols; start += kCols) {
                const Index end = std::min(start + kCols, cols);
                std::uint8_t* masks = to;
                if (masked) to += kMaskBytes;
                Index next[2] = {};  // of the codes in the low halves or whole bytes, and of those in the high halves
                for (Index row = 0; row < kRows; ++row) {
                    const bool high = bits == 4 && row >= kRows / 2;
                    std::uint64_t mask = 0;
                    if (row < height) {
                        const std::uint8_t* from = codes + (block * kRows + row) * cols;
                        const std::uint8_t* zero = zeros + block * groups * kRows + row;
                        for (Index col = start; col < end;) {
                            const Index group = col / width;
                            for (const Index last = std::min(end, (group + 1) * width); col < last; ++col) {
                                const bool kept = from[col] != zero[group * kRows];
                                if (masked && !kept) continue;
                                mask |= std::uint64_t(kept) << (col - start);
                                to[next[high]++] |= ((from[col] - zero[group * kRows]) & top) << (high ? 4 : 0);
                            }
                        }
                    }
                    if (masked) {
                        std::memcpy(masks + row * sizeof mask, &mask, sizeof mask);
                    } else {
                        next[high] = (row % (bits == 4 ? kRows / 2 : kRows) + 1) * kCols;
                    }
                }
                to += std::max(next[0], next[1]);
            }
        }
    });
}

// Writes the rows of blocks [first, last) of a matrix of codes as a dense matrix of type `value`. `zeros` are null if all
// zero points are `middle`.
void codes_expand(
    const std::uint8_t* tiles, const Index* blocks, const std::uint16_t* scales, const std::uint8_t* zeros,
    std::uint16_t* out, Index rows, Index cols, Index width, Index middle, Index bits, Index masked, Index value,
    Index first, Index last, Index level, Index threads) {
    Product product = product_of(tiles, blocks, nullptr, rows, cols, 0);
    set_grid(product, scales, zeros, width, middle, bits, masked, value);
    expand(*supported(level).codes, product, out, first, last, threads);
}

// Multiplies tiles of codes with 1 to kMost vectors, as `tiles_multiply` does.
void codes_multiply(
    const std::uint8_t* tiles, const Index* blocks, const std::uint16_t* scales, const std::uint8_t* zeros,
    const void* inputs, void* outputs, Index rows, Index cols, Index width, Index middle, Index bits, Index masked,
    Index value, Index vectors, Index input, Index level, Index threads) {
    Product product = product_of(tiles, blocks, outputs, rows, cols, vectors);
    set_grid(product, scales, zeros, width, middle, bits, masked, value);
    product.output = Type(input);
    multiply(*supported(level).codes, product, inputs, threads);
}

}  // extern "C"
