// A 3 x 3 convolution in bfloat16 with padding 1 and stride 1 or 2, over channels-last maps: forward, and the gradient
// of its maps. Sums are float32 and are rounded once. It needs a CPU that has AVX512_BF16.
//
// A register block is Q pixels beside each other in R rows of the output, by N * 16 output channels. A pair of input
// channels of one input pixel is read into all lanes, and serves every pixel of the block that it reaches: up to three,
// by three taps. So there are far fewer loads than products, also at 16 channels.
//
// A pixel's sum has one order, which depends on the shape of the maps alone: not on the batch, on the pixel's image, or
// on the number of threads. What lies outside the image is left out, not multiplied by zero.

#ifdef __AVX512BF16__

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "threads.hpp"

namespace {

using bfloat16 = uint16_t;

constexpr long LANES = 16;
constexpr long LINE = 32;                // numbers of bfloat16 in a line of the cache
constexpr long CHUNK_BYTES = 128 << 10;  // of maps, which stay in the cache for all blocks of output channels
constexpr long SMALL = 1 << 20;          // products of a tap for which threads cost more than they gain
constexpr long FEW = 4;                  // channels up to which images are copied: an odd number of them has no pairs

// What is done with the sums before they are rounded. Null: nothing is added.
struct Finish {
    const float* bias;
    const bfloat16* shortcut;
    bool relu;
};

struct Shape {
    long height, width, channels;              // of the maps that are read
    long out_height, out_width, out_channels;  // of those that are written
};

// Weights as the loops read them: [block of N * 16 output channels][ky][pair of input channels][kx][N * 16][2].
// The N of the block that begins at an output channel:
long vectors_of(long out_channels, long c) { return c + 2 * LANES <= out_channels ? 2 : 1; }

inline __m512 product(__m512 sum, __m512i maps, __m512i weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)maps, (__m512bh)weights);
}

inline __m512i pair_at(const bfloat16* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return _mm512_set1_epi32(pair);
}

inline __m512 load(const bfloat16* from) {
    const auto halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

inline void store(bfloat16* to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
}

inline void fetch(const bfloat16* from, long count) {
    for (long at = 0; at < count; at += LINE) __builtin_prefetch(from + at);
}

template <int N>
inline void load_taps(__m512i (&weights)[3][N], const bfloat16* from) {
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) weights[k][n] = _mm512_loadu_si512(from + (k * N + n) * 2 * LANES);
    }
}

template <int Q, int N>
inline void clear(__m512 (&sums)[Q][N]) {
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sums[q][n] = _mm512_setzero_ps();
    }
}

// What of a block of output pixels lies outside: the first or the last pixel of its input, and rows of its input.
struct Edges {
    bool left, right;
    long above, below;  // rows of the image from the block's first input row on, and after it
    long rows;          // of the output
};

// The block of R rows of Q output pixels each, whose first one is at the input pixel `x` (in the row above), so that it
// reads the pixels -1 to P - 2 of three rows, and of as many further rows as STRIDE says for each further row.
template <int N, int R, int Q, int STRIDE>
inline void forward_block(const bfloat16* x, long row, const Edges& edges, long channels, const bfloat16* packed,
                          bfloat16* y, long y_row, long out_channels, long at, const Finish& finish) {
    constexpr int P = (Q - 1) * STRIDE + 3;
    __m512 sums[R * Q][N];
    clear(sums);
    if (finish.shortcut != nullptr) {
        for (int q = 0; q < R * Q; ++q) {
            __builtin_prefetch(finish.shortcut + at + q / Q * y_row + q % Q * out_channels);
        }
    }
    for (long ky = 0; ky < 3; ++ky) {
        bool inside[R];
        for (int r = 0; r < R; ++r) {
            const long of = r * STRIDE + ky;
            inside[r] = r < edges.rows && of >= edges.above && of < edges.below;
        }
        if (R == 1 && !inside[0]) continue;
        const bfloat16 *from = x + ky * row, *weights_of_row = packed + ky * channels * 3 * N * LANES;
        for (long c = 0; c < channels; c += 2, from += 2) {
            __m512i weights[3][N];
            load_taps(weights, weights_of_row);
            weights_of_row += 3 * N * 2 * LANES;
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) {
                if (R > 1 && !inside[r]) continue;
                // Every third pixel in turn: each sum is then used once in a turn, and no product waits for the one
                // before.
#pragma GCC unroll 3
                for (int turn = 0; turn < 3; ++turn) {
#pragma GCC unroll 33
                    for (int p = turn; p < P; p += 3) {
                        if ((p == 0 && edges.left) || (p == P - 1 && edges.right)) continue;
                        const __m512i pair = pair_at(from + r * STRIDE * row + (p - 1) * channels);
#pragma GCC unroll 3
                        for (int k = 0; k < 3; ++k) {
                            const int q = (p - k) / STRIDE;
                            if (p < k || (p - k) % STRIDE != 0 || q >= Q) continue;
#pragma GCC unroll 2
                            for (int n = 0; n < N; ++n) {
                                sums[r * Q + q][n] = product(sums[r * Q + q][n], pair, weights[k][n]);
                            }
                        }
                    }
                }
            }
        }
    }
    y += at;
    const auto each = [&](auto change) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
            if (r >= edges.rows) return;
