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
    static inline Floats all(float value) { return Floats{} + value; }
};

// A group of V vectors of W channels. U rows are summed apart, so that an addition need not wait for the one before: the
// same number in every group, because it decides the order of a sum.
template <int W_, int V_>
struct Group {
    static constexpr int W = W_, V = V_, U = 4, width = W_ * V_;
    using L = Lanes<W>;
    using Floats = typename L::Floats;

    static inline void load(Floats (&to)[V], const float* from) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) to[v] = L::load(from + v * W);
    }
    static inline void reduce(const Floats (&sums)[U][V], float* to) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            Floats total = sums[0][v];
#pragma GCC unroll 4
            for (int u = 1; u < U; ++u) total += sums[u][v];
            L::store(to + v * W, total);
        }
    }
};

// Call body(first channel, channels that an earlier group has, group) for groups that cover all channels. The last one
// begins earlier where it would not fit.
template <class Body>
inline void for_each_group(long channels, Body body) {
    const auto cover = [&](long c, auto group) {
        for (; c < channels; c += group.width) {
            const long first = std::min(c, channels - group.width);
            body(first, c - first, group);
        }
    };
    long c = 0;
    for (; c + 2 * WIDE <= channels; c += 2 * WIDE) body(c, 0L, Group<WIDE, 2>{});
    if (channels >= WIDE) {
        cover(c, Group<WIDE, 1>{});
    } else if (channels >= 4) {
        cover(c, Group<4, 1>{});
    } else {
        cover(c, Group<1, 1>{});
    }
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
inline void chunk_moments(G, const T* x, long rows, long channels, float* mean, float* squares) {
    using L = typename G::L;
    typename G::Floats sums[G::U][G::V] = {}, center[G::V];
    const auto pass = [&](auto add) {
        long row = 0;
        for (; row + G::U <= rows; row += G::U) {
#pragma GCC unroll 4
            for (int u = 0; u < G::U; ++u) {
#pragma GCC unroll 4
                for (int v = 0; v < G::V; ++v) add(sums[u][v], L::load(x + (row + u) * channels + v * G::W), v);
            }
        }
        for (; row < rows; ++row) {
#pragma GCC unroll 4
            for (int v = 0; v < G::V; ++v) add(sums[0][v], L::load(x + row * channels + v * G::W), v);
        }
    };
    pass([](auto& sum, auto value, int) { sum += value; });
    G::reduce(sums, mean);
    for (int c = 0; c < G::width; ++c) mean[c] /= float(rows);
    G::load(center, mean);
    std::memset(sums, 0, sizeof sums);
    pass([&](auto& sum, auto value, int v) { sum += (value - center[v]) * (value - center[v]); });
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
        for_each_group(channels, [=](long c, long skip, auto group) {
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
        for_each_group(channels, [=](long c, long, auto group) {
            using G = decltype(group);
            using L = typename G::L;
            typename G::Floats center[G::V], scale[G::V], offset[G::V] = {};
            G::load(center, mean + c);
            G::load(scale, inverse_std + c);
#pragma GCC unroll 4
            for (int v = 0; v < G::V; ++v) {
                if (weight != nullptr) scale[v] *= L::load(weight + c + v * G::W);
                if (bias != nullptr) offset[v] = L::load(bias + c + v * G::W);
            }
            const auto pass = [&](auto finish) {
                for (long row = first; row < first + count; ++row) {
#pragma GCC unroll 4
                    for (int v = 0; v < G::V; ++v) {
                        const long at = row * channels + c + v * G::W;
                        L::store(y + at, finish((L::load(x + at) - center[v]) * scale[v] + offset[v], at));
                    }
                }
            };
            const auto rectified = [](auto value) { return L::where_positive(value, value); };
            if (shortcut != nullptr && relu) {
                pass([&](auto value, long at) { return rectified(value + L::load(shortcut + at)); });
            } else if (shortcut != nullptr) {
                pass([&](auto value, long at) { return value + L::load(shortcut + at); });
            } else if (relu) {
                pass([&](auto value, long) { return rectified(value); });
            } else {
                pass([&](auto value, long) { return value; });
            }
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
        for_each_group(channels, [=](long c, long skip, auto group) {
            using G = decltype(group);
            using L = typename G::L;
            typename G::Floats sums[G::U][G::V] = {}, products[G::U][G::V] = {}, center[G::V];
            G::load(center, mean + c);
            const auto pass = [&](auto gradient) {
                const auto add = [&](long row, int u) {
#pragma GCC unroll 4
                    for (int v = 0; v < G::V; ++v) {
                        const long at = row * channels + c + v * G::W;
                        const auto of = gradient(at);
                        sums[u][v] += of;
                        products[u][v] += of * (L::load(x + at) - center[v]);
                    }
                };
                long row = first;
                for (; row + G::U <= first + count; row += G::U) {
#pragma GCC unroll 4
                    for (int u = 0; u < G::U; ++u) add(row + u, u);
                }
                for (; row < first + count; ++row) add(row, 0);
            };
            if (y == nullptr) {
                pass([=](long at) { return L::load(grad_y + at); });
            } else if (grad_shortcut == nullptr) {
                pass([=](long at) { return L::where_positive(L::load(y + at), L::load(grad_y + at)); });
            } else {
                pass([=](long at) {
                    const auto of = L::where_positive(L::load(y + at), L::load(grad_y + at));
                    L::store(grad_shortcut + at, of);
                    return of;
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
        for_each_group(channels, [=](long c, long, auto group) {
            using G = decltype(group);
            using L = typename G::L;
            typename G::Floats center[G::V], scale[G::V], level[G::V], slope[G::V];
            G::load(center, mean + c);
            G::load(scale, inverse_std + c);
            G::load(level, grad_bias + c);
            G::load(slope, grad_weight + c);
#pragma GCC unroll 4
            for (int v = 0; v < G::V; ++v) {
                slope[v] *= scale[v] / L::all(float(rows));
                level[v] /= L::all(float(rows));
                if (weight != nullptr) scale[v] *= L::load(weight + c + v * G::W);
            }
            const auto pass = [&](auto gradient) {
                for (long row = first; row < first + count; ++row) {
#pragma GCC unroll 4
                    for (int v = 0; v < G::V; ++v) {
                        const long at = row * channels + c + v * G::W;
                        const auto along_x = level[v] + (L::load(x + at) - center[v]) * slope[v];
                        L::store(grad_x + at, (gradient(at) - along_x) * scale[v]);
                    }
                }
            };
            if (grad_shortcut != nullptr && y != nullptr) {
                pass([=](long at) { return L::load(grad_shortcut + at); });
            } else if (y != nullptr) {
                pass([=](long at) { return L::where_positive(L::load(y + at), L::load(grad_y + at)); });
            } else {
                pass([=](long at) { return L::load(grad_y + at); });
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
