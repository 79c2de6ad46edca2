// A 3 x 3 convolution in float32 with padding 1 and stride 1 over channels-last maps: forward, and the gradients of its
// maps and of its weights. Winograd's F(2 x 2, 3 x 3): 16 products of a pair of channels for four pixels in the place
// of 36.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv:1509.09308, section 4.1: a tile
// of 2 x 2 output pixels is A^T [(G g G^T) * (B^T d B)] A, with g the 3 x 3 weights, d the 4 x 4 pixels that the tile
// reads, and * element by element. Summed over input channels, that is a product of matrices (tiles x channels by
// channels x output channels) for each of the 16 places. The gradient of the weights, from the gradient e of a tile, is
// G^T [sum over tiles of (B^T d B) * (A e A^T)] G: products of channels x tiles by tiles x output channels.
//
// Tiles are computed in blocks, which stay in the cache. A tile's sums have one order: the same bits for any batch, any
// place in it, and any number of threads. A sum over tiles is made of parts, cut by the images alone and added in order:
// the same bits for any number of threads. A value that is not finite reaches all four pixels of a tile.

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

constexpr long LANES = 16;       // numbers of channels are multiples of it
constexpr long LINE = 16;        // floats in a line of the cache
constexpr long SMALL = 1 << 19;  // products of a place for which threads cost more than they gain
constexpr int PLACES = 16;       // of a 4 x 4 tile
constexpr long PARTS = 16, MOST_PARTS = 64;  // of a sum over tiles: the fewest, given the images, and the most
// Bytes of a block of tiles: as the cache next to the core has them; in the gradient of the weights, whose sums are in
// memory and not in registers, as the cache behind it.
constexpr long CACHE = 40 << 10, WEIGHT_CACHE = 256 << 10;

#ifdef __AVX512F__
// Floats of a register. Tiles whose sums are in registers at once; input channels, in the gradient of the weights.
constexpr int W = 16, TILES = 12, ROWS = 8;
typedef __m512 Floats;
inline Floats everywhere(float value) { return _mm512_set1_ps(value); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// Not "at most 0", so that a NaN passes, as in PyTorch.
inline Floats rectified(Floats values) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(values, _mm512_setzero_ps(), _CMP_NLE_UQ), values);
}
#else
constexpr int W = 8, TILES = 6, ROWS = 4;
typedef __m256 Floats;
inline Floats everywhere(float value) { return _mm256_set1_ps(value); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
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
        : image(tile / (s.rows * s.columns)), y(2 * (tile % (s.rows * s.columns) / s.columns)),
          x(2 * (tile % s.columns)) {}
};

// B^T d B of the tiles from `begin` to `end`: [place][tile][channel].
void read_tiles(const Shape& s, const float* x, long begin, long end, float* to) {
    const long by_place = s.together * s.channels;
    for (long tile = begin; tile < end; ++tile, to += s.channels) {
        const Place at(s, tile);
        const float* const from = x + at.image * s.height * s.width * s.channels;
        // What the tiles below read arrives during the products.
        for (long i = 3; i < 5; ++i) fetch(from + ((at.y + i) * s.width + at.x) * s.channels, 2 * s.channels);
        if (at.y == 0 || at.x == 0 || at.y + 3 > s.height || at.x + 3 > s.width) {
            read_tile<true>(s, from, at.y - 1, at.x - 1, to, by_place);
        } else {
            read_tile<false>(s, from, at.y - 1, at.x - 1, to, by_place);
        }
    }
}

// The tiles from `begin` to `end`, at most s.together.
void compute_block(const Shape& s, const float* x, long begin, long end, const float* packed, float* y,
                   const Finish& finish, float* read, float* sums) {
    const long by_place = s.together * s.channels;
    read_tiles(s, x, begin, end, read);
    // Where the tiles are written arrives during the products, too.
    for (long tile = begin; tile < end; ++tile) {
        const Place at(s, tile);
        float* const to = y + ((at.image * s.height + at.y) * s.width + at.x) * s.out_channels;
        for (long i = 0; i < 2; ++i) fetch(to + i * s.width * s.out_channels, 2 * s.out_channels);
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
        const Place at(s, tile);
        write_tile(s, sums + (tile - begin) * s.out_channels, s.together * s.out_channels,
                   ((at.image * s.height + at.y) * s.width + at.x) * s.out_channels, s.height - at.y, s.width - at.x, y,
                   finish);
    }
}

