// The gradient of the weights of a 3 x 3 convolution (padding 1, stride 1 or 2) over channels-last maps in bfloat16.
//
//     grad_w[co][ci][ky][kx] = sum over images, rows r and columns p of
//         grad_y[r][p][co] * x[stride * r + ky - 1][stride * p + kx - 1][ci]
//
// It is a product over pixels. `vdpbf16ps` adds two products to each of 16 floats: a lane is one output channel, and
// the two products belong to two pixels beside each other in a row of grad_y. So both maps are copied into buffers of
// pairs, [group of 16 channels][row][pair of pixels][channel][2], one chunk of some hundred pixels after the other. A
// vector of grad_y and a pair of x, which is broadcast, then give 16 elements of grad_w. 18 sums (nine taps of two
// input channels) stay in registers during a chunk, and a broadcast serves up to three of them: no load limits the
// products.
//
// The same bits for every number of threads: the images are cut into fixed blocks, whose sums are added in order. The
// output channels of a block can be shared between threads as well, so that a few blocks are enough where weights are
// many.
//
// The instruction takes a denormal number as 0. What is outside of a map is 0 too, also in the second half of the last
// pair of an odd row of grad_y: an infinite x, which meets it, gives a NaN.

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "threads.hpp"

namespace {

constexpr long LANES = 16;       // channels of a group: the floats of a register
constexpr long TAPS = 9;
constexpr long LINE = 32;        // bfloat16 values of a cache line
constexpr long PIXELS = 256;     // of x in a chunk, about: its pairs of two groups of channels fit into the L1 cache
constexpr long ROWS = 4;         // the fewest rows of a chunk, because two more of grad_y are copied with each
constexpr long BLOCKS = 64;      // of images, the most, with 16 channels: the more channels, the fewer
constexpr long SHARES = 16;      // the fewest pieces of work (a block and a group of output channels), given the images
constexpr long SMALL = 1 << 22;  // products for which threads cost more than they gain

using Pixel = uint16_t;  // a bfloat16 of one
using Pair = uint32_t;   // those of two

struct Shape {
    long images, height, width, in_channels, out_channels, stride;
    long out_height, out_width;
    long groups;            // of output channels
    long pairs;             // of pixels in a row of grad_y
    long x_row, y_row;      // what a row of a group of channels occupies in a buffer
    long x_group, y_group;  // what a group of channels occupies in a buffer
    long rows, together;    // of a chunk: rows of grad_y, and images; several of these only if their rows fit
    long sums;              // floats of one part of the sum
    long blocks;            // parts

