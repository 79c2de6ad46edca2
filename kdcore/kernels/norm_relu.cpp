// Batch norm in train mode, then the addition of a shortcut, then ReLU: forward and backward, over channels-last rows.
//
// A tensor N x C x H x W in channels-last layout is a matrix of `rows` = N * H * W by `channels` = C. Each pass reads it
// once, in bfloat16 or float32, and computes in float32.
//
// The same bits on every machine and for every number of threads: rows are cut into fixed blocks, which are merged in
// order and in double precision; a lane is one channel, whatever the width of the machine's vectors; and the compiler
// may not contract a * b + c (-ffp-contract=off).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "threads.hpp"

namespace {

constexpr long CHUNK = 128;  // rows that are summed in float32 before they are added in double precision
constexpr long BLOCKS = 64;  // parts of a reduction: the most threads that it uses. `__init__.py` has the same number
constexpr long SMALL = 1 << 14;  // values for which threads cost more than they gain

struct bfloat16 {
    uint16_t bits;
};

// Vectors of GCC and Clang. No template: GCC ignores a size that depends on a parameter.
template <int W>
struct Vectors;
#define VECTORS_OF(W)                                                 \
    template <>                                                       \
    struct Vectors<W> {                                               \
        typedef float Floats __attribute__((vector_size((W) * 4)));   \
        typedef uint32_t Words __attribute__((vector_size((W) * 4))); \
        typedef uint16_t Halves __attribute__((vector_size((W) * 2)));\
    };
VECTORS_OF(1)
VECTORS_OF(4)
VECTORS_OF(8)
VECTORS_OF(16)

// The channels that fit into one register.
#if defined(__AVX512F__)
constexpr int WIDE = 16;
#elif defined(__AVX2__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif

// W channels beside each other.
template <int W>
struct Lanes {
    using Floats = typename Vectors<W>::Floats;
    using Words = typename Vectors<W>::Words;
    using Halves = typename Vectors<W>::Halves;

    static inline Floats load(const float* from) {
        Floats values;
        std::memcpy(&values, from, sizeof values);
        return values;
    }
    static inline Floats load(const bfloat16* from) {
#ifdef __AVX512BW__
        // The same in one instruction each, where GCC 12 takes five.
        if constexpr (W == 16) {
            const auto halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
        }
#endif
        Halves halves;
        std::memcpy(&halves, from, sizeof halves);
        return (Floats)(__builtin_convertvector(halves, Words) << 16);
    }
    static inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }
    static inline void store(bfloat16* to, Floats values) {
        // Round to nearest, ties to even; a NaN stays one.
        const Words bits = (Words)values, is_nan = (Words)(values != values);
        const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const Words words = (rounded & ~is_nan) | (0x7fc0 & is_nan);
#ifdef __AVX512BW__
        if constexpr (W == 16) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)words));
            return;
        }
#endif
        const Halves halves = __builtin_convertvector(words, Halves);
        std::memcpy(to, &halves, sizeof halves);
    }
    // 0 where `decides` is at most 0, else `values`: a NaN passes, as in PyTorch.
    static inline Floats where_positive(Floats decides, Floats values) {
        return (Floats)((Words)values & ~(Words)(decides <= 0.0f));
    }
};

// A group of V vectors of W channels, read from one row after the other. APART rows are summed apart, so that an
// addition need not wait for the one before: the same number in every group, because it decides the order of a sum.
constexpr int APART = 4;

template <class T, int W_, int V_>
struct Group {
    static constexpr int W = W_, V = V_, width = W_ * V_;
    static constexpr int ROWS = 1, UNITS = APART / ROWS;  // rows that are read at once, and those that are summed apart
    using L = Lanes<W>;
    using Floats = typename L::Floats;

    static inline void load(Floats (&to)[V], const T* from) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) to[v] = L::load(from + v * W);
    }
    // 0 where `y`, a result of ReLU, is 0.
    static inline void load_where(Floats (&to)[V], const T* y, const T* from) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) to[v] = L::where_positive(L::load(y + v * W), L::load(from + v * W));
    }
    static inline void store(T* to, const Floats (&values)[V]) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) L::store(to + v * W, values[v]);
    }
    static inline void rectify(Floats (&values)[V]) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) values[v] = L::where_positive(values[v], values[v]);
    }
    // What channels have, in the order of `load`.
    static inline void load_channels(Floats (&to)[V], const float* from) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) to[v] = L::load(from + v * W);
    }
    // The sum of what was summed apart, for each channel.
    static inline void reduce(const Floats (&sums)[UNITS][V], float* to) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            Floats total = sums[0][v];