#pragma GCC unroll 16
            for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n) {
                    change(sums[r * Q + q][n], r * y_row + q * out_channels + n * LANES, n);
                }
            }
        }
    };
    if (finish.bias != nullptr) {
        each([&](__m512& sum, long, int n) { sum += _mm512_loadu_ps(finish.bias + n * LANES); });
    }
    if (finish.shortcut != nullptr) {
        each([&](__m512& sum, long here, int) { sum += load(finish.shortcut + at + here); });
    }
    // Not "at most 0", so that a NaN passes, as in PyTorch.
    if (finish.relu) {
        const __m512 zero = _mm512_setzero_ps();
        each([=](__m512& sum, long, int) {
            sum = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(sum, zero, _CMP_NLE_UQ), sum);
        });
    }
    each([=](__m512& sum, long here, int) { store(y + here, sum); });
}

// Some rows of output pixels of an image, from `y_row` on, of N * 16 output channels.
using Rows = void (*)(const Shape&, const bfloat16* x, long y_row, long rows, const bfloat16* packed, bfloat16* y,
                      const Finish&);

template <int N, int R, int Q, int STRIDE>
void forward_rows(const Shape& shape, const bfloat16* x, long y_row, long rows, const bfloat16* packed, bfloat16* y,
                  const Finish& finish) {
    const long row = shape.width * shape.channels, above = y_row * STRIDE - 1;
    const long out_row = shape.out_width * shape.out_channels;
    Edges edges = {false, false, above < 0 ? 1 : 0, shape.height - above, rows};
    for (long next = 0; next < shape.out_width; next += Q) {
        // The last one begins earlier where it would not fit.
        const long q = std::min(next, shape.out_width - Q);
        edges.left = q == 0;
        edges.right = (q + Q - 1) * STRIDE + 1 >= shape.width;
        const bfloat16* const from = x + above * row + q * STRIDE * shape.channels;
        // What the next rows read beyond these: the processor alone finds no order in blocks beside each other.
        for (long ahead = 3; ahead < 3 + R * STRIDE; ++ahead) fetch(from + ahead * row, Q * STRIDE * shape.channels);
        forward_block<N, R, Q, STRIDE>(from, row, edges, shape.channels, packed, y, out_row, shape.out_channels,
                                       y_row * out_row + q * shape.out_channels, finish);
    }
}

// The gradient of a row of maps by a convolution of stride 2, from the gradient of its output, for 2 * Q pixels. Those
// with an even number have one tap in a row, those with an odd number two; and so have rows.
template <int N, int Q, bool RIGHT>
inline void strided_gradient_block(const bfloat16* (&from)[3], long first, long step, long channels,
                                   const bfloat16* packed, bfloat16* y, long out_channels, long pixels) {
    __m512 sums[2 * Q][N];
    clear(sums);
    for (long ky = first; ky < 3; ky += step) {
        if (from[ky] == nullptr) continue;
        const bfloat16* weights_of_row = packed + ky * channels * 3 * N * LANES;
        for (long c = 0; c < channels; c += 2) {
            __m512i weights[3][N], pairs[Q + 1];
            load_taps(weights, weights_of_row);
            weights_of_row += 3 * N * 2 * LANES;
#pragma GCC unroll 9
            for (int q = 0; q < Q + (RIGHT ? 0 : 1); ++q) pairs[q] = pair_at(from[ky] + q * channels + c);
            const auto add = [&](int to, int q, int k) __attribute__((always_inline)) {
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n) sums[to][n] = product(sums[to][n], pairs[q], weights[k][n]);
            };
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) add(2 * q + 1, q, 0);
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) add(2 * q, q, 1);
#pragma GCC unroll 8
            for (int q = 0; q < Q - (RIGHT ? 1 : 0); ++q) add(2 * q + 1, q + 1, 2);
        }
    }
