// The gradient of the weights of a 3 x 3 convolution (padding 1, stride 1 or 2) over channels-last maps in bfloat16.
//
//     grad_w[co][ci][ky][kx] = sum over images, rows r and columns p of
//         grad_y[r][p][co] * x[stride * r + ky - 1][stride * p + kx - 1][ci]
//
// It is a product over pixels. `vdpbf16ps` adds two products to each of 16 floats: a lane is one output channel, and the
// two products belong to two pixels beside each other in a row of grad_y. So both maps are copied into buffers of pairs,
// [pair of pixels][channel][2], a chunk of some hundred pixels at a time. One vector of grad_y and one pair of x, which is
// broadcast, then give 16 elements of grad_w. 18 sums (nine taps of two input channels) stay in registers during a chunk.
//
// The same bits for every number of threads: the images are cut into fixed blocks, whose sums are added in order.
// The instruction takes a denormal number as 0.

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "threads.hpp"

namespace {

constexpr long LANES = 16;     // channels of a group: the floats of a register
constexpr long TAPS = 9;
constexpr long PIXELS = 256;   // of a chunk, about: its pairs of two groups of channels fit into the L1 cache
constexpr long ROWS = 4;       // the fewest rows of a chunk, because two more of grad_y are copied with each
constexpr long BLOCKS = 64;    // of images, with 16 channels: the most parts of the sum
constexpr long SHARES = 16;    // the least number of pieces of work, where there are as many images

using Pixel = uint16_t;    // a bfloat16
using Pair = uint32_t;     // two of them
using Sums = __m512;

struct Shape {
    long images, height, width, in_channels, out_channels, stride;
    long out_height, out_width;
    long pairs;          // of a row of grad_y
    long x_rows;         // rows of x that one row of a chunk has
    long x_row;          // pairs that a row of x occupies in a buffer
    long rows;           // of a chunk, or of an image, if less
    long together;       // images of a chunk
    long blocks;
    long groups;         // of output channels
    long sums;           // floats of one part of the sum
    long x_group, y_group;  // pairs that a group of channels occupies in a buffer

