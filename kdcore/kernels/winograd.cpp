// A 3 x 3 convolution in float32 with padding 1 and stride 1 over channels-last maps: forward, and the gradient of its
// maps. Winograd's F(2 x 2, 3 x 3): 16 products of a pair of channels for four pixels in the place of 36.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv:1509.09308, section 4.1: a tile
// of 2 x 2 output pixels is A^T [(G g G^T) * (B^T d B)] A, with g the 3 x 3 weights, d the 4 x 4 pixels that the tile
// reads, and * element by element. Summed over input channels, that is a product of matrices (tiles x channels by
// channels x output channels) for each of the 16 places.
//
// Tiles are computed in blocks, which stay in the cache. A tile's sums have one order: the same bits for any batch, any
// place in it, and any number of threads. A value that is not finite reaches all four pixels of a tile.

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "threads.hpp"

namespace {

constexpr long LANES = 16;         // numbers of channels are multiples of it
constexpr long LINE = 16;           // floats in a line of the cache
constexpr long SMALL = 1 << 19;    // products of a place for which threads cost more than they gain
constexpr int PLACES = 16;         // of a 4 x 4 tile
constexpr long CACHE = 40 << 10;   // bytes of a block of tiles for which the cache next to the core is enough

#ifdef __AVX512F__
constexpr int W = 16, TILES = 12;  // floats of a register; tiles whose sums are in registers at once
typedef __m512 Floats;
inline Floats everywhere(float value) { return _mm512_set1_ps(value); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#else
constexpr int W = 8, TILES = 6;
typedef __m256 Floats;
inline Floats everywhere(float value) { return _mm256_set1_ps(value); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#endif

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline void fetch(const float* from, long count) {
    for (long at = 0; at < count; at += LINE) __builtin_prefetch(from + at);
}

// The registers of output channels that a product computes at once, from the channel c on.
inline int vectors_at(long out_channels, long c) { return c + 2 * W <= out_channels ? 2 : 1; }

struct Shape {
    long images, height, width, channels, out_channels;
    long rows, columns;  // of tiles
    long together;       // tiles of a block
    long tiles() const { return images * rows * columns; }
};

struct Finish {
    const float *bias, *shortcut;
    bool relu;
};

// B^T d B of one tile, for all channels: the place p of the tile goes to `to + p * by_place`.
template <bool EDGE>
inline void read_tile(const Shape& s, const float* image, long y, long x, float* to, long by_place) {
    const long row = s.width * s.channels;
    const float* from = image + y * row + x * s.channels;
    for (long c = 0; c < s.channels; c += W, from += W, to += W) {
        Floats half[4][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            Floats d[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const bool inside = !EDGE || (y + i >= 0 && y + i < s.height && x + j >= 0 && x + j < s.width);
                d[i] = inside ? load(from + i * row + j * s.channels) : Floats{};
            }
            half[0][j] = d[0] - d[2];
            half[1][j] = d[1] + d[2];
            half[2][j] = d[2] - d[1];
            half[3][j] = d[1] - d[3];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            store(to + (4 * i + 0) * by_place, half[i][0] - half[i][2]);
            store(to + (4 * i + 1) * by_place, half[i][1] + half[i][2]);
            store(to + (4 * i + 2) * by_place, half[i][2] - half[i][1]);
            store(to + (4 * i + 3) * by_place, half[i][1] - half[i][3]);
        }
    }
}

// A^T m A of one tile, for all output channels, and what follows the convolution.
inline void write_tile(const Shape& s, const float* from, long by_place, long at, long rows, long columns, float* y,
                       const Finish& finish) {
    const long row = s.width * s.out_channels;
    for (long c = 0; c < s.out_channels; c += W, from += W) {
        Floats half[2][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const Floats m0 = load(from + j * by_place), m1 = load(from + (4 + j) * by_place);
            const Floats m2 = load(from + (8 + j) * by_place), m3 = load(from + (12 + j) * by_place);
            half[0][j] = m0 + m1 + m2;
            half[1][j] = m1 - m2 - m3;
        }
        const Floats bias = finish.bias == nullptr ? Floats{} : load(finish.bias + c);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            if (i >= rows) break;
            const Floats pixels[2] = {half[i][0] + half[i][1] + half[i][2], half[i][1] - half[i][2] - half[i][3]};
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                if (j >= columns) break;
                const long here = at + i * row + j * s.out_channels + c;
                Floats value = pixels[j] + bias;
                if (finish.shortcut != nullptr) value += load(finish.shortcut + here);
                // Not "at most 0", so that a NaN passes, as in PyTorch.
                if (finish.relu) value = (Floats)((value <= Floats{}) ? Floats{} : value);
                store(y + here, value);
            }
        }
    }
}

// The sums of TILES tiles by N registers of output channels, for one place.
template <int N>
inline void product(const float* tiles, long channels, const float* weight, float* sums, long out_channels) {
    Floats all[TILES][N];
#pragma GCC unroll 12
    for (int t = 0; t < TILES; ++t) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) all[t][n] = Floats{};
    }
    for (long c = 0; c < channels; ++c, weight += N * W) {
        Floats weights[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) weights[n] = load(weight + n * W);
#pragma GCC unroll 12
        for (int t = 0; t < TILES; ++t) {
            const Floats value = everywhere(tiles[t * channels + c]);
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) all[t][n] = multiply_add(value, weights[n], all[t][n]);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < TILES; ++t) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) store(sums + t * out_channels + n * W, all[t][n]);
    }
}