#pragma GCC unroll 16
    for (int q = 0; q < 2 * Q; ++q) {
        if (q == 2 * Q - 1 && q >= pixels) return;
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) store(y + q * out_channels + n * LANES, sums[q][n]);
    }
}

template <int N, int Q>
void strided_gradient_row(const Shape& shape, const bfloat16* x, long y_row, long, const bfloat16* packed, bfloat16* y,
                          const Finish&) {
    const long row = shape.width * shape.channels, odd = y_row % 2, of = y_row / 2;
    // Weights are turned: tap 0 was tap 2 of the convolution.
    const bfloat16* rows[3] = {x + of * row, x + of * row, of + 1 < shape.height ? x + (of + 1) * row : nullptr};
    const auto block = [&](auto right, long q) {
        const bfloat16* from[3];
        for (int k = 0; k < 3; ++k) from[k] = rows[k] == nullptr ? nullptr : rows[k] + q * shape.channels;
        fetch(rows[0] + (odd + 1) * row + q * shape.channels, Q * shape.channels);
        strided_gradient_block<N, Q, right>(from, odd ? 0 : 1, odd ? 2 : 3, shape.channels, packed,
                                            y + (y_row * shape.out_width + 2 * q) * shape.out_channels,
                                            shape.out_channels, shape.out_width - 2 * q);
    };
    for (long q = 0; q + Q < shape.width; q += Q) block(std::false_type{}, q);
    block(std::true_type{}, shape.width - Q);
}

// The kernel of some rows, for N * 16 output channels at once.
struct Choice {
    Rows kernel = nullptr;
    long rows = 1;
    double cost = 0;

    // `sums`: those of a block, of `pixels` and `rows`. Products wait for each other where there are fewer than 12.
    void offer(Rows offered, long vectors, long rows_now, long pixels, long sums, long width) {
        if (pixels > width) return;
        const double now = double((width + pixels - 1) / pixels) * (std::max(sums, 12L) + vectors) / double(rows_now);
        if (kernel == nullptr || now < cost) *this = {offered, rows_now, now};
    }
};

template <int N, int R, int Q, int STRIDE>
void offer_forward(Choice& choice, long width) {
    choice.offer(forward_rows<N, R, Q, STRIDE>, N, R, Q, R * Q * N, width);
}

template <int STRIDE>
Choice choose_forward(long n, long width) {
    Choice choice;
    if (n == 2) {
        offer_forward<2, 1, 8, STRIDE>(choice, width);
        offer_forward<2, 1, 7, STRIDE>(choice, width);
        offer_forward<2, 2, 6, STRIDE>(choice, width);
        offer_forward<2, 2, 5, STRIDE>(choice, width);
        offer_forward<2, 2, 4, STRIDE>(choice, width);
        offer_forward<2, 2, 3, STRIDE>(choice, width);
    } else {
        offer_forward<1, 1, 16, STRIDE>(choice, width);
        offer_forward<1, 1, 14, STRIDE>(choice, width);
        offer_forward<1, 2, 8, STRIDE>(choice, width);
        offer_forward<1, 2, 6, STRIDE>(choice, width);
        offer_forward<1, 2, 4, STRIDE>(choice, width);
        offer_forward<1, 2, 3, STRIDE>(choice, width);
    }
    return choice;
}

template <int N, int Q>
void offer_strided_gradient(Choice& choice, long width) {
    choice.offer(strided_gradient_row<N, Q>, N, 1, Q, 2 * Q * N, width);
}

Choice choose_strided_gradient(long n, long width) {
    Choice choice;
    if (n == 2) {
        offer_strided_gradient<2, 4>(choice, width);
        offer_strided_gradient<2, 3>(choice, width);
    } else {
        offer_strided_gradient<1, 8>(choice, width);
        offer_strided_gradient<1, 7>(choice, width);
        offer_strided_gradient<1, 4>(choice, width);
        offer_strided_gradient<1, 3>(choice, width);
    }
    return choice;
}

