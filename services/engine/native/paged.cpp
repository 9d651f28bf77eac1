// Attention of single new tokens over keys and values in blocks, and storing new ones there.
//
// Plain C interface for ctypes; no header of torch, so that it builds in a second. OpenMP's runtime
// is not linked: the symbols are those of the process, which is torch's own, with its threads.
//
// A pool is one array of blocks. Inside a block, of one layer: keys (size, heads, dim), then
// values; the strides are given in elements. Numbers are float32 or bfloat16 (the upper half of a float32).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define WIDE 1
#include "avx512.h"
#else
#define WIDE 0
#endif

namespace {

struct BFloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, BFloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    // To the nearest, ties to even; a NaN stays one.
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        out.bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
    else
        out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// One key against the queries of its group, or one value into their sums: DIM numbers in a row.
// A fixed DIM lets the compiler keep them in registers; 0 is any other.
template <int DIM, typename T>
inline float dot(const float* q, const T* k, int dim) {
    const int n = DIM ? DIM : dim;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += q[i] * widen(k[i]);
    return sum;
}

template <int DIM, typename T>
inline void add(float* out, const T* v, float weight, int dim) {
    const int n = DIM ? DIM : dim;
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] += weight * widen(v[i]);
}

struct Shape {
    int rows, heads, kv_heads, dim, block_size;
    int64_t block_stride;  // from one block to the next
    int64_t value_offset;  // from a layer's keys to its values
    int64_t table_stride;  // from one row's table to the next
    int64_t q_stride;      // from one row's query to the next
    float scale, softcap;  // softcap 0: none
    int window;            // 0: all tokens are seen
};

// Part of one row's text for the heads that share one head of keys and values: the sums are left
// unnormalized, with the maximum and the sum of weights, to be joined with those of other parts.
template <int DIM, typename T>
void attend(const Shape& s, const T* layer, const T* q, const int32_t* table, int kv_head, int from,
            int to, float* out, float* most, float* total, float* query, float* scores) {
    const int group = s.heads / s.kv_heads, dim = s.dim, count = to - from;
    for (int g = 0; g < group; ++g)
        for (int i = 0; i < dim; ++i)
            query[g * dim + i] = widen(q[(kv_head * group + g) * dim + i]) * s.scale;
    const int64_t token_stride = static_cast<int64_t>(s.kv_heads) * dim;
    for (int t = from; t < to;) {
        const T* keys = layer + table[t / s.block_size] * s.block_stride + kv_head * dim;
        const int end = std::min(to, (t / s.block_size + 1) * s.block_size);
        for (; t < end; ++t) {
            const T* key = keys + (t % s.block_size) * token_stride;
            for (int g = 0; g < group; ++g)
                scores[g * count + t - from] = dot<DIM>(query + g * dim, key, dim);
        }
    }
    for (int g = 0; g < group; ++g) {
        float* row = scores + g * count;
        if (s.softcap > 0)
            for (int t = 0; t < count; ++t) row[t] = s.softcap * std::tanh(row[t] / s.softcap);
        float high = row[0];
#pragma omp simd reduction(max : high)
        for (int t = 0; t < count; ++t) high = std::max(high, row[t]);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int t = 0; t < count; ++t) {
            row[t] = std::exp(row[t] - high);
            sum += row[t];
        }
        most[g] = high;
        total[g] = sum;
    }
    std::fill(out, out + group * dim, 0.0f);
    for (int t = from; t < to;) {
        const T* values =
            layer + table[t / s.block_size] * s.block_stride + s.value_offset + kv_head * dim;
        const int end = std::min(to, (t / s.block_size + 1) * s.block_size);
        for (; t < end; ++t) {
            const T* value = values + (t % s.block_size) * token_stride;
            for (int g = 0; g < group; ++g)
                add<DIM>(out + g * dim, value, scores[g * count + t - from], dim);
        }
    }
}

