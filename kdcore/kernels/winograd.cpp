// A 3 x 3 convolution in float32 with padding 1 and stride 1 over channels-last maps: forward, and the gradients of its
// maps and of its weights. Winograd's F(4 x 4, 3 x 3): 36 products of a pair of channels for 16 pixels in the place of
// 144.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv:1509.09308, section 4: a tile of
// 4 x 4 output pixels is A^T [(G g G^T) * (B^T d B)] A, with g the 3 x 3 weights, d the 6 x 6 pixels that the tile
// reads, and * element by element. Summed over input channels, that is a product of matrices (tiles x channels by
// channels x output channels) for each of the 36 places. The gradient of the weights, from the gradient e of a tile, is
// G^T [sum over tiles of (B^T d B) * (A e A^T)] G: products of channels x tiles by tiles x output channels.
//
// The matrices are those of Toom and Cook for the points 0, a, -a, b, -b and infinity. The paper's points, 1 and 2, lose
// twice as many bits as a = 1 / sqrt(2) and b = sqrt(2).
//
// Tiles are computed in blocks, which stay in the cache. A tile's sums have one order: the same bits for any batch, any
// place in it, and any number of threads. A sum over tiles is made of parts, cut by the images alone and added in order:
// the same bits for any number of threads. A value that is not finite reaches all pixels of a tile.

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "threads.hpp"

