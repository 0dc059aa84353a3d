// What `tiles.cpp` (threads and dispatch) and `tile_kernels.cpp` (the loops, compiled once per level) share.
//
// The layout. A block is 16 rows, the last one padded with empty rows; a tile is 64 columns of a block, the last one
// padded with empty columns. A tile holds 16 masks of 64 bits, row after row (bit c: column c is stored), and then the
// stored values of the first row, of the second, … The tiles of a block follow each other, and so do the blocks: a
// product reads the whole matrix as one stream. Behind it are 64 bytes that may be read and mean nothing.
//
// No header of the C++ library is included here or in `tile_kernels.cpp`: a function of it that is compiled for one
// level and not inlined would be linked into all others.

#pragma once

#include <cstdint>

using Index = std::int64_t;

constexpr Index kRows = 16, kCols = 64;  // of a tile
constexpr Index kMaskBytes = kRows * kCols / 8;
constexpr Index kMost = 32;  // vectors that a product takes

enum Type : int { kBfloat16, kFloat16, kFloat32 };

// A product of a matrix of 16-bit weights with `vectors` vectors; the pointers are to the first element.
struct Product {
    const void* weights;    // tiles, or the rows of a dense matrix
    const Index* blocks;    // byte at which each block of tiles begins; null for a dense matrix
    const void* inputs;     // (vectors, padded columns), see `Kernels::computes_in`; zeros behind the columns
    void* outputs;          // (vectors, rows), of type `output`
    Index rows, cols, padded, vectors;
    Type value, output;
};

// The loops of one level. Each computes the blocks [first, last) of 16 rows.
struct Kernels {
    Type (*computes_in)(Type value, Type input);  // type that `Product::inputs` must have: kFloat32, or kBfloat16
    void (*sparse)(const Product&, Index first, Index last);
    void (*dense)(const Product&, Index first, Index last);  // of one vector
    // Writes the rows of the blocks; `out` is the first row of block `first`.
    void (*expand)(const Product&, std::uint16_t* out, Index first, Index last);
};