    Shape(long images, long height, long width, long in_channels, long out_channels, long stride)
        : images(images), height(height), width(width), in_channels(in_channels), out_channels(out_channels),
          stride(stride) {
        out_height = (height + stride - 1) / stride;
        out_width = (width + stride - 1) / stride;
        groups = out_channels / LANES;
        pairs = (out_width + 1) / 2;
        x_row = (stride == 1 ? 2 * pairs + 1 : 3 * pairs) * LANES;
        y_row = pairs * LANES;
        sums = TAPS * in_channels * out_channels;
        blocks = std::max(BLOCKS * LANES * LANES / (in_channels * out_channels), (SHARES + groups - 1) / groups);
        blocks = std::min({blocks, BLOCKS, images});
        const long fit = PIXELS / stride / (2 * pairs);
        rows = std::min(out_height, std::max(ROWS, fit));
        together = std::min(std::max(1L, fit / out_height), (images + blocks - 1) / blocks);
        x_group = together * rows * stride * x_row;
        y_group = together * (rows + 2) * y_row;
    }
    long buffer() const { return in_channels / LANES * x_group + groups * y_group; }
    // The address may have to be moved to the next cache line.
    long room(long threads) const { return blocks * sums + threads * buffer() + LANES; }
};

// Part of a block: some images, or some rows of one.
struct Chunk {
    const Pixel *x, *y;          // of its first image
    long images, first, rows;    // rows of grad_y
    long group, end_group;       // of output channels
    bool more;                   // there are sums already
};

inline __m256i pixel(const Pixel* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// Store the pairs of two pixels: their channels in turn.
inline void store_pairs(Pair* to, __m256i first, __m256i second) {
    alignas(64) static constexpr Pixel ORDER[2 * LANES] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                           37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                           11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
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

inline __m512bh load(const Pair* from) { return (__m512bh)_mm512_load_si512(from); }
inline __m512bh broadcast(const Pair* from) { return (__m512bh)_mm512_set1_epi32(int(*from)); }

// Add the products of a chunk to nine sums of each of two input channels, with the 16 output channels of a group.
template <int STRIDE>
void add_products(const Shape& s, const Chunk& chunk, const Pair* x, const Pair* y, float* to) {
    __m512 sums[2][3][3];
    __m512* const all = &sums[0][0][0];
#pragma GCC unroll 18
    for (int i = 0; i < 2 * TAPS; ++i) all[i] = chunk.more ? _mm512_load_ps(to + i * LANES) : _mm512_setzero_ps();
    // For stride 1 a row of x meets three of grad_y: its own with ky = 1, that below with ky = 0, that above with
    // ky = 2. For stride 2 it is two rows of x: the first meets its own row with ky = 1, the second the same with
    // ky = 2, and that below with ky = 0. `two` and `zero`: whether there are such rows in the image.
    const auto add_row = [&](const Pair* x, const Pair* y, auto two, auto zero) {
        const Pair* from[3] = {x + s.y_row, x, x + s.y_row + LANES};
        if (STRIDE == 2) from[0] = x, from[1] = x + s.y_row, from[2] = x + 2 * s.y_row;
        for (long i = 0; i < s.y_row; i += LANES) {
            const __m512bh y1 = load(y + i);
            const __m512bh y0 = zero ? load(y + i + s.y_row) : y1, y2 = STRIDE == 1 && two ? load(y + i - s.y_row) : y1;
#pragma GCC unroll 3
            for (int kx = 0; kx < 3; ++kx) {
#pragma GCC unroll 2
                for (int c = 0; c < 2; ++c) {
                    const __m512bh pair = broadcast(from[kx] + i + c);
                    const __m512bh second = STRIDE == 2 && (two || zero) ? broadcast(from[kx] + i + c + s.x_row) : pair;
                    if (zero) sums[c][0][kx] = _mm512_dpbf16_ps(sums[c][0][kx], y0, second);
                    sums[c][1][kx] = _mm512_dpbf16_ps(sums[c][1][kx], y1, pair);
                    if (two) sums[c][2][kx] = _mm512_dpbf16_ps(sums[c][2][kx], y2, second);
                }
            }
        }
    };
    constexpr std::true_type yes{};
    constexpr std::false_type no{};
    for (long image = 0; image < chunk.images; ++image, y += 2 * s.y_row) {
        for (long row = chunk.first; row < chunk.first + chunk.rows; ++row, x += STRIDE * s.x_row, y += s.y_row) {
            const bool two = STRIDE == 1 ? row > 0 : 2 * row + 1 < s.height, zero = row + 1 < s.out_height;
            const Pair* own = y + s.y_row;
            two ? (zero ? add_row(x, own, yes, yes) : add_row(x, own, yes, no))
                : (zero ? add_row(x, own, no, yes) : add_row(x, own, no, no));
        }
    }
#pragma GCC unroll 18
    for (int i = 0; i < 2 * TAPS; ++i) _mm512_store_ps(to + i * LANES, all[i]);
}

// Copy a chunk into the buffer, and add its products to a part of the sum: [group of co][ci][tap][16].
template <int STRIDE>
void add_chunk(const Shape& s, const Chunk& chunk, Pair* x_pairs, float* to) {
    Pair* const y_pairs = x_pairs + s.in_channels / LANES * s.x_group;
    const long x_row = s.width * s.in_channels, y_row = s.out_width * s.out_channels;
    const long end = chunk.first + chunk.rows;
    for (long image = 0; image < chunk.images; ++image) {
        for (long row = chunk.first * STRIDE; row < std::min(s.height, end * STRIDE); ++row) {
            const Pixel* from = chunk.x + (image * s.height + row) * x_row;
            Pair* at = x_pairs + ((image * chunk.rows - chunk.first) * STRIDE + row) * s.x_row;
            for (long c = 0; c < s.in_channels; c += LANES, at += s.x_group) store_x<STRIDE>(s, from + c, at);
        }
        for (long row = std::max(0L, chunk.first - 1); row < std::min(s.out_height, end + 1); ++row) {
            const Pixel* from = chunk.y + (image * s.out_height + row) * y_row;
            Pair* at = y_pairs + (image * (chunk.rows + 2) + 1 + row - chunk.first) * s.y_row;
            for (long g = chunk.group; g < chunk.end_group; ++g) store_y(s, from + g * LANES, at + g * s.y_group);
        }
    }
    // The next chunk lies behind this one in memory, which the products leave idle: fetch a part of it before each.
    const long x_size = ((chunk.images - 1) * s.height + chunk.rows * STRIDE) * x_row;
    const long y_size = ((chunk.images - 1) * s.out_height + chunk.rows) * y_row;
    const long times = (chunk.end_group - chunk.group) * s.in_channels / 2;
    const Pixel* next_x = chunk.x + chunk.first * STRIDE * x_row + x_size;
    const Pixel* next_y = chunk.y + chunk.first * y_row + y_size;
    to += chunk.group * s.in_channels * TAPS * LANES;
    for (long g = chunk.group; g < chunk.end_group; ++g) {
        for (long c = 0; c < s.in_channels; c += 2, to += 2 * TAPS * LANES) {
            for (long i = 0; i < x_size / times; i += LINE) _mm_prefetch(next_x + i, _MM_HINT_T0);
            for (long i = 0; i < y_size / times; i += LINE) _mm_prefetch(next_y + i, _MM_HINT_T0);
            next_x += x_size / times, next_y += y_size / times;
            add_products<STRIDE>(s, chunk, x_pairs + c / LANES * s.x_group + c % LANES, y_pairs + g * s.y_group, to);
        }
    }
}

template <int STRIDE>
void gradient(const Shape& s, const Pixel* x, const Pixel* y, float* grad_w, float* partial, int threads) {
    Pair* const buffers = reinterpret_cast<Pair*>(partial + s.blocks * s.sums);
    in_threads(threads, [=, &s](long thread, long of) {
        const long shares = s.blocks * s.groups, until = shares * (thread + 1) / of;
        for (long share = shares * thread / of, next; share < until; share = next) {
            const long block = share / s.groups, end = s.images * (block + 1) / s.blocks;
            next = std::min(until, (block + 1) * s.groups);
            Chunk chunk{};
            chunk.group = share % s.groups;
            chunk.end_group = chunk.group + next - share;
            for (long image = s.images * block / s.blocks; image < end; image += s.together) {
                chunk.x = x + image * s.height * s.width * s.in_channels;
                chunk.y = y + image * s.out_height * s.out_width * s.out_channels;
                chunk.images = std::min(s.together, end - image);
                for (chunk.first = 0; chunk.first < s.out_height; chunk.first += s.rows, chunk.more = true) {
                    chunk.rows = std::min(s.rows, s.out_height - chunk.first);
                    add_chunk<STRIDE>(s, chunk, buffers + thread * s.buffer(), partial + block * s.sums);
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
            float* const to = grad_w + tile / of_group * LANES * row + tile % of_group * LANES;
            for (long co = 0; co < LANES; ++co) {
                for (long tap = 0; tap < TAPS; ++tap) {
                    for (long c = 0; c < LANES; ++c) {
                        to[co * row + tap * s.in_channels + c] = sums[(c * TAPS + tap) * LANES + co];
                    }
                }
            }
        }
    });
}

}  // namespace

extern "C" {

// The number of floats that `partial` needs: parts of the sum, and a buffer for each thread.
long conv3x3_weight_room(long images, long height, long width, long in_channels, long out_channels, int stride,
                         int threads) {
    return Shape(images, height, width, in_channels, out_channels, stride).room(std::max(1, threads));
}

// bfloat16: x, images x height x width x in_channels, and grad_y, images x ceil(height / stride) x
// ceil(width / stride) x out_channels. float32: grad_w, out_channels x 3 x 3 x in_channels. At least one image;
// channels are multiples of 16.
void conv3x3_weight_gradient(const void* x, const void* grad_y, float* grad_w, long images, long height, long width,
                             long in_channels, long out_channels, int stride, float* partial, int threads) {
    const Shape shape(images, height, width, in_channels, out_channels, stride);
    float* const aligned = partial + (64 - reinterpret_cast<uintptr_t>(partial) % 64) % 64 / sizeof(float);
    const long products = images * shape.out_height * shape.out_width * shape.sums;
    const auto compute = stride == 1 ? gradient<1> : gradient<2>;
    compute(shape, static_cast<const Pixel*>(x), static_cast<const Pixel*>(grad_y), grad_w, aligned,
            products < SMALL ? 1 : threads);
}
}

#endif