#pragma GCC unroll 4
            for (int u = 1; u < UNITS; ++u) total += sums[u][v];
            L::store(to + v * W, total);
        }
    }
};

#ifdef __AVX512BF16__
// 32 numbers of bfloat16 beside each other, 32 channels of a row or 16 of two rows, in two vectors: those at even places
// and those at odd ones. One instruction then widens a vector, and one rounds both: a third of what `Group` needs. It
// rounds as `Group`, but numbers below 2^-126 to 0.
template <int ROWS_>
struct EvenOdd {
    static constexpr int V = 2, ROWS = ROWS_, UNITS = APART / ROWS, width = 32 / ROWS;
    using L = Lanes<16>;
    using Floats = L::Floats;

    static inline void widen(Floats (&to)[V], __m512i both) {
        to[0] = (Floats)_mm512_slli_epi32(both, 16);
        to[1] = (Floats)_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000)));
    }
    static inline void load(Floats (&to)[V], const bfloat16* from) { widen(to, _mm512_loadu_si512(from)); }
    static inline void load_where(Floats (&to)[V], const bfloat16* y, const bfloat16* from) {
        const auto passes = _mm512_test_epi16_mask(_mm512_loadu_si512(y), _mm512_set1_epi16(0x7fff));
        widen(to, _mm512_maskz_loadu_epi16(passes, from));
    }
    static inline void store(bfloat16* to, const Floats (&values)[V]) {
        const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)values[1], (__m512)values[0]);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(IN_TURN), halves));
    }
    static inline void rectify(Floats (&values)[V]) {
        const __m512 zero = _mm512_setzero_ps();
        for (Floats& each : values) {
            each = (Floats)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)each, zero, _CMP_NLE_UQ), (__m512)each);
        }
    }
    static inline void load_channels(Floats (&to)[V], const float* from) {
        for (int i = 0; i < 16; ++i) {
            to[0][i] = from[2 * i % width];
            to[1][i] = from[2 * i % width + 1];
        }
    }
    static inline void reduce(const Floats (&sums)[UNITS][V], float* to) {
        Floats totals[2] = {};
#pragma GCC unroll 4
        for (int u = 0; u < UNITS; ++u) {
            const Floats first = beside(sums[u][0], FIRST, sums[u][1]), last = beside(sums[u][0], LAST, sums[u][1]);
            if (ROWS == 2) {
                totals[0] = u == 0 ? first + last : totals[0] + first + last;
            } else {
                totals[0] = u == 0 ? first : totals[0] + first;
                totals[1] = u == 0 ? last : totals[1] + last;
            }
        }
        L::store(to, totals[0]);
        if (ROWS == 1) L::store(to + 16, totals[1]);
    }

private:
    static inline Floats beside(Floats even, const int32_t* order, Floats odd) {
        return (Floats)_mm512_permutex2var_ps((__m512)even, _mm512_load_si512(order), (__m512)odd);
    }
    // Even and odd places in turn: of all 32 halves, and of the first and of the last half of two vectors.
    alignas(64) static constexpr uint16_t IN_TURN[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    alignas(64) static constexpr int32_t FIRST[16] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    alignas(64) static constexpr int32_t LAST[16] = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
};
#endif

// Call body(first channel, channels that an earlier group has, group) for groups that cover all channels of so many
// rows. The last one begins earlier where it would not fit.
template <class T, class Body>
inline void for_each_group([[maybe_unused]] long rows, long channels, Body body) {
    const auto cover = [&](long c, auto group) {
        for (; c < channels; c += group.width) {
            const long first = std::min(c, channels - group.width);
            body(first, c - first, group);
        }
    };
    long c = 0;
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, bfloat16>) {
        if (channels == 16 && rows % APART == 0) return body(0L, 0L, EvenOdd<2>{});
        for (; c + 32 <= channels; c += 32) body(c, 0L, EvenOdd<1>{});
    }
#endif
    for (; c + 2 * WIDE <= channels; c += 2 * WIDE) body(c, 0L, Group<T, WIDE, 2>{});
    if (channels >= WIDE) {
        cover(c, Group<T, WIDE, 1>{});
    } else if (channels >= 4) {
        cover(c, Group<T, 4, 1>{});
    } else {
        cover(c, Group<T, 1, 1>{});
    }
}