// A e A^T of one tile's gradient, for all output channels.
inline void read_gradient(const Shape& s, const float* from, long rows, long columns, float* to, long by_place) {
    const long row = s.width * s.out_channels;
    const auto four = [](Floats first, Floats second, auto each) {
        each(0, first);
        each(1, first + second);
        each(2, first - second);
        each(3, -second);
    };
    for (long c = 0; c < s.out_channels; c += W, from += W, to += W) {
        Floats half[4][2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const bool inside = j < columns;
            const Floats first = inside ? load(from + j * s.out_channels) : Floats{};
            const Floats second = inside && rows > 1 ? load(from + row + j * s.out_channels) : Floats{};
            four(first, second, [&](int i, Floats of) { half[i][j] = of; });
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            four(half[i][0], half[i][1], [&](int j, Floats of) { store(to + (4 * i + j) * by_place, of); });
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
void add_block(const Shape& s, const float* x, const float* grad_y, long begin, long end, float* sums, float* read,
               float* gradients) {
    read_tiles(s, x, begin, end, read);
    for (long tile = begin; tile < end; ++tile) {
        const Place at(s, tile);
        read_gradient(s, grad_y + ((at.image * s.height + at.y) * s.width + at.x) * s.out_channels, s.height - at.y,
                      s.width - at.x, gradients + (tile - begin) * s.out_channels, s.together * s.out_channels);
    }
    for (int place = 0; place < PLACES; ++place) {
        const float* const tiles = read + place * s.together * s.channels;
        const float* const of_place = gradients + place * s.together * s.out_channels;
        float* const to = sums + place * s.channels * s.out_channels;
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

Shape shape_of(long images, long height, long width, long channels, long out_channels, long cache) {
    Shape s = {images, height, width, channels, out_channels, (height + 1) / 2, (width + 1) / 2, 0};
    const long bytes = PLACES * TILES * (channels + out_channels) * long(sizeof(float));
    s.together = std::max(1L, cache / bytes) * TILES;
    return s;
}

// Parts of a sum over tiles: enough for threads, and few where each is large.
long parts_of(const Shape& s) {
    return std::min({s.images, MOST_PARTS, std::max(PARTS, MOST_PARTS * LANES * LANES / (s.channels * s.out_channels))});
}

bool is_small(const Shape& s) { return s.tiles() * s.channels * s.out_channels < SMALL; }

using Room = std::unique_ptr<float, decltype(&std::free)>;
Room room_of(long floats) {
    const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
    return Room(static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free);
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
    const Shape s = shape_of(images, height, width, channels, out_channels, CACHE);
    const long blocks = (s.tiles() + s.together - 1) / s.together;
    const Finish finish = {bias, shortcut, relu != 0};
    in_threads(is_small(s) ? 1 : threads, [&](long thread, long of) {
        const Room room = room_of(PLACES * s.together * (channels + out_channels));
        std::fill(room.get(), room.get() + PLACES * s.together * channels, 0.0f);
        for (long block = blocks * thread / of; block < blocks * (thread + 1) / of; ++block) {
            const long begin = block * s.together, end = std::min(s.tiles(), begin + s.together);
            compute_block(s, x, begin, end, packed, y, finish, room.get(), room.get() + PLACES * s.together * channels);
        }
    });
}

// Room for the parts of the gradient of the weights, in floats.
long winograd_weight_room(long images, long height, long width, long channels, long out_channels) {
    const Shape s = shape_of(images, height, width, channels, out_channels, WEIGHT_CACHE);
    return parts_of(s) * PLACES * channels * out_channels;
}

// grad_w, out_channels x 3 x 3 x channels, from x and grad_y as they are in `winograd_forward`. At least one image.
void winograd_weight_gradient(const float* x, const float* grad_y, float* grad_w, long images, long height, long width,
                              long channels, long out_channels, float* partial, int threads) {
    const Shape s = shape_of(images, height, width, channels, out_channels, WEIGHT_CACHE);
    const long parts = parts_of(s), of_image = s.rows * s.columns, pairs = channels * out_channels;
    in_threads(is_small(s) ? 1 : threads, [&](long thread, long of) {
        const Room room = room_of(PLACES * s.together * (channels + out_channels));
        for (long part = parts * thread / of; part < parts * (thread + 1) / of; ++part) {
            float* const sums = partial + part * PLACES * pairs;
            std::fill(sums, sums + PLACES * pairs, 0.0f);
            const long last = s.images * (part + 1) / parts * of_image;
            for (long begin = s.images * part / parts * of_image; begin < last; begin += s.together) {
                add_block(s, x, grad_y, begin, std::min(last, begin + s.together), sums, room.get(),
                          room.get() + PLACES * s.together * channels);
            }
        }
    });
    in_threads(is_small(s) ? 1 : threads, [&](long thread, long of) {
        for (long c = channels * thread / of; c < channels * (thread + 1) / of; ++c) {
            for (long k = 0; k < out_channels; k += W) {
                Floats all[4][4], half[3][4];
                for (int place = 0; place < PLACES; ++place) {
                    const float* const from = partial + place * pairs + c * out_channels + k;
                    Floats sum = load(from);
                    for (long part = 1; part < parts; ++part) sum += load(from + part * PLACES * pairs);
                    all[place / 4][place % 4] = sum;
                }
                const auto three = [](Floats m0, Floats m1, Floats m2, Floats m3, auto each) {
                    each(0, m0 + (m1 + m2) * 0.5f);
                    each(1, (m1 - m2) * 0.5f);
                    each(2, (m1 + m2) * 0.5f + m3);
                };
                for (int j = 0; j < 4; ++j) {
                    three(all[0][j], all[1][j], all[2][j], all[3][j], [&](int i, Floats to) { half[i][j] = to; });
                }
                for (int i = 0; i < 3; ++i) {
                    three(half[i][0], half[i][1], half[i][2], half[i][3], [&](int j, Floats values) {
                        for (int lane = 0; lane < W; ++lane) {
                            grad_w[((k + lane) * 9 + 3 * i + j) * channels + c] = values[lane];
                        }
                    });
                }
            }
        }
    });
}
}

#endif