namespace {

constexpr long LINE = 16;         // floats in a line of the cache
constexpr long SMALL = 1 << 18;   // products of a place for which threads cost more than they gain
constexpr int PIXELS = 4;         // of a side of a tile that is written
constexpr int SIDE = PIXELS + 2;  // of what it reads
constexpr int PLACES = SIDE * SIDE;
constexpr float a = 0.70710678f, b = 1.41421356f;  // the points
// Of a sum over tiles: the most parts, and the fewest tiles of a part, and of a block, so that the sums are not read and
// written for a few of them.
constexpr long PARTS = 16, FEWEST = 64;
// Bytes of a block of tiles: as the cache next to the core has them; in the gradient of the weights, whose sums are in
// memory and not in registers, as the cache behind it.
constexpr long CACHE = 40 << 10, WEIGHT_CACHE = 256 << 10;

#ifdef __AVX512F__
// Floats of a register. Tiles whose sums are in registers at once; input channels, in the gradient of the weights.
constexpr int W = 16, TILES = 12, ROWS = 8;
typedef __m512 Floats;
inline Floats everywhere(float value) { return _mm512_set1_ps(value); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats both(Floats a, Floats b) { return (Floats)_mm512_and_si512((__m512i)a, (__m512i)b); }
// Not "at most 0", so that a NaN passes, as in PyTorch.
inline Floats rectified(Floats values) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(values, _mm512_setzero_ps(), _CMP_NLE_UQ), values);
}
#else
constexpr int W = 8, TILES = 6, ROWS = 4;
typedef __m256 Floats;
inline Floats everywhere(float value) { return _mm256_set1_ps(value); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats both(Floats a, Floats b) { return _mm256_and_ps(a, b); }
inline Floats rectified(Floats values) {
    return _mm256_and_ps(values, _mm256_cmp_ps(values, _mm256_setzero_ps(), _CMP_NLE_UQ));
}
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

// factor * x + y
inline Floats scaled(float factor, Floats x, Floats y) { return multiply_add(everywhere(factor), x, y); }

// A column or a row of B^T d.
inline void read_line(const Floats (&d)[SIDE], Floats (&to)[SIDE]) {
    const Floats even_a = scaled(-2.0f, d[2], d[4]), odd_a = scaled(-2.0f, d[1], d[3]);
    const Floats even_b = scaled(-0.5f, d[2], d[4]), odd_b = scaled(-0.5f, d[1], d[3]);
    to[0] = scaled(-2.5f, d[2], d[0] + d[4]);
    to[1] = scaled(a, odd_a, even_a);
    to[2] = scaled(-a, odd_a, even_a);
    to[3] = scaled(b, odd_b, even_b);
    to[4] = scaled(-b, odd_b, even_b);
    to[5] = scaled(-2.5f, d[3], d[1] + d[5]);
}

// Of A^T m.
inline void write_line(const Floats (&m)[SIDE], Floats (&to)[PIXELS]) {
    const Floats even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const Floats even_b = m[3] + m[4], odd_b = m[3] - m[4];
    to[0] = m[0] + (even_a + even_b);
    to[1] = scaled(a, odd_a, b * odd_b);
    to[2] = scaled(2.0f, even_b, 0.5f * even_a);
    to[3] = scaled(0.5f * a, odd_a, scaled(2.0f * b, odd_b, m[5]));
}

// Of A e.
inline void gradient_line(const Floats (&e)[PIXELS], Floats (&to)[SIDE]) {
    const Floats even_a = scaled(0.5f, e[2], e[0]), odd_a = scaled(0.5f, e[3], e[1]);
    const Floats even_b = scaled(2.0f, e[2], e[0]), odd_b = scaled(2.0f, e[3], e[1]);
    to[0] = e[0];
    to[1] = scaled(a, odd_a, even_a);
    to[2] = scaled(-a, odd_a, even_a);
    to[3] = scaled(b, odd_b, even_b);
    to[4] = scaled(-b, odd_b, even_b);
    to[5] = e[3];
}

// Of G g.
inline void weight_line(const Floats (&g)[3], Floats (&to)[SIDE]) {
    const Floats even_a = scaled(0.5f, g[2], g[0]), even_b = scaled(2.0f, g[2], g[0]);
    to[0] = g[0];
    to[1] = scaled(a, g[1], even_a) * (-1 / 1.5f);
    to[2] = scaled(-a, g[1], even_a) * (-1 / 1.5f);
    to[3] = scaled(b, g[1], even_b) * (1 / 6.0f);
    to[4] = scaled(-b, g[1], even_b) * (1 / 6.0f);
    to[5] = g[2];
}

// Of G^T m.
inline void weight_gradient_line(const Floats (&m)[SIDE], Floats (&to)[3]) {
    const Floats even_a = (m[1] + m[2]) * (-1 / 1.5f), odd_a = (m[1] - m[2]) * (-1 / 1.5f);
    const Floats even_b = (m[3] + m[4]) * (1 / 6.0f), odd_b = (m[3] - m[4]) * (1 / 6.0f);
    to[0] = m[0] + (even_a + even_b);
    to[1] = scaled(a, odd_a, b * odd_b);
    to[2] = scaled(0.5f, even_a, scaled(2.0f, even_b, m[5]));
}

// From a place to the next one, for all pairs of channels. Of this and the like below: one line more than there is, or
// all places share a few sets of the cache.
inline long pairs_of(long out_channels, long channels) { return out_channels * channels + LINE; }

struct Shape {
    long images, height, width, channels, out_channels;
    long rows, columns;  // of tiles
    long together;       // tiles of a block
    long tiles() const { return images * rows * columns; }
    // The same for tiles of so many channels.
    long by_place(long of_channels) const { return together * of_channels + LINE; }
    long room() const { return PLACES * (by_place(channels) + by_place(out_channels)); }
    long by_place_of_pairs() const { return pairs_of(out_channels, channels); }
};

struct Finish {
    const float *bias, *shortcut;
    bool relu;
};

// B^T d B of one tile, for all channels: the place p of the tile goes to `to + p * by_place`.
template <bool EDGE>
inline void read_tile(const Shape& s, const float* image, long y, long x, float* to) {
    const long by_place = s.by_place(s.channels);
    const float* rows[SIDE];
    Floats inside[SIDE];
    for (long i = 0; i < SIDE; ++i) {
        // In the place of a row outside the maps the nearest one is read, and not used.
        const long there = EDGE ? std::min(std::max(y + i, 0L), s.height - 1) : y + i;
        rows[i] = image + (there * s.width + x) * s.channels;
        if (EDGE) std::memset(&inside[i], y + i == there ? -1 : 0, sizeof inside[i]);
    }
    for (long c = 0; c < s.channels; c += W, to += W) {
        Floats halves[SIDE][SIDE];
#pragma GCC unroll 1
        for (int j = 0; j < SIDE; ++j) {
            if (EDGE && (x + j < 0 || x + j >= s.width)) {
                for (Floats& value : halves[j]) value = Floats{};
                continue;
            }
            const long at = j * s.channels + c;
            Floats d[SIDE];
#pragma GCC unroll 6
            for (int i = 0; i < SIDE; ++i) {
                d[i] = load(rows[i] + at);
                if (EDGE) d[i] = both(d[i], inside[i]);
            }
            read_line(d, halves[j]);
        }
#pragma GCC unroll 1
        for (int i = 0; i < SIDE; ++i) {
            Floats line[SIDE], all[SIDE];
#pragma GCC unroll 6
            for (int j = 0; j < SIDE; ++j) line[j] = halves[j][i];
            read_line(line, all);
#pragma GCC unroll 6
            for (int j = 0; j < SIDE; ++j) store(to + (SIDE * i + j) * by_place, all[j]);
        }
    }
}

// A^T m A of one tile, for all output channels, and what follows the convolution.
inline void write_tile(const Shape& s, const float* from, long at, long rows, long columns, float* y,
                       const Finish& finish) {
    const long row = s.width * s.out_channels, by_place = s.by_place(s.out_channels);
    for (long c = 0; c < s.out_channels; c += W, from += W) {
        Floats halves[SIDE][PIXELS];
#pragma GCC unroll 1
        for (int j = 0; j < SIDE; ++j) {
            Floats m[SIDE];
#pragma GCC unroll 6
            for (int i = 0; i < SIDE; ++i) m[i] = load(from + (SIDE * i + j) * by_place);
            write_line(m, halves[j]);
        }
        const Floats bias = finish.bias == nullptr ? Floats{} : load(finish.bias + c);
#pragma GCC unroll 1
        for (int i = 0; i < PIXELS; ++i) {
            if (i >= rows) break;
            Floats line[SIDE], pixels[PIXELS];
#pragma GCC unroll 6
            for (int j = 0; j < SIDE; ++j) line[j] = halves[j][i];
            write_line(line, pixels);
#pragma GCC unroll 4
            for (int j = 0; j < PIXELS; ++j) {
                if (j >= columns) break;
                const long here = at + i * row + j * s.out_channels + c;
                Floats value = pixels[j] + bias;
                if (finish.shortcut != nullptr) value += load(finish.shortcut + here);
                if (finish.relu) value = rectified(value);
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

// Where a tile is: its image, and in it the row and the column of the first pixel that it writes.
struct Place {
    long image, y, x;
    Place(const Shape& s, long tile)
        : image(tile / (s.rows * s.columns)), y(PIXELS * (tile % (s.rows * s.columns) / s.columns)),
          x(PIXELS * (tile % s.columns)) {}
    void next(const Shape& s) {
        if ((x += PIXELS) < s.width) return;
        x = 0;
        if ((y += PIXELS) < s.height) return;
        y = 0;
        ++image;
    }
    long first(const Shape& s, long of_channels) const { return ((image * s.height + y) * s.width + x) * of_channels; }
};

// B^T d B of the tiles from `begin` to `end`: [place][tile][channel].
void read_tiles(const Shape& s, const float* x, long begin, long end, float* to) {
    Place at(s, begin);
    for (long tile = begin; tile < end; ++tile, at.next(s), to += s.channels) {
        const float* const from = x + at.image * s.height * s.width * s.channels;
        // What the tiles below read arrives during the products.
        for (long i = PIXELS + 1; i <= 2 * PIXELS; ++i) {
            fetch(from + ((at.y + i) * s.width + at.x) * s.channels, PIXELS * s.channels);
        }
        if (at.y == 0 || at.x == 0 || at.y + PIXELS + 1 > s.height || at.x + PIXELS + 1 > s.width) {
            read_tile<true>(s, from, at.y - 1, at.x - 1, to);
        } else {
            read_tile<false>(s, from, at.y - 1, at.x - 1, to);
        }
    }
}

// The tiles from `begin` to `end`, at most s.together.
void compute_block(const Shape& s, const float* x, long begin, long end, const float* packed, float* y,
                   const Finish& finish, float* read) {
    float* const sums = read + PLACES * s.by_place(s.channels);
    read_tiles(s, x, begin, end, read);
    // Where the tiles are written arrives during the products, too.
    Place at(s, begin);
    for (long tile = begin; tile < end; ++tile, at.next(s)) {
        float* const to = y + at.first(s, s.out_channels);
        for (long i = 0; i < PIXELS; ++i) fetch(to + i * s.width * s.out_channels, PIXELS * s.out_channels);
    }
    // Whole groups: what is beyond the last tile is an earlier block's, or zero, and is not written.
    const long groups = (end - begin + TILES - 1) / TILES;
    for (int place = 0; place < PLACES; ++place) {
        for (long c = 0; c < s.out_channels;) {
            const int n = vectors_at(s.out_channels, c);
            const float* const weight = packed + place * s.by_place_of_pairs() + c * s.channels;
            for (long group = 0; group < groups; ++group) {
                const float* const tiles = read + place * s.by_place(s.channels) + group * TILES * s.channels;
                float* const to = sums + place * s.by_place(s.out_channels) + group * TILES * s.out_channels + c;
                n == 2 ? product<2>(tiles, s.channels, weight, to, s.out_channels)
                       : product<1>(tiles, s.channels, weight, to, s.out_channels);
            }
            c += n * W;
        }
    }
    at = Place(s, begin);
    for (long tile = begin; tile < end; ++tile, at.next(s)) {
        write_tile(s, sums + (tile - begin) * s.out_channels, at.first(s, s.out_channels), s.height - at.y,
                   s.width - at.x, y, finish);
    }
}

// A e A^T of one tile's gradient, for all output channels.
inline void read_gradient(const Shape& s, const float* from, long rows, long columns, float* to) {
    const long row = s.width * s.out_channels, by_place = s.by_place(s.out_channels);
    for (long c = 0; c < s.out_channels; c += W, from += W, to += W) {
        Floats halves[PIXELS][SIDE];
#pragma GCC unroll 1
        for (int j = 0; j < PIXELS; ++j) {
            Floats e[PIXELS];
#pragma GCC unroll 4
            for (int i = 0; i < PIXELS; ++i) {
                e[i] = i < rows && j < columns ? load(from + i * row + j * s.out_channels) : Floats{};
            }
            gradient_line(e, halves[j]);
        }
#pragma GCC unroll 1
        for (int i = 0; i < SIDE; ++i) {
            Floats line[PIXELS], all[SIDE];
#pragma GCC unroll 4
            for (int j = 0; j < PIXELS; ++j) line[j] = halves[j][i];
            gradient_line(line, all);
#pragma GCC unroll 6
            for (int j = 0; j < SIDE; ++j) store(to + (SIDE * i + j) * by_place, all[j]);
        }
    }
}

// Add to R * N registers of sums, of input by output channels, what some tiles give, for one place.
template <int R, int N>
inline void add_products(const float* tiles, long channels, const float* gradients, long out_channels, long count,
                         float* sums) {
    Floats all[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) all[r][n] = load(sums + r * out_channels + n * W);
    }
    for (long t = 0; t < count; ++t, tiles += channels, gradients += out_channels) {
        Floats of[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) of[n] = load(gradients + n * W);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Floats value = everywhere(tiles[r]);
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) all[r][n] = multiply_add(value, of[n], all[r][n]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) store(sums + r * out_channels + n * W, all[r][n]);
    }
}

// Add what the tiles from `begin` to `end`, at most s.together, give to sums [place][channel][output channel].
void add_block(const Shape& s, const float* x, const float* grad_y, long begin, long end, float* sums, float* read) {
    float* const gradients = read + PLACES * s.by_place(s.channels);
    read_tiles(s, x, begin, end, read);
    Place at(s, begin);
    for (long tile = begin; tile < end; ++tile, at.next(s)) {
        const float* const from = grad_y + at.first(s, s.out_channels);
        for (long i = PIXELS; i < 2 * PIXELS; ++i) fetch(from + i * s.width * s.out_channels, PIXELS * s.out_channels);
        read_gradient(s, from, s.height - at.y, s.width - at.x, gradients + (tile - begin) * s.out_channels);
    }
    for (int place = 0; place < PLACES; ++place) {
        const float* const tiles = read + place * s.by_place(s.channels);
        const float* const of_place = gradients + place * s.by_place(s.out_channels);
        float* const to = sums + place * s.by_place_of_pairs();
        for (long k = 0; k < s.out_channels;) {
            const int n = vectors_at(s.out_channels, k);
            const auto add = [&](long c, auto rows, auto vectors) {
                add_products<rows, vectors>(tiles + c, s.channels, of_place + k, s.out_channels, end - begin,
                                            to + c * s.out_channels + k);
            };
            constexpr std::integral_constant<int, ROWS> few{};
            constexpr std::integral_constant<int, 2 * ROWS> many{};
            for (long c = 0; c < s.channels; c += n == 2 ? ROWS : 2 * ROWS) {
                n == 2 ? add(c, few, std::integral_constant<int, 2>{}) : add(c, many, std::integral_constant<int, 1>{});
            }
            k += n * W;
        }
    }
}

Shape shape_of(long images, long height, long width, long channels, long out_channels, long cache, long fewest = 1) {
    Shape s = {images, height, width, channels, out_channels, (height + PIXELS - 1) / PIXELS, (width + PIXELS - 1) / PIXELS, 0};
    const long bytes = PLACES * TILES * (channels + out_channels) * long(sizeof(float));
    s.together = std::max((fewest + TILES - 1) / TILES, cache / bytes) * TILES;
    return s;
}

long parts_of(const Shape& s) { return std::max(1L, std::min({s.images, PARTS, s.tiles() / FEWEST})); }

bool is_small(const Shape& s) { return s.tiles() * s.channels * s.out_channels < SMALL; }

using Room = std::unique_ptr<float, decltype(&std::free)>;
Room room_of(long floats) {
    const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
    return Room(static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free);
}

}  // namespace

extern "C" {

// Room for weights as the kernel reads them, in floats.
long winograd_packed(long out_channels, long channels) { return PLACES * pairs_of(out_channels, channels); }

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
                Floats g[3][3], halves[3][SIDE];
                for (int i = 0; i < 3; ++i) {
                    for (int j = 0; j < 3; ++j) {
                        const float* from = weight + (block + v * W) * by_out + c * by_in + i * by_y + j * by_x;
                        for (int lane = 0; lane < W; ++lane) g[j][i][lane] = from[lane * by_out];
                    }
                }
                float* const to = packed + block * channels + (c * n + v) * W;
                for (int j = 0; j < 3; ++j) weight_line(g[j], halves[j]);
                for (int i = 0; i < SIDE; ++i) {
                    const Floats line[3] = {halves[0][i], halves[1][i], halves[2][i]};
                    Floats all[SIDE];
                    weight_line(line, all);
                    for (int j = 0; j < SIDE; ++j) {
                        store(to + (SIDE * i + j) * pairs_of(out_channels, channels), all[j]);
                    }
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
    const Shape s = shape_of(images, height, width, channels, out_channels, CACHE);
    const long blocks = (s.tiles() + s.together - 1) / s.together;
    const Finish finish = {bias, shortcut, relu != 0};
    in_threads(is_small(s) ? 1 : threads, [&](long thread, long of) {
        const Room room = room_of(s.room());
        std::fill(room.get(), room.get() + PLACES * s.by_place(channels), 0.0f);
        for (long block = blocks * thread / of; block < blocks * (thread + 1) / of; ++block) {
            const long begin = block * s.together, end = std::min(s.tiles(), begin + s.together);
            compute_block(s, x, begin, end, packed, y, finish, room.get());
        }
    });
}

// Room for the parts of the gradient of the weights, in floats.
long winograd_weight_room(long images, long height, long width, long channels, long out_channels) {
    const Shape s = shape_of(images, height, width, channels, out_channels, WEIGHT_CACHE, FEWEST);
    return parts_of(s) * PLACES * s.by_place_of_pairs();
}

// grad_w, out_channels x 3 x 3 x channels, from x and grad_y as they are in `winograd_forward`. At least one image.
void winograd_weight_gradient(const float* x, const float* grad_y, float* grad_w, long images, long height, long width,
                              long channels, long out_channels, float* partial, int threads) {
    const Shape s = shape_of(images, height, width, channels, out_channels, WEIGHT_CACHE, FEWEST);
    const long parts = parts_of(s), of_image = s.rows * s.columns, by_place = s.by_place_of_pairs();
    in_threads(is_small(s) ? 1 : threads, [&](long thread, long of) {
        const Room room = room_of(s.room());
        for (long part = parts * thread / of; part < parts * (thread + 1) / of; ++part) {
            float* const sums = partial + part * PLACES * by_place;
            std::fill(sums, sums + PLACES * by_place, 0.0f);
            const long last = s.images * (part + 1) / parts * of_image;
            for (long begin = s.images * part / parts * of_image; begin < last; begin += s.together) {
                add_block(s, x, grad_y, begin, std::min(last, begin + s.together), sums, room.get());
            }
        }
    });
    in_threads(is_small(s) ? 1 : threads, [&](long thread, long of) {
        for (long c = channels * thread / of; c < channels * (thread + 1) / of; ++c) {
            float* const sums = partial + c * out_channels;
            for (int place = 0; place < PLACES; ++place) {
                for (long part = 1; part < parts; ++part) {
                    float* const to = sums + place * by_place;
                    const float* const from = to + part * PLACES * by_place;
                    for (long k = 0; k < out_channels; k += W) store(to + k, load(to + k) + load(from + k));
                }
            }
            for (long k = 0; k < out_channels; k += W) {
                Floats halves[SIDE][3];
                for (int j = 0; j < SIDE; ++j) {
                    Floats line[SIDE];
                    for (int i = 0; i < SIDE; ++i) line[i] = load(sums + (SIDE * i + j) * by_place + k);
                    weight_gradient_line(line, halves[j]);
                }
                for (int i = 0; i < 3; ++i) {
                    Floats line[SIDE], values[3];
                    for (int j = 0; j < SIDE; ++j) line[j] = halves[j][i];
                    weight_gradient_line(line, values);
                    for (int j = 0; j < 3; ++j) {
                        for (int lane = 0; lane < W; ++lane) {
                            grad_w[((k + lane) * 9 + 3 * i + j) * channels + c] = values[j][lane];
                        }
                    }
                }
            }
        }
    });
}
}

#endif