// Call body(first value, number of the unit) for rows beside each other, a unit after the other.
template <class G, class Body>
inline void for_each_unit(G, long rows, long channels, Body body) {
    long row = 0;
    for (; row + APART <= rows; row += APART) {
#pragma GCC unroll 4
        for (int u = 0; u < G::UNITS; ++u) body((row + u * G::ROWS) * channels, u);
    }
    for (; row < rows; row += G::ROWS) body(row * channels, 0);
}

// Call body(block, first row, rows) for each chunk of each block.
template <class Body>
void in_blocks(long rows, int threads, Body body) {
    const long chunks = (rows + CHUNK - 1) / CHUNK, blocks = std::min(BLOCKS, chunks);
    in_threads(threads, [=](long thread, long of) {
        for (long block = blocks * thread / of; block < blocks * (thread + 1) / of; ++block) {
            for (long chunk = chunks * block / blocks; chunk < chunks * (block + 1) / blocks; ++chunk) {
                body(block, chunk * CHUNK, std::min(CHUNK, rows - chunk * CHUNK));
            }
        }
    });
}

// Call body(first row, rows) for all rows, a chunk at a time, so that what a group has read is in the cache for the next.
template <class Body>
void in_chunks(long rows, int threads, Body body) {
    const long chunks = (rows + CHUNK - 1) / CHUNK;
    in_threads(threads, [=](long thread, long of) {
        for (long chunk = chunks * thread / of; chunk < chunks * (thread + 1) / of; ++chunk) {
            body(chunk * CHUNK, std::min(CHUNK, rows - chunk * CHUNK));
        }
    });
}

// The mean of a chunk, and the sum of squares about it: about its own mean, so that a large mean costs no digits.
template <class G, class T>
inline void chunk_moments(G group, const T* x, long rows, long channels, float* mean, float* squares) {
    typename G::Floats sums[G::UNITS][G::V] = {}, center[G::V];
    for_each_unit(group, rows, channels, [&](long at, int u) {
        typename G::Floats values[G::V];
        G::load(values, x + at);
#pragma GCC unroll 4
        for (int v = 0; v < G::V; ++v) sums[u][v] += values[v];
    });
    G::reduce(sums, mean);
    for (int c = 0; c < G::width; ++c) mean[c] /= float(rows);
    G::load_channels(center, mean);
    std::memset(sums, 0, sizeof sums);
    for_each_unit(group, rows, channels, [&](long at, int u) {
        typename G::Floats values[G::V];
        G::load(values, x + at);
#pragma GCC unroll 4
        for (int v = 0; v < G::V; ++v) sums[u][v] += (values[v] - center[v]) * (values[v] - center[v]);
    });
    G::reduce(sums, squares);
}

// Add to the moments (mean and sum of squares) of `count` rows those of `more` rows. Chan et al. 1983.
template <class T>
inline void merge(double* mean, double* squares, double count, const T* mean2, const T* squares2, double more, long n) {
    const double share = more / (count + more), weight = count * share;
    for (long c = 0; c < n; ++c) {
        const double delta = double(mean2[c]) - mean[c];
        mean[c] += delta * share;
        squares[c] += double(squares2[c]) + delta * delta * weight;
    }
}