    Shape(long images, long height, long width, long in_channels, long out_channels, long stride)
        : images(images), height(height), width(width), in_channels(in_channels), out_channels(out_channels),
          stride(stride) {
        out_height = (height + stride - 1) / stride;
        out_width = (width + stride - 1) / stride;
        pairs = (out_width + 1) / 2;
        x_rows = stride;
        x_row = (stride == 1 ? 2 * pairs + 1 : 3 * pairs) * LANES;
        const long pixels = PIXELS / stride;
        rows = std::min(out_height, std::max(ROWS, pixels / (2 * pairs)));
        sums = TAPS * in_channels * out_channels;
        groups = out_channels / LANES;
        blocks = std::max(BLOCKS * LANES * LANES / (in_channels * out_channels), (SHARES + groups - 1) / groups);
        blocks = std::min({blocks, images, BLOCKS});
        const long fit = std::max(1L, pixels / (2 * pairs * out_height));
        together = rows < out_height ? 1 : std::min(fit, (images + blocks - 1) / blocks);
        x_group = together * rows * x_rows * x_row;
        y_group = together * (rows + 2) * pairs * LANES;
    }
    long buffer() const { return in_channels / LANES * x_group + groups * y_group; }
    long room(long threads) const { return blocks * sums + threads * buffer() + LANES; }
};

inline __m256i pixel(const Pixel* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// Store the pairs of two pixels: their channels in turn.
inline void store_pairs(Pair* to, __m256i first, __m256i second) {
    alignas(64) static constexpr Pixel ORDER[2 * LANES] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i order = _mm512_load_si512(ORDER);
    const __m512i pairs =
        _mm512_permutex2var_epi16(_mm512_castsi256_si512(first), order, _mm512_castsi256_si512(second));
    _mm512_store_si512(to, pairs);
}

// Store 16 channels of a row of grad_y: pixels (0, 1), (2, 3), ... What is outside of the map is 0.
inline void store_y(const Shape& s, const Pixel* row, Pair* to) {
    const long step = s.out_channels;
    long p = 0;
    for (; p + 2 <= s.out_width; p += 2, row += 2 * step, to += LANES) store_pairs(to, pixel(row), pixel(row + step));
    if (p < s.out_width) store_pairs(to, pixel(row), _mm256_setzero_si256());
}

// Store 16 channels of a row of x, for stride 1 as (0, 1), (2, 3), ... and (-1, 0), (1, 2), ...: the first for kx = 1,
// the others for kx = 0 and, from the second pair on, for kx = 2. For stride 2 each kx has pairs of its own:
// (-1, 1), (3, 5), ...; (0, 2), (4, 6), ...; (1, 3), (5, 7), ...
template <int STRIDE>
inline void store_x(const Shape& s, const Pixel* row, Pair* to) {
    const long step = s.in_channels, other = s.pairs * LANES;
    const __m256i zero = _mm256_setzero_si256();
    __m256i before = zero;
    const auto store = [&](auto pixel_at) {
        const __m256i first = pixel_at(0), second = pixel_at(1);
        if constexpr (STRIDE == 1) {
            store_pairs(to, first, second);
            store_pairs(to + other, before, first);
            before = second;
        } else {
            const __m256i third = pixel_at(2), fourth = pixel_at(3);
            store_pairs(to, before, second);
            store_pairs(to + other, first, third);
            store_pairs(to + 2 * other, second, fourth);
            before = fourth;
        }
        to += LANES;
    };
    constexpr long PIXELS_OF_PAIR = 2 * STRIDE;
    long p = 0;
    for (; p + PIXELS_OF_PAIR <= s.width; p += PIXELS_OF_PAIR, row += PIXELS_OF_PAIR * step) {
        store([=](long i) { return pixel(row + i * step); });
    }
    if (p < s.width) store([=](long i) { return p + i < s.width ? pixel(row + i * step) : zero; });
    if (STRIDE == 1) store_pairs(to + other, before, zero);
}

inline __m512bh bits(__m512i of) { return (__m512bh)of; }
inline __m512bh load(const Pair* from) { return bits(_mm512_load_si512(from)); }
inline __m512bh all(const Pair* from) { return bits(_mm512_set1_epi32(int(*from))); }

// The sums of nine taps for two input channels and the 16 output channels of a group, over a chunk.
template <int STRIDE>
void add_products(const Shape& s, const Pair* x, const Pair* y, long images, long first, long rows, bool more,
                  float* to) {
    Sums sums[2][3][3];
#pragma GCC unroll 18
    for (int i = 0; i < 18; ++i) (&sums[0][0][0])[i] = more ? _mm512_load_ps(to + i * LANES) : _mm512_setzero_ps();
    const long pairs = s.pairs * LANES;
    // `above`: whether ky = 2 has a row of grad_y for this row of x; `below`: ky = 0.
    const auto add_row = [&](const Pair* x, const Pair* y, auto above, auto below) {
        const Pair* of_kx[3] = {x + pairs, x, x + pairs + LANES};
        if (STRIDE == 2) of_kx[0] = x, of_kx[1] = x + pairs, of_kx[2] = x + 2 * pairs;
        const Pair *y0 = y + pairs, *y1 = y, *y2 = STRIDE == 1 ? y - pairs : y;
        for (long i = 0; i < pairs; i += LANES) {
            const __m512bh middle = load(y1 + i);
            __m512bh lower, upper;
            if (below) lower = load(y0 + i);
            if (above) upper = STRIDE == 1 ? load(y2 + i) : middle;
#pragma GCC unroll 3
            for (int kx = 0; kx < 3; ++kx) {
#pragma GCC unroll 2
                for (int c = 0; c < 2; ++c) {
                    const __m512bh pair = all(of_kx[kx] + i + c);
                    sums[c][1][kx] = _mm512_dpbf16_ps(sums[c][1][kx], middle, pair);
                    const __m512bh odd = STRIDE == 1 || !(above || below) ? pair : all(of_kx[kx] + i + c + s.x_row);
                    if (below) sums[c][0][kx] = _mm512_dpbf16_ps(sums[c][0][kx], lower, odd);
                    if (above) sums[c][2][kx] = _mm512_dpbf16_ps(sums[c][2][kx], upper, odd);
                }
            }
        }
    };
    using Yes = std::true_type;
    using No = std::false_type;
    for (long image = 0; image < images; ++image) {
        for (long row = first; row < first + rows; ++row, x += s.x_rows * s.x_row, y += pairs) {
            const bool above = STRIDE == 1 ? row > 0 : 2 * row + 1 < s.height, below = row + 1 < s.out_height;
            if (above && below) {
                add_row(x, y + pairs, Yes{}, Yes{});
            } else if (above) {
                add_row(x, y + pairs, Yes{}, No{});
            } else if (below) {
                add_row(x, y + pairs, No{}, Yes{});
            } else {
                add_row(x, y + pairs, No{}, No{});
            }
        }
        y += 2 * pairs;
    }
#pragma GCC unroll 18
    for (int i = 0; i < 18; ++i) _mm512_store_ps(to + i * LANES, (&sums[0][0][0])[i]);
}

// Sums of one chunk for all channels, added to those in `to` if there are `more`: [group of co][ci][tap][16].
template <int STRIDE>
void add_chunk(const Shape& s, const Pixel* x, const Pixel* y, long images, long first, long rows, bool more,
               long from_group, long to_group, Pair* buffer, float* to) {
    Pair* const y_pairs = buffer + s.in_channels / LANES * s.x_group;
    for (long image = 0; image < images; ++image) {
        for (long row = first * STRIDE; row < std::min(s.height, (first + rows) * STRIDE); ++row) {
            const long at = image * rows * STRIDE + row - first * STRIDE;
            const Pixel* from = x + (image * s.height + row) * s.width * s.in_channels;
            for (long g = 0; g < s.in_channels / LANES; ++g) {
                store_x<STRIDE>(s, from + g * LANES, buffer + g * s.x_group + at * s.x_row);
            }
        }
        for (long row = std::max(0L, first - 1); row < std::min(s.out_height, first + rows + 1); ++row) {
            const Pixel* from = y + (image * s.out_height + row) * s.out_width * s.out_channels;
            Pair* at = y_pairs + (image * (rows + 2) + row - first + 1) * s.pairs * LANES;
            for (long g = from_group; g < to_group; ++g) {
                store_y(s, from + g * LANES, at + g * s.y_group);
            }
        }
    }
    to += from_group * s.in_channels * TAPS * LANES;
    for (long co = from_group; co < to_group; ++co) {
        for (long ci = 0; ci < s.in_channels; ci += 2, to += 2 * TAPS * LANES) {
            add_products<STRIDE>(s, buffer + ci / LANES * s.x_group + ci % LANES, y_pairs + co * s.y_group, images,
                                 first, rows, more, to);
        }
    }
}

template <int STRIDE>
void gradient(const Shape& s, const Pixel* x, const Pixel* y, float* grad_w, float* partial, int threads) {
    Pair* const buffers = reinterpret_cast<Pair*>(partial + s.blocks * s.sums);
    in_threads(threads, [=, &s](long thread, long of) {
        Pair* const buffer = buffers + thread * s.buffer();
        const long shares = s.blocks * s.groups, until = shares * (thread + 1) / of;
        for (long share = shares * thread / of, next; share < until; share = next) {
            const long block = share / s.groups, group = share % s.groups;
            next = std::min(until, (block + 1) * s.groups);
            bool more = false;
            const long end = s.images * (block + 1) / s.blocks;
            for (long image = s.images * block / s.blocks; image < end; image += s.together) {
                for (long row = 0; row < s.out_height; row += s.rows, more = true) {
                    add_chunk<STRIDE>(s, x + image * s.height * s.width * s.in_channels,
                                      y + image * s.out_height * s.out_width * s.out_channels,
                                      std::min(s.together, end - image), row, std::min(s.rows, s.out_height - row),
                                      more, group, group + next - share, buffer, partial + block * s.sums);
                }
            }
        }
    });
    // Parts are added in order, and turned, 9 x 16 vectors of one group of output channels at a time.
    constexpr long VECTORS = TAPS * LANES;
    const long tiles = s.sums / (VECTORS * LANES), row = TAPS * s.in_channels, of_group = row / VECTORS;
    in_threads(threads, [=, &s](long thread, long of) {
        for (long tile = tiles * thread / of; tile < tiles * (thread + 1) / of; ++tile) {
            float* const sums = partial + tile * VECTORS * LANES;
            for (long block = 1; block < s.blocks; ++block) {
                const float* more = sums + block * s.sums;
                for (long i = 0; i < VECTORS * LANES; i += LANES) {
                    _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(more + i)));
                }
            }
            float* const to = grad_w + tile / of_group * LANES * row + tile % of_group * VECTORS;
            for (long co = 0; co < LANES; ++co) {
                for (long i = 0; i < VECTORS; ++i) to[co * row + i] = sums[i * LANES + co];
            }
        }
    });
}

}  // namespace

extern "C" {

// The floats that `partial` needs.
long conv3x3_weight_room(long images, long height, long width, long in_channels, long out_channels, int stride,
                         int threads) {
    return Shape(images, height, width, in_channels, out_channels, stride).room(std::max(1, threads));
}

// x: images x height x width x in_channels; grad_y: the same with ceil(height / stride) x ceil(width / stride) and
// out_channels, both bfloat16. grad_w: out_channels x in_channels x 3 x 3. Channels: multiples of 16.
void conv3x3_weight_gradient(const void* x, const void* grad_y, float* grad_w, long images, long height, long width,
                             long in_channels, long out_channels, int stride, float* partial, int threads) {
    const Shape shape(images, height, width, in_channels, out_channels, stride);
    const uintptr_t misplaced = reinterpret_cast<uintptr_t>(partial) % 64;
    float* const aligned = misplaced == 0 ? partial : partial + (64 - misplaced) / sizeof(float);
    const auto compute = stride == 1 ? gradient<1> : gradient<2>;
    compute(shape, static_cast<const Pixel*>(x), static_cast<const Pixel*>(grad_y), grad_w, aligned, threads);
}
}

#endif