#if WIDE
inline __m512 sixteen(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 sixteen(const BFloat16* p) {
    return ::widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Element i is the sum of vector i.
inline __m512 across(const __m512 (&v)[16]) {
    __m512 a[8], b[4], c[2];
    UNROLL for (int i = 0; i < 8; ++i)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                             _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    UNROLL for (int i = 0; i < 4; ++i)
        b[i] = _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
    UNROLL for (int i = 0; i < 2; ++i)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                         _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

// As `attend`, sixteen keys at a time, for a DIM of whole vectors and blocks of whole sixteens.
template <int DIM, typename T>
void attend_wide(const Shape& s, const T* layer, const T* q, const int32_t* table, int kv_head,
                 int from, int to, float* out, float* most, float* total, float* query,
                 float* scores) {
    constexpr int N = DIM / 16;
    const int group = s.heads / s.kv_heads;
    const int base = from / 16 * 16, width = (to - base + 15) / 16 * 16;
    const int64_t token_stride = static_cast<int64_t>(s.kv_heads) * DIM;
    const __m512 scale = _mm512_set1_ps(s.scale), none = _mm512_set1_ps(-INFINITY);
    const auto at = [&](int t) {
        return layer + table[t / s.block_size] * s.block_stride +
               t % s.block_size * token_stride + kv_head * DIM;
    };
    for (int i = 0; i < group * N; ++i)
        _mm512_storeu_ps(query + i * 16,
                         _mm512_mul_ps(sixteen(q + kv_head * group * DIM + i * 16), scale));
    for (int t = base; t < to; t += 16) {
        const T* keys = at(t);
        for (int g = 0; g < group; ++g) {
            __m512 sums[16];
            UNROLL for (int k = 0; k < 16; ++k)
                sums[k] = _mm512_mul_ps(_mm512_loadu_ps(query + g * DIM),
                                        sixteen(keys + k * token_stride));
            for (int i = 1; i < N; ++i) {
                const __m512 part = _mm512_loadu_ps(query + g * DIM + i * 16);
                UNROLL for (int k = 0; k < 16; ++k)
                    sums[k] = _mm512_fmadd_ps(part, sixteen(keys + k * token_stride + i * 16),
                                              sums[k]);
            }
            _mm512_storeu_ps(scores + g * width + t - base, across(sums));
        }
    }
    for (int g = 0; g < group; ++g) {
        float* row = scores + g * width;
        if (s.softcap > 0)
            for (int t = from - base; t < to - base; ++t)
                row[t] = s.softcap * std::tanh(row[t] / s.softcap);
        __m512 high = none;
        for (int t = 0; t < width; t += 16) {
            // What lies before `from` and behind `to` may be anything.
            const __mmask16 seen = mask(to - base - t) & ~mask(from - base - t);
            const __m512 one = _mm512_mask_loadu_ps(none, seen, row + t);
            _mm512_storeu_ps(row + t, one);
            high = _mm512_max_ps(high, one);
        }
        most[g] = _mm512_reduce_max_ps(high);
        high = _mm512_set1_ps(most[g]);
        __m512 sum = _mm512_setzero_ps();
        for (int t = 0; t < width; t += 16) {
            const __m512 one = exponential(_mm512_sub_ps(_mm512_loadu_ps(row + t), high));
            _mm512_storeu_ps(row + t, one);
            sum = _mm512_add_ps(sum, one);
        }
        total[g] = _mm512_reduce_add_ps(sum);
    }
    for (int g = 0; g < group; ++g) {
        const float* row = scores + g * width;
        __m512 sums[N];
        UNROLL for (int i = 0; i < N; ++i) sums[i] = _mm512_setzero_ps();
        for (int t = from; t < to;) {
            const int end = std::min(to, t / 16 * 16 + 16);
            const T* values = at(t) + s.value_offset;
            for (; t < end; ++t, values += token_stride) {
                const __m512 weight = _mm512_set1_ps(row[t - base]);
                UNROLL for (int i = 0; i < N; ++i)
                    sums[i] = _mm512_fmadd_ps(weight, sixteen(values + i * 16), sums[i]);
            }
        }
        UNROLL for (int i = 0; i < N; ++i) _mm512_storeu_ps(out + g * DIM + i * 16, sums[i]);
    }
}
#endif

// One part of one row with the fastest function there is for it.
template <int DIM, typename T>
void attend_best(const Shape& s, const T* layer, const T* q, const int32_t* table, int kv_head,
                 int from, int to, float* out, float* most, float* total, float* query,
                 float* scores) {
#if WIDE
    if constexpr (DIM > 0 && DIM % 16 == 0)
        if (s.block_size % 16 == 0)
            return attend_wide<DIM>(s, layer, q, table, kv_head, from, to, out, most, total, query,
                                    scores);
#endif
    attend<DIM>(s, layer, q, table, kv_head, from, to, out, most, total, query, scores);
}

template <int DIM, typename T>
void decode(const Shape& s, const T* layer, const T* q, const int32_t* tables,
            const int32_t* lengths, T* out, int threads) {
    const int group = s.heads / s.kv_heads, dim = s.dim;
    const int tasks = s.rows * s.kv_heads;
    int longest = 0;
    for (int r = 0; r < s.rows; ++r) {
        int seen = s.window > 0 ? std::min(lengths[r], s.window) : lengths[r];
        longest = std::max(longest, seen);
    }
    // Few rows with a long text each: the text is cut, so that every thread has work.
    const int least = 256;
    int parts = 1;
    if (tasks < 4 * threads)
        parts = std::max(1, std::min(4 * threads / std::max(1, tasks), longest / least));
    const int per_part = (longest + parts - 1) / parts;
    std::vector<float> sums(static_cast<size_t>(tasks) * parts * group * dim);
    std::vector<float> most(static_cast<size_t>(tasks) * parts * group);
    std::vector<float> total(most.size());
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> query(static_cast<size_t>(group) * dim);
        std::vector<float> scores(static_cast<size_t>(group) * (per_part + 32));
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < tasks * parts; ++task) {
            const int row = task / parts / s.kv_heads, kv_head = task / parts % s.kv_heads;
            const int first = s.window > 0 ? std::max(0, lengths[row] - s.window) : 0;
            const int from = first + task % parts * per_part;
            const int to = std::min(lengths[row], from + per_part);
            const size_t at = static_cast<size_t>(task) * group;
            if (from >= to) {
                for (int g = 0; g < group; ++g) total[at + g] = 0.0f;
                continue;
            }
            attend_best<DIM>(s, layer, q + row * s.q_stride, tables + row * s.table_stride, kv_head,
                             from, to, &sums[at * dim], &most[at], &total[at], query.data(),
                             scores.data());
        }
#pragma omp for schedule(static)
        for (int task = 0; task < tasks; ++task) {
            const int row = task / s.kv_heads, kv_head = task % s.kv_heads;
            for (int g = 0; g < group; ++g) {
                const size_t at = static_cast<size_t>(task) * parts * group + g;
                float high = -INFINITY, sum = 0.0f;
                for (int p = 0; p < parts; ++p)
                    if (total[at + p * group] > 0) high = std::max(high, most[at + p * group]);
                float* first = &sums[at * dim];
                for (int p = 0; p < parts; ++p) {
                    const size_t one = at + p * group;
                    const float weight = total[one] > 0 ? std::exp(most[one] - high) : 0.0f;
                    sum += weight * total[one];
                    float* part = &sums[one * dim];
                    if (p == 0)
                        for (int i = 0; i < dim; ++i) first[i] *= weight;
                    else if (weight > 0)
                        for (int i = 0; i < dim; ++i) first[i] += weight * part[i];
                }
                T* to = out + (static_cast<int64_t>(row) * s.heads + kv_head * group + g) * dim;
                const float norm = 1.0f / sum;
                for (int i = 0; i < dim; ++i) narrow(first[i] * norm, to[i]);
            }
        }
    }
}

template <typename T>
void decode_any(const Shape& s, const void* layer, const void* q, const int32_t* tables,
                const int32_t* lengths, void* out, int threads) {
    auto run = [&](auto dim) {
        decode<decltype(dim)::value>(s, static_cast<const T*>(layer), static_cast<const T*>(q),
                                     tables, lengths, static_cast<T*>(out), threads);
    };
    switch (s.dim) {
        case 32: return run(std::integral_constant<int, 32>());
        case 48: return run(std::integral_constant<int, 48>());
        case 64: return run(std::integral_constant<int, 64>());
        case 80: return run(std::integral_constant<int, 80>());
        case 96: return run(std::integral_constant<int, 96>());
        case 128: return run(std::integral_constant<int, 128>());
        case 256: return run(std::integral_constant<int, 256>());
        default: return run(std::integral_constant<int, 0>());
    }
}

}  // namespace