template <class T>
void forward(const T* x, const T* shortcut, T* y, long rows, long channels, const float* weight, const float* bias,
             double epsilon, float* mean, float* inverse_std, float* running_mean, float* running_var, double momentum,
             bool relu, double* partial, int threads) {
    in_blocks(rows, threads, [=](long block, long first, long count) {
        double *means = partial + block * 2 * channels, *squares = means + channels;
        const long chunks = (rows + CHUNK - 1) / CHUNK, blocks = std::min(BLOCKS, chunks);
        const long before = first - chunks * block / blocks * CHUNK;
        if (before == 0) std::fill(means, means + 2 * channels, 0.0);
        for_each_group<T>(count, channels, [=](long c, long skip, auto group) {
            float chunk_mean[group.width], chunk_squares[group.width];
            chunk_moments(group, x + first * channels + c, count, channels, chunk_mean, chunk_squares);
            merge(means + c + skip, squares + c + skip, double(before), chunk_mean + skip, chunk_squares + skip,
                  double(count), group.width - skip);
        });
    });
    const long chunks = (rows + CHUNK - 1) / CHUNK, blocks = std::min(BLOCKS, chunks);
    for (long block = 1; block < blocks; ++block) {
        const long before = chunks * block / blocks * CHUNK;
        const long after = std::min(rows, chunks * (block + 1) / blocks * CHUNK);
        const double* other = partial + block * 2 * channels;
        merge(partial, partial + channels, double(before), other, other + channels, double(after - before), channels);
    }
    for (long c = 0; c < channels; ++c) {
        const double squares = partial[channels + c];
        mean[c] = float(partial[c]);
        inverse_std[c] = float(1.0 / std::sqrt(squares / double(rows) + epsilon));
        if (running_mean != nullptr) {
            running_mean[c] = float(momentum * partial[c] + (1.0 - momentum) * running_mean[c]);
            running_var[c] = float(momentum * (squares / double(rows - 1)) + (1.0 - momentum) * running_var[c]);
        }
    }
    in_chunks(rows, threads, [=](long first, long count) {
        for_each_group<T>(count, channels, [=](long c, long, auto group) {
            using G = decltype(group);
            typename G::Floats center[G::V], scale[G::V], offset[G::V] = {}, weights[G::V];
            G::load_channels(center, mean + c);
            G::load_channels(scale, inverse_std + c);
            if (weight != nullptr) {
                G::load_channels(weights, weight + c);
                for (int v = 0; v < G::V; ++v) scale[v] *= weights[v];
            }
            if (bias != nullptr) G::load_channels(offset, bias + c);
            const auto pass = [&](auto adds, auto rectifies) {
                for_each_unit(group, count, channels, [&](long of_unit, int) {
                    const long at = first * channels + c + of_unit;
                    typename G::Floats values[G::V], added[G::V];
                    G::load(values, x + at);
                    if (adds) G::load(added, shortcut + at);
#pragma GCC unroll 4
                    for (int v = 0; v < G::V; ++v) {
                        values[v] = (values[v] - center[v]) * scale[v] + offset[v];
                        if (adds) values[v] += added[v];
                    }
                    if (rectifies) G::rectify(values);
                    G::store(y + at, values);
                });
            };
            constexpr std::true_type yes{};
            constexpr std::false_type no{};
            shortcut != nullptr ? (relu ? pass(yes, yes) : pass(yes, no)) : (relu ? pass(no, yes) : pass(no, no));
        });
    });
}