// Copy an image of at most 4 channels in bfloat16, with a channel of zeros where their number is odd.
template <class T>
void copy_image(const T* from, long pixels, long channels, bfloat16* to) {
    const long padded = (channels + 1) / 2 * 2;
    alignas(64) uint16_t places[32] = {};
    uint32_t filled = 0;
    for (long at = 0; at < 8 * padded; ++at) {
        const long c = at % padded;
        places[at] = uint16_t(at / padded * channels + c);
        if (c < channels) filled |= 1u << at;
    }
    const __m512i order = _mm512_load_si512(places);
    for (long pixel = 0; pixel < pixels; pixel += 8) {
        const long now = std::min(8L, pixels - pixel);
        const uint32_t all = uint32_t((1ul << now * channels) - 1), here = uint32_t((1ul << now * padded) - 1);
        __m512i values;
        if constexpr (sizeof(T) == 2) {
            values = _mm512_maskz_loadu_epi16(all, from);
        } else {
            const __m512 first = _mm512_maskz_loadu_ps(all & 0xffff, from);
            values = (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(all >> 16, from + LANES), first);
        }
        _mm512_mask_storeu_epi16(to, here, _mm512_maskz_permutexvar_epi16(filled, order, values));
        from += 8 * channels;
        to += 8 * padded;
    }
}

// Call the kernels for all rows of all images. `choose(n)` returns the kernel of n * 16 output channels.
template <class Choose>
void in_rows(const Shape& shape, long images, const void* x, bool x_is_float, const bfloat16* packed, bfloat16* y,
             const Finish& finish, int threads, Choose choose) {
    const Choice kernels[2] = {choose(1), choose(2)};
    const long rows = images * shape.out_height, of_image = shape.height * shape.width * shape.channels;
    const bool copied = shape.channels <= FEW;
    Shape read = shape;
    read.channels = (shape.channels + 1) / 2 * 2;
    const long row_bytes = std::max(1L, of_image / shape.out_height) * long(sizeof(bfloat16));
    const long most = std::max(1L, CHUNK_BYTES / row_bytes);
    const long products = rows * shape.out_width * shape.out_channels * shape.channels;
    in_threads(products < SMALL ? 1 : threads, [&](long thread, long of) {
        std::vector<bfloat16> copy(copied ? shape.height * shape.width * read.channels : 0);
        const long end = rows * (thread + 1) / of;
        for (long begin = rows * thread / of; begin < end;) {
            const long image = begin / shape.out_height;
            const long until = std::min(end, copied ? (image + 1) * shape.out_height : begin + most);
            if (copied && x_is_float) {
                copy_image(static_cast<const float*>(x) + image * of_image, shape.height * shape.width, shape.channels,
                           copy.data());
            } else if (copied) {
                copy_image(static_cast<const bfloat16*>(x) + image * of_image, shape.height * shape.width,
                           shape.channels, copy.data());
            }
            for (long c = 0; c < shape.out_channels; c += vectors_of(shape.out_channels, c) * LANES) {
                const Choice& of_block = kernels[vectors_of(shape.out_channels, c) - 1];
                for (long r = begin, now; r < until; r += now) {
                    const long number = r / shape.out_height, row = r % shape.out_height;
                    now = std::min({of_block.rows, until - r, shape.out_height - row});
                    const long to = number * shape.out_height * shape.out_width * shape.out_channels + c;
                    const Finish here = {finish.bias == nullptr ? nullptr : finish.bias + c,
                                         finish.shortcut == nullptr ? nullptr : finish.shortcut + to, finish.relu};
                    const bfloat16* own = copied ? copy.data() : static_cast<const bfloat16*>(x) + number * of_image;
                    of_block.kernel(read, own, row, now, packed + c * 9 * read.channels, y + to, here);
                }
            }
            begin = until;
        }
    });
}

}  // namespace