extern "C" {

// `tokens` new keys (or values), each (kv_heads, dim), to their places. `slots`: block * block_size
// + place in it. The source has the strides that a projection leaves: per token, per head.
void llmos_store(void* layer, const void* from, const int64_t* slots, int tokens, int kv_heads,
                 int dim, int block_size, int64_t block_stride, int64_t token_stride,
                 int64_t head_stride, int item) {
    char* to = static_cast<char*>(layer);
    const char* source = static_cast<const char*>(from);
    const size_t row = static_cast<size_t>(dim) * item;
    for (int t = 0; t < tokens; ++t) {
        const int64_t at = slots[t] / block_size * block_stride +
                           slots[t] % block_size * static_cast<int64_t>(kv_heads) * dim;
        for (int h = 0; h < kv_heads; ++h)
            std::memcpy(to + (at + int64_t{h} * dim) * item,
                        source + (t * token_stride + h * head_stride) * item, row);
    }
}

// One new token for each row, over the `lengths[row]` tokens that its table leads to (its own
// included). Queries (rows, heads, dim) with a stride between rows; out (rows, heads, dim).
void llmos_decode(const void* layer, const void* q, const int32_t* tables, const int32_t* lengths,
                  void* out, int rows, int heads, int kv_heads, int dim, int block_size,
                  int64_t block_stride, int64_t value_offset, int64_t table_stride,
                  int64_t q_stride, float scale, float softcap, int window, int is_bfloat16,
                  int threads) {
    const Shape s{rows,         heads,        kv_heads, dim,   block_size, block_stride,
                  value_offset, table_stride, q_stride, scale, softcap,    window};
    if (is_bfloat16)
        decode_any<BFloat16>(s, layer, q, tables, lengths, out, threads);
    else
        decode_any<float>(s, layer, q, tables, lengths, out, threads);
}

}  // extern "C"