// `y` is null without a ReLU, `grad_shortcut` where nobody needs it or it is `grad_y` itself, `grad_x` as well.
template <class T>
void backward(const T* x, const T* y, const T* grad_y, long rows, long channels, const float* weight, const float* mean,
              const float* inverse_std, T* grad_x, T* grad_shortcut, float* grad_weight, float* grad_bias,
              double* partial, int threads) {
    const long chunks = (rows + CHUNK - 1) / CHUNK, blocks = std::min(BLOCKS, chunks);
    in_blocks(rows, threads, [=](long block, long first, long count) {
        double *sum = partial + block * 2 * channels, *product = sum + channels;
        if (first == chunks * block / blocks * CHUNK) std::fill(sum, sum + 2 * channels, 0.0);
        for_each_group<T>(count, channels, [=](long c, long skip, auto group) {
            using G = decltype(group);
            typename G::Floats sums[G::UNITS][G::V] = {}, products[G::UNITS][G::V] = {}, center[G::V];
            G::load_channels(center, mean + c);
            const auto pass = [&](auto gradient) {
                for_each_unit(group, count, channels, [&](long of_unit, int u) {
                    const long at = first * channels + c + of_unit;
                    typename G::Floats values[G::V], of[G::V];
                    gradient(of, at);
                    G::load(values, x + at);
#pragma GCC unroll 4
                    for (int v = 0; v < G::V; ++v) {
                        sums[u][v] += of[v];
                        products[u][v] += of[v] * (values[v] - center[v]);
                    }
                });
            };
            if (y == nullptr) {
                pass([=](auto& to, long at) { G::load(to, grad_y + at); });
            } else if (grad_shortcut == nullptr) {
                pass([=](auto& to, long at) { G::load_where(to, y + at, grad_y + at); });
            } else {
                pass([=](auto& to, long at) {
                    G::load_where(to, y + at, grad_y + at);
                    G::store(grad_shortcut + at, to);
                });
            }
            float chunk_sum[G::width], chunk_product[G::width];
            G::reduce(sums, chunk_sum);
            G::reduce(products, chunk_product);
            for (long k = skip; k < G::width; ++k) {
                sum[c + k] += chunk_sum[k];
                product[c + k] += chunk_product[k];
            }
        });
    });
    for (long block = 1; block < blocks; ++block) {
        for (long k = 0; k < 2 * channels; ++k) partial[k] += partial[block * 2 * channels + k];
    }
    for (long c = 0; c < channels; ++c) {
        grad_bias[c] = float(partial[c]);
        grad_weight[c] = float(partial[channels + c] * inverse_std[c]);
    }
    if (grad_x == nullptr) return;
    // grad_x = weight / std * (gradient - its mean - normalised x * the mean of gradient times normalised x)
    in_chunks(rows, threads, [=](long first, long count) {
        for_each_group<T>(count, channels, [=](long c, long, auto group) {
            using G = decltype(group);
            typename G::Floats center[G::V], scale[G::V], level[G::V], slope[G::V], weights[G::V];
            G::load_channels(center, mean + c);
            G::load_channels(scale, inverse_std + c);
            G::load_channels(level, grad_bias + c);
            G::load_channels(slope, grad_weight + c);
            if (weight != nullptr) G::load_channels(weights, weight + c);
#pragma GCC unroll 4
            for (int v = 0; v < G::V; ++v) {
                slope[v] *= scale[v] / float(rows);
                level[v] /= float(rows);
                if (weight != nullptr) scale[v] *= weights[v];
            }
            const auto pass = [&](auto gradient) {
                for_each_unit(group, count, channels, [&](long of_unit, int) {
                    const long at = first * channels + c + of_unit;
                    typename G::Floats values[G::V], of[G::V];
                    gradient(of, at);
                    G::load(values, x + at);
#pragma GCC unroll 4
                    for (int v = 0; v < G::V; ++v) {
                        const auto along_x = level[v] + (values[v] - center[v]) * slope[v];
                        values[v] = (of[v] - along_x) * scale[v];
                    }
                    G::store(grad_x + at, values);
                });
            };
            if (grad_shortcut != nullptr && y != nullptr) {
                pass([=](auto& to, long at) { G::load(to, grad_shortcut + at); });
            } else if (y != nullptr) {
                pass([=](auto& to, long at) { G::load_where(to, y + at, grad_y + at); });
            } else {
                pass([=](auto& to, long at) { G::load(to, grad_y + at); });
            }
        });
    });
}

int useful_threads(long rows, long channels, int threads) { return rows * channels < SMALL ? 1 : threads; }

}  // namespace

extern "C" {

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads.
void use_threads(Parallel run, Number number, Number of) {
    parallel = run;
    thread_number = number;
    number_of_threads = of;
}

// `partial`: room for 2 * BLOCKS * channels numbers. Null: shortcut, weight, bias, running_mean with running_var.
void norm_relu_forward(int is_bfloat16, const void* x, const void* shortcut, void* y, long rows, long channels,
                       const float* weight, const float* bias, double epsilon, float* mean, float* inverse_std,
                       float* running_mean, float* running_var, double momentum, int relu, double* partial,
                       int threads) {
    const auto run = [&](auto type) {
        using T = decltype(type);
        forward(static_cast<const T*>(x), static_cast<const T*>(shortcut), static_cast<T*>(y), rows, channels, weight,
                bias, epsilon, mean, inverse_std, running_mean, running_var, momentum, relu != 0, partial,
                useful_threads(rows, channels, threads));
    };
    is_bfloat16 ? run(bfloat16{}) : run(float{});
}

// Null: y, weight, grad_x, grad_shortcut.
void norm_relu_backward(int is_bfloat16, const void* x, const void* y, const void* grad_y, long rows, long channels,
                        const float* weight, const float* mean, const float* inverse_std, void* grad_x,
                        void* grad_shortcut, float* grad_weight, float* grad_bias, double* partial, int threads) {
    const auto run = [&](auto type) {
        using T = decltype(type);
        backward(static_cast<const T*>(x), static_cast<const T*>(y), static_cast<const T*>(grad_y), rows, channels,
                 weight, mean, inverse_std, static_cast<T*>(grad_x), static_cast<T*>(grad_shortcut), grad_weight,
                 grad_bias, partial, useful_threads(rows, channels, threads));
    };
    is_bfloat16 ? run(bfloat16{}) : run(float{});
}
}