// The tiles from `begin` to `end`, at most s.together.
void compute_block(const Shape& s, const float* x, long begin, long end, const float* packed, float* y,
                   const Finish& finish, float* read, float* sums) {
    const long of_image = s.rows * s.columns, by_place = s.together * s.channels;
    for (long tile = begin; tile < end; ++tile) {
        const long image = tile / of_image, row = tile % of_image / s.columns, column = tile % s.columns;
        const float* const from = x + image * s.height * s.width * s.channels;
        const long top = 2 * row - 1, left = 2 * column - 1;
        float* const to = read + (tile - begin) * s.channels;
        // What the tiles below read, and where this one is written, arrive during the products.
        for (long i = 0; i < 2; ++i) {
            fetch(from + ((top + 4 + i) * s.width + left + 1) * s.channels, 2 * s.channels);
            fetch(y + ((image * s.height + top + 1 + i) * s.width + left + 1) * s.out_channels, 2 * s.out_channels);
        }
        if (top < 0 || left < 0 || top + 4 > s.height || left + 4 > s.width) {
            read_tile<true>(s, from, top, left, to, by_place);
        } else {
            read_tile<false>(s, from, top, left, to, by_place);
        }
    }
    // Whole groups: what is beyond the last tile is an earlier block's, or zero, and is not written.
    const long groups = (end - begin + TILES - 1) / TILES;
    for (int place = 0; place < PLACES; ++place) {
        for (long c = 0; c < s.out_channels;) {
            const int n = vectors_at(s.out_channels, c);
            const float* const weight = packed + (place * s.out_channels + c) * s.channels;
            for (long group = 0; group < groups; ++group) {
                const float* const tiles = read + place * by_place + group * TILES * s.channels;
                float* const to = sums + (place * s.together + group * TILES) * s.out_channels + c;
                n == 2 ? product<2>(tiles, s.channels, weight, to, s.out_channels)
                       : product<1>(tiles, s.channels, weight, to, s.out_channels);
            }
            c += n * W;
        }
    }
    for (long tile = begin; tile < end; ++tile) {
        const long image = tile / of_image, row = tile % of_image / s.columns, column = tile % s.columns;
        const long at = ((image * s.height + 2 * row) * s.width + 2 * column) * s.out_channels;
        write_tile(s, sums + (tile - begin) * s.out_channels, s.together * s.out_channels, at,
                   s.height - 2 * row, s.width - 2 * column, y, finish);
    }
}

}  // namespace

extern "C" {

// Room for weights as the kernel reads them, in floats.
long winograd_packed(long out_channels, long channels) { return PLACES * out_channels * channels; }

// Put weights, with a stride for each of their four dimensions, into the form and the order that the kernel reads:
// G g G^T, [place][block of output channels][channel][output channel]. `turned` as for `conv3x3_pack`.
void winograd_pack(const float* weight, long out_channels, long channels, long by_out, long by_in, long by_y, long by_x,
                   int turned, float* packed) {
    if (turned) {
        weight += 2 * by_y + 2 * by_x;
        std::swap(by_out, by_in);
        by_y = -by_y;
        by_x = -by_x;
    }
    for (long block = 0; block < out_channels;) {
        const int n = vectors_at(out_channels, block);
        for (long c = 0; c < channels; ++c) {
            for (int v = 0; v < n; ++v) {
                Floats g[3][3], half[4][3];
                for (int i = 0; i < 3; ++i) {
                    for (int j = 0; j < 3; ++j) {
                        const float* from = weight + (block + v * W) * by_out + c * by_in + i * by_y + j * by_x;
                        for (int lane = 0; lane < W; ++lane) g[i][j][lane] = from[lane * by_out];
                    }
                }
                const auto four = [](Floats a, Floats b, Floats c, auto to) {
                    to(0, a);
                    to(1, (a + b + c) * 0.5f);
                    to(2, (a - b + c) * 0.5f);
                    to(3, c);
                };
                for (int j = 0; j < 3; ++j) four(g[0][j], g[1][j], g[2][j], [&](int i, Floats of) { half[i][j] = of; });
                for (int i = 0; i < 4; ++i) {
                    four(half[i][0], half[i][1], half[i][2], [&](int j, Floats of) {
                        store(packed + ((4 * i + j) * out_channels + block) * channels + (c * n + v) * W, of);
                    });
                }
            }
        }
        block += n * W;
    }
}

// y = relu(convolution of x + bias + shortcut). x: images x height x width x channels; y and shortcut: the same with
// out_channels. Both numbers of channels are multiples of 16. Null: bias, shortcut.
void winograd_forward(const float* x, long images, long height, long width, long channels, long out_channels,
                      const float* packed, const float* bias, const float* shortcut, int relu, float* y, int threads) {
    Shape s = {images, height, width, channels, out_channels, (height + 1) / 2, (width + 1) / 2, 0};
    const long bytes = PLACES * TILES * (channels + out_channels) * long(sizeof(float));
    s.together = std::max(1L, CACHE / bytes) * TILES;
    const long blocks = (s.tiles() + s.together - 1) / s.together;
    const Finish finish = {bias, shortcut, relu != 0};
    const bool small = s.tiles() * channels * out_channels < SMALL;
    in_threads(small ? 1 : threads, [&](long thread, long of) {
        const long floats = PLACES * s.together * (channels + out_channels);
        const std::unique_ptr<float, decltype(&std::free)> room(
            static_cast<float*>(std::aligned_alloc(64, size_t(floats) * sizeof(float))), &std::free);
        std::fill(room.get(), room.get() + PLACES * s.together * channels, 0.0f);
        for (long block = blocks * thread / of; block < blocks * (thread + 1) / of; ++block) {
            const long begin = block * s.together, end = std::min(s.tiles(), begin + s.together);
            compute_block(s, x, begin, end, packed, y, finish, room.get(), room.get() + PLACES * s.together * channels);
        }
    });
}
}

#endif