extern "C" {

// Room for weights as the kernels read them, in numbers of bfloat16.
long conv3x3_packed(long out_channels, long channels) { return out_channels * 9 * ((channels + 1) / 2 * 2); }

// Put weights, float32 with a stride for each of their four dimensions, into the order that the kernels read, in
// bfloat16. The convolution that they are for has `out_channels` outputs; `turned`: it is the gradient of another one,
// so these are the second dimension, and the taps are turned by 180 degrees.
void conv3x3_pack(const float* weight, long out_channels, long channels, long by_out, long by_in, long by_y, long by_x,
                  int turned, bfloat16* packed) {
    if (turned) {
        weight += 2 * by_y + 2 * by_x;
        std::swap(by_out, by_in);
        by_y = -by_y;
        by_x = -by_x;
    }
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(by_out)));
    const auto sixteen = [=](const float* from) {
        return by_out == 1 ? _mm512_loadu_ps(from) : _mm512_i32gather_ps(places, from, sizeof(float));
    };
    const auto pairs = [=](const float* from, bool whole) {
        if (whole && by_in == 1) {  // as weights in the channels-last layout have them: much faster than to gather
            const auto four = [=](long lane) __attribute__((always_inline)) {
                const auto two = [=](long one) {
                    const auto at = [=](long l) { return reinterpret_cast<const __m64*>(from + l * by_out); };
                    return _mm_loadh_pi(_mm_loadl_pi(_mm_setzero_ps(), at(one)), at(one + 1));
                };
                return _mm256_set_m128(two(lane + 2), two(lane));
            };
            const auto eight = [=](long lane) __attribute__((always_inline)) {
                return _mm512_insertf32x8(_mm512_castps256_ps512(four(lane)), four(lane + 4), 1);
            };
            return (__m512i)_mm512_cvtne2ps_pbh(eight(8), eight(0));
        }
        const __m512 second = whole ? sixteen(from + by_in) : _mm512_setzero_ps();
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(sixteen(from)));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    };
    for (long c = 0; c < out_channels; c += LANES) {
        // The place in the block of output channels, which may have 16 or 32.
        const long block = c / (2 * LANES) * (2 * LANES), wide = vectors_of(out_channels, block) * 2 * LANES;
        bfloat16* to = packed + block * 9 * ((channels + 1) / 2 * 2) + (c - block) * 2;
        for (long ky = 0; ky < 3; ++ky) {
            for (long kx = 0; kx < 3; ++kx) {
                // Innermost, because a line of the cache has several.
                for (long in = 0; in < channels; in += 2) {
                    const float* from = weight + c * by_out + in * by_in + ky * by_y + kx * by_x;
                    bfloat16* here = to + ((ky * ((channels + 1) / 2) + in / 2) * 3 + kx) * wide;
                    _mm512_storeu_si512(here, pairs(from, in + 1 < channels));
                }
            }
        }
    }
}

// y = round(relu(convolution of x + bias + shortcut)). x: images x height x width x channels; y and shortcut:
// out_channels, and sides divided by the stride and rounded up. The width of y is at least 3, its channels are a
// multiple of 16; those of x are so too, or at most 4, which may be float32. Null: bias, shortcut.
void conv3x3_forward(const void* x, int x_is_float, long images, long height, long width, long channels,
                     long out_channels, int stride, const bfloat16* packed, const float* bias,
                     const bfloat16* shortcut, int relu, bfloat16* y, int threads) {
    const Shape shape = {height, width, channels, (height - 1) / stride + 1, (width - 1) / stride + 1, out_channels};
    in_rows(shape, images, x, x_is_float != 0, packed, y, {bias, shortcut, relu != 0}, threads, [&](long n) {
        return stride == 1 ? choose_forward<1>(n, shape.out_width) : choose_forward<2>(n, shape.out_width);
    });
}

// The gradient of maps (images x height x width x channels) of which a convolution with stride 2 made out_channels
// maps: from that of its output, and weights packed as turned. (That with stride 1 is `conv3x3_forward`.)
void conv3x3_strided_gradient(const bfloat16* grad_y, long images, long height, long width, long channels,
                              long out_channels, const bfloat16* packed, bfloat16* grad_x, int threads) {
    const Shape shape = {(height - 1) / 2 + 1, (width - 1) / 2 + 1, out_channels, height, width, channels};
    in_rows(shape, images, grad_y, false, packed, grad_x, {nullptr, nullptr, false}, threads,
            [&](long n) { return choose_strided_gradient(n, shape.width); });
}

}

#endif
