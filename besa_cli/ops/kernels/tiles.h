// What `tiles.cpp` (threads and dispatch) and `tile_kernels.cpp` (the loops, compiled once per level) share.
//
// The layout. A block is 16 rows, the last one padded with empty rows; a tile is 64 columns of a block, the last one
// padded with empty columns. A tile holds 16 masks of 64 bits, row after row (bit c: column c is stored), and then the
// stored values of the first row, of the second, … The tiles of a block follow each other, and so do the blocks: a
// product reads the whole matrix as one stream. Behind it are 64 bytes that may be read and mean nothing.
//
// Quantized weights are stored as codes: of 8 bits in place of the values, row after row; or of 4 bits as two streams that
// lie in the halves of the bytes, the codes of the first eight rows in the low ones and those of the others in the high
// ones, the longer of the two giving the size. Bit c of a mask: the code of column c does not stand for zero. Without
// masks all 64 codes of each row are stored, those of padding, too. Scales and zero points lie beside the tiles, those
// of a block's 16 rows together, group after group; rows of padding have any.
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

// A product of a matrix of 16-bit or quantized weights with `vectors` vectors; the pointers are to the first element.
struct Product {
    const void* weights;    // tiles, or the rows of a dense matrix
    const Index* blocks;    // byte at which each block of tiles begins; null for a dense matrix
    const void* inputs;     // (vectors, padded columns), see `Kernels::computes_in`; zeros behind the columns
    void* outputs;          // (vectors, rows), of type `output`
    Index rows, cols, padded, vectors;
    Type value, output;
    // Of quantized weights, which are rounded to `value`:
    const std::uint16_t* scales;  // (blocks, groups, kRows), fp16
    const std::uint8_t* zeros;    // the same of zero points; null if all are `middle`
    Index width;                  // columns in a group: a multiple of 32, or all
    int middle, bits;             // 4 or 8 bits
    bool masked;
};

// The loops of one level. Each computes the blocks [first, last) of 16 rows.
struct Kernels {
    Type (*computes_in)(Type value, Type input);  // type that `Product::inputs` must have: kFloat32, or kBfloat16
    void (*sparse)(const Product&, Index first, Index last);
    void (*dense)(const Product&, Index first, Index last);  // of one vector
    // Writes the rows of the blocks; `out` is the first row of block `first`.
    void (*expand)(const Product&, std::uint16_t* out, Index first, Index last);
};
