// The products of a decoder with its weights, for one token at a time and for thousands.
//
// A weight (n outputs, k inputs) lies in panels of 32 outputs. A panel is a row of 128-byte lines;
// a line has the 32 outputs, each with as many neighbouring inputs as fit 32 bits: 1 of float32, 2
// of bfloat16, 4 of int8. Outputs and inputs are padded with zeros to whole lines. So one token
// costs one pass over memory in its order, and many tokens take the same lines from the cache.
//
// int8 has one scale for each output. Tokens are taken as whole numbers of 16 bits with one scale
// for each token, in two bytes: two sums of products of bytes, exact, are joined at the end. That
// is finer than bfloat16, at half of the memory.
//
// Plain C interface for ctypes. OpenMP's runtime is not linked: its symbols are those of the
// process, which has torch's.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define MATRIX_UNIT
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "these kernels are for AVX-512 with VNNI"
#endif

#include "avx512.h"
#include "lora.h"

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

extern "C" {

// One weight. `scales` and `sums` (of the numbers of an output) are there for int8, padded as the
// outputs are. `bias` is of the tokens' type, or null.
struct Matrix {
    const uint8_t* data;
    const float* scales;
    const int32_t* sums;
    const void* bias;
    int64_t n, k, kind;
};

// One layer. Norms are of the tokens' type; `q_norm` and `k_norm` are over each head, or null.
struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const void *norm, *post_norm, *q_norm, *k_norm;
    int64_t dim;  // of a head
    double epsilon;
};
}

namespace {

constexpr int64_t PANEL = 32;        // outputs
constexpr int64_t LINE = 128;        // bytes
constexpr int MOST_ROWS = 6;         // tokens whose sums with two panels are in registers at once
constexpr int64_t WORTH_SHARING = 1 << 17;  // numbers of adapters that two threads read faster
constexpr int64_t NEAR = 512 << 10;  // bytes of tokens that stay in a core's second cache

// ---- numbers ----

inline __m512 silu(__m512 x) {
    const __m512 negative = _mm512_sub_ps(_mm512_setzero_ps(), x);
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(negative)));
}

// ---- one tile: the sums of some tokens with one or two panels ----

inline int64_t lines_of(int64_t k, int64_t kind) {
    return kind == FLOAT32 ? k : kind == BFLOAT16 ? (k + 1) / 2 : (k + 3) / 4;
}

// Tokens, `stride` numbers from one to the next. For int8: upper bytes + 128, lower bytes, scales.
struct Tokens {
    const void* data;
    int64_t stride;
    const uint8_t *high, *low;
    const float* scales;
};

struct Panel {
    const uint8_t* data;
    const float* scales;
    const int32_t* sums;
};

// The sums of tokens, one row for each; two vectors for each panel.
using Sums = __m512[4];
using Tile = Sums[MOST_ROWS];
using Multiply = void (*)(int64_t k, const Tokens& x, int64_t row, const Panel* panels, Tile& out);

template <int ROWS, int PANELS>
void multiply_float32(int64_t k, const Tokens& x, int64_t row, const Panel* panels, Tile& out) {
    const float* tokens = static_cast<const float*>(x.data) + row * x.stride;
    __m512 sums[ROWS][2 * PANELS];
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int p = 0; p < 2 * PANELS; ++p) sums[r][p] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; ++i) {
        __m512 line[2 * PANELS];
        UNROLL for (int p = 0; p < 2 * PANELS; ++p)
            line[p] = _mm512_loadu_ps(panels[p / 2].data + i * LINE + p % 2 * 64);
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const __m512 token = _mm512_set1_ps(tokens[r * x.stride + i]);
            UNROLL for (int p = 0; p < 2 * PANELS; ++p)
                sums[r][p] = _mm512_fmadd_ps(token, line[p], sums[r][p]);
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int p = 0; p < 2 * PANELS; ++p) out[r][p] = sums[r][p];
}

#ifdef __AVX512BF16__
template <int ROWS, int PANELS>
void multiply_bfloat16(int64_t k, const Tokens& x, int64_t row, const Panel* panels, Tile& out) {
    const bf16* tokens = static_cast<const bf16*>(x.data) + row * x.stride;
    __m512 sums[ROWS][2 * PANELS];
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int p = 0; p < 2 * PANELS; ++p) sums[r][p] = _mm512_setzero_ps();
    const auto step = [&](int64_t i, auto pair_at) __attribute__((always_inline)) {
        __m512i line[2 * PANELS];
        UNROLL for (int p = 0; p < 2 * PANELS; ++p)
            line[p] = _mm512_loadu_si512(panels[p / 2].data + i * LINE + p % 2 * 64);
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const __m512i token = _mm512_set1_epi32(pair_at(tokens + r * x.stride + 2 * i));
            UNROLL for (int p = 0; p < 2 * PANELS; ++p)
                sums[r][p] = _mm512_dpbf16_ps(sums[r][p], (__m512bh)token, (__m512bh)line[p]);
        }
    };
    for (int64_t i = 0; i < k / 2; ++i)
        step(i, [](const bf16* at) {
            int32_t pair;
            std::memcpy(&pair, at, 4);
            return pair;
        });
    if (k % 2) step(k / 2, [](const bf16* at) { return static_cast<int32_t>(*at); });
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int p = 0; p < 2 * PANELS; ++p) out[r][p] = sums[r][p];
}
#endif

using Bytewise = __m512i[2][MOST_ROWS][4];

// The sums over the upper and over the lower bytes of tokens, as numbers. Not inlined: the sums of
// the loop before it would not stay in registers.
__attribute__((noinline)) void joined(const Bytewise& both, const float* scales, int rows,
                                      const Panel* panels, int vectors, Tile& out) {
    for (int p = 0; p < vectors; ++p) {
        const __m512 scale = _mm512_loadu_ps(panels[p / 2].scales + p % 2 * 16);
        // The 128 that was added to each upper byte goes, exactly.
        const __m512i added =
            _mm512_slli_epi32(_mm512_loadu_si512(panels[p / 2].sums + p % 2 * 16), 7);
        for (int r = 0; r < rows; ++r) {
            const __m512 upper = _mm512_cvtepi32_ps(_mm512_sub_epi32(both[0][r][p], added));
            const __m512 lower = _mm512_cvtepi32_ps(both[1][r][p]);
            const __m512 sum = _mm512_fmadd_ps(upper, _mm512_set1_ps(256.0f), lower);
            out[r][p] = _mm512_mul_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(scales[r])));
        }
    }
}

template <int ROWS, int PANELS>
void multiply_int8(int64_t k, const Tokens& x, int64_t row, const Panel* panels, Tile& out) {
    const uint8_t* bytes[2] = {x.high + row * x.stride, x.low + row * x.stride};
    __m512i sums[2][ROWS][2 * PANELS];
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int p = 0; p < 2 * PANELS; ++p)
            sums[0][r][p] = sums[1][r][p] = _mm512_setzero_si512();
    const int64_t lines = lines_of(k, INT8);
    for (int64_t i = 0; i < lines; ++i) {
        __m512i line[2 * PANELS];
        UNROLL for (int p = 0; p < 2 * PANELS; ++p)
            line[p] = _mm512_loadu_si512(panels[p / 2].data + i * LINE + p % 2 * 64);
        UNROLL for (int r = 0; r < ROWS; ++r)
            UNROLL for (int part = 0; part < 2; ++part) {
                int32_t four;
                std::memcpy(&four, bytes[part] + r * x.stride + 4 * i, 4);
                const __m512i token = _mm512_set1_epi32(four);
                UNROLL for (int p = 0; p < 2 * PANELS; ++p)
                    sums[part][r][p] = _mm512_dpbusd_epi32(sums[part][r][p], token, line[p]);
            }
    }
    Bytewise both;
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int p = 0; p < 2 * PANELS; ++p) {
            both[0][r][p] = sums[0][r][p];
            both[1][r][p] = sums[1][r][p];
        }
    joined(both, x.scales + row, ROWS, panels, 2 * PANELS, out);
}

// By kind, panels - 1 and tokens - 1.
#define ROW_OF(f, P) {f<1, P>, f<2, P>, f<3, P>, f<4, P>, f<5, P>, f<6, P>}
const Multiply MULTIPLY[3][2][MOST_ROWS] = {
    {ROW_OF(multiply_float32, 1), ROW_OF(multiply_float32, 2)},
#ifdef __AVX512BF16__
    {ROW_OF(multiply_bfloat16, 1), ROW_OF(multiply_bfloat16, 2)},
#else
    {{nullptr}, {nullptr}},
#endif
    // Two sums for each output: half as many tokens fit.
    {ROW_OF(multiply_int8, 1), {multiply_int8<1, 2>, multiply_int8<2, 2>, multiply_int8<3, 2>}},
};

#ifdef MATRIX_UNIT
// ---- the same by the matrix unit (AMX), for many tokens of bfloat16 ----
//
// Sixteen lines of a half panel are one of its registers as they lie: 16 pairs of inputs, 16
// outputs. It adds products in another order than AVX-512 does.

constexpr int64_t UNIT_ROWS = 32;    // tokens at once: two registers of 16
constexpr int64_t UNIT_INPUTS = 32;  // inputs of a register
constexpr int64_t UNIT_FROM = 8;     // tokens from which it is the faster one

struct alignas(64) UnitShapes {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

bool unit_is_wanted = true;

// Linux gives its registers to a process that asks.
bool unit_is_there() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool found = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return found;
}

// Registers 0-3 are sums of (tokens, outputs): two and two; 4 and 5 are tokens, 6 and 7 weights.
void shape_unit(int64_t rows) {
    UnitShapes shapes;
    for (int t = 0; t < 8; ++t) shapes.bytes[t] = 64;
    const uint8_t first = std::min<int64_t>(rows, 16), second = std::max<int64_t>(rows - 16, 1);
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = first;
    shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = second;
    shapes.rows[6] = shapes.rows[7] = 16;
    asm volatile("" ::: "memory");  // GCC 12 is told of the first 8 bytes only
    _tile_loadconfig(&shapes);
}

// The registers have the shapes for `rows` tokens.
void multiply_by_unit(int64_t k, const Tokens& x, int64_t row, int64_t rows, const Panel* panels,
                      int count, Sums* out) {
    const bf16* tokens = static_cast<const bf16*>(x.data) + row * x.stride;
    const bf16* later = rows > 16 ? tokens + 16 * x.stride : tokens;
    asm volatile("" ::: "memory");  // what the unit reads is not told to the compiler
    for (int p = 0; p < count; ++p) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < k; i += UNIT_INPUTS) {
            const uint8_t* lines = panels[p].data + i / 2 * LINE;
            _tile_loadd(6, lines, LINE);
            _tile_loadd(7, lines + 64, LINE);
            _tile_loadd(4, tokens + i, 2 * x.stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (rows > 16) {
                _tile_loadd(5, later + i, 2 * x.stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, &out[0][2 * p], sizeof(Sums));
        _tile_stored(1, &out[0][2 * p + 1], sizeof(Sums));
        if (rows > 16) {
            _tile_stored(2, &out[16][2 * p], sizeof(Sums));
            _tile_stored(3, &out[16][2 * p + 1], sizeof(Sums));
        }
    }
    asm volatile("" ::: "memory");
}
#endif

// ---- products, shared among the threads of the region that they are called in ----

struct Share {
    int64_t from, to;
};

Share share(int64_t count) {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Where the sums with `w` go: y (rows of `stride` numbers), with `add` if there is one.
template <typename Y>
struct Target {
    const Matrix* w;
    Y* y;
    const Y* add;
    int64_t stride;
};

Panel panel_of(const Matrix& w, int64_t index) {
    const int64_t at = index * PANEL;
    return {w.data + index * lines_of(w.k, w.kind) * LINE, w.scales ? w.scales + at : nullptr,
            w.sums ? w.sums + at : nullptr};
}

int64_t panels_of(const Matrix& w) { return (w.n + PANEL - 1) / PANEL; }

// Every tile of tokens with these one or two panels; `done(row, rows, tile)` takes the sums.
template <typename Done>
void tiles(const Matrix& w, const Tokens& x, Share rows, const Panel* panels, int count,
           Done done) {
#ifdef MATRIX_UNIT
    if (w.kind == BFLOAT16 && rows.to - rows.from >= UNIT_FROM && w.k % UNIT_INPUTS == 0 &&
        unit_is_wanted && unit_is_there()) {
        Sums sums[UNIT_ROWS];
        int64_t shaped = 0;
        for (int64_t row = rows.from; row < rows.to; row += UNIT_ROWS) {
            const int64_t number = std::min(UNIT_ROWS, rows.to - row);
            if (number != shaped) shape_unit(shaped = number);
            multiply_by_unit(w.k, x, row, number, panels, count, sums);
            done(row, number, sums);
        }
        _tile_release();  // a thread that holds its registers is dearer to switch
        return;
    }
#endif
    const int64_t most = w.kind == INT8 && count == 2 ? MOST_ROWS / 2 : MOST_ROWS;
    const int64_t all = rows.to - rows.from, parts = (all + most - 1) / most;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t row = rows.from + all * part / parts;
        const int64_t number = rows.from + all * (part + 1) / parts - row;
        Tile tile;
        MULTIPLY[w.kind][count - 1][number - 1](w.k, x, row, panels, tile);
        done(row, number, tile);
    }
}

// Panels among the threads, so that each weight is read once; tokens where panels do not come out
// even.
struct Split {
    Share panels, rows;
};

Split split(int64_t panels, int64_t rows) {
    const int64_t threads = omp_get_num_threads();
    const int64_t longest = (panels + threads - 1) / threads;
    const bool uneven = longest * threads * 16 > panels * 17;
    if (uneven && rows >= 4 * MOST_ROWS * threads) return {{0, panels}, share(rows)};
    return {share(panels), {0, rows}};
}

template <typename T>
inline __m512 biased(const Matrix& w, int64_t at, __mmask16 m, __m512 sum) {
    return w.bias ? _mm512_add_ps(sum, load(static_cast<const T*>(w.bias) + at, m)) : sum;
}

template <typename T, typename Y>
void put(const Target<Y>& target, int64_t panel, int half, int64_t row, __m512 sum) {
    const int64_t at = panel * PANEL + half * 16;
    const __mmask16 m = mask(target.w->n - at);
    const int64_t place = row * target.stride + at;
    sum = biased<T>(*target.w, at, m, sum);
    if (target.add) sum = _mm512_add_ps(sum, load(target.add + place, m));
    store(target.y + place, sum, m);
}

// y = x w (+ bias) (+ add), for weights of the same k. T is the type of tokens and biases.
template <typename T, typename Y>
void product(const Target<Y>* targets, int count, const Tokens& x, int64_t rows) {
    int64_t total = 0;
    for (int t = 0; t < count; ++t) total += panels_of(*targets[t].w);
    const Split part = split(total, rows);
    int target = 0;
    int64_t before = 0;  // panels of the targets that are done
    for (int64_t at = part.panels.from; at < part.panels.to;) {
        const int number = part.panels.to - at >= 2 ? 2 : 1;
        Panel panels[2];
        const Target<Y>* of[2];
        int64_t index[2];
        for (int p = 0; p < number; ++p, ++at) {
            while (at >= before + panels_of(*targets[target].w))
                before += panels_of(*targets[target++].w);
            of[p] = targets + target;
            index[p] = at - before;
            panels[p] = panel_of(*of[p]->w, index[p]);
        }
        const auto done = [&](int64_t row, int64_t many, const Sums* tile) {
            for (int64_t r = 0; r < many; ++r)
                for (int p = 0; p < 2 * number; ++p)
                    put<T>(*of[p / 2], index[p / 2], p % 2, row + r, tile[r][p]);
        };
        tiles(*targets[0].w, x, part.rows, panels, number, done);
    }
}

// What adapters add to gate and up, before they meet: (rows, 2, n), and for which rows.
struct Added {
    float* sums;
    bool* is_there;
};

// y = silu(x gate) * (x up)
template <typename T>
void gated(const Matrix& gate, const Matrix& up, const Tokens& x, int64_t rows, const Added& added,
           T* y) {
    const Split part = split(panels_of(gate), rows);
    for (int64_t at = part.panels.from; at < part.panels.to; ++at) {
        const Panel panels[2] = {panel_of(gate, at), panel_of(up, at)};
        tiles(gate, x, part.rows, panels, 2, [&](int64_t row, int64_t many, const Sums* tile) {
            for (int half = 0; half < 2; ++half) {
                const int64_t first = at * PANEL + half * 16;
                const __mmask16 m = mask(gate.n - first);
                for (int64_t r = 0; r < many; ++r) {
                    __m512 g = biased<T>(gate, first, m, tile[r][half]);
                    __m512 u = biased<T>(up, first, m, tile[r][2 + half]);
                    if (added.is_there && added.is_there[row + r]) {
                        const float* sums = added.sums + (row + r) * 2 * gate.n + first;
                        g = _mm512_add_ps(g, load(sums, m));
                        u = _mm512_add_ps(u, load(sums + gate.n, m));
                    }
                    store(y + (row + r) * gate.n + first, _mm512_mul_ps(silu(g), u), m);
                }
            }
        });
    }
}

// ---- what lies between the products; each thread takes some of the rows ----

// As transformers' RMSNorm: the scaled number is rounded before it meets the weight.
template <typename T>
void normed(const T* x, const void* weights, double epsilon, int64_t size, T* y) {
    const T* weight = static_cast<const T*>(weights);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 v = load(x + i, mask(size - i));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(size);
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + static_cast<float>(epsilon)));
    for (int64_t i = 0; i < size; i += 16) {
        const __mmask16 m = mask(size - i);
        const __m512 v = rounded(_mm512_mul_ps(load(x + i, m), factor), x);
        store(y + i, _mm512_mul_ps(v, load(weight + i, m)), m);
    }
}

// The halves of a head turn against each other: (a, b) -> (a cos - b sin, b cos + a sin).
template <typename T>
void turned(T* head, const T* cos, const T* sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const __mmask16 m = mask(half - i);
        const __m512 a = load(head + i, m), b = load(head + half + i, m);
        const __m512 first = _mm512_mul_ps(b, load(sin + i, m));
        const __m512 second = _mm512_mul_ps(a, load(sin + half + i, m));
        store(head + i, _mm512_fmsub_ps(a, load(cos + i, m), first), m);
        store(head + half + i, _mm512_fmadd_ps(b, load(cos + half + i, m), second), m);
    }
}

template <typename T>
void heads(const Layer& layer, const void* norm, T* x, const T* cos, const T* sin, int64_t width,
           int64_t row) {
    for (T* head = x + row * width; head < x + (row + 1) * width; head += layer.dim) {
        if (norm) normed(head, norm, layer.epsilon, layer.dim, head);
        if (cos) turned(head, cos + row * layer.dim, sin + row * layer.dim, layer.dim);
    }
}

template <typename T>
void quantized(const T* x, int64_t k, uint8_t* high, uint8_t* low, float* scale) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 16)
        most = _mm512_max_ps(most, _mm512_abs_ps(load(x + i, mask(k - i))));
    const float top = _mm512_reduce_max_ps(most);
    *scale = top / 32512.0f;
    const __m512 factor = _mm512_set1_ps(top > 0 ? 32512.0f / top : 0.0f);
    const int64_t padded = 4 * lines_of(k, INT8);
    for (int64_t i = 0; i < padded; i += 16) {
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + i, mask(k - i)), factor));
        const __m512i upper = _mm512_add_epi32(_mm512_srai_epi32(q, 8), _mm512_set1_epi32(128));
        _mm512_mask_cvtepi32_storeu_epi8(high + i, mask(padded - i), upper);
        _mm512_mask_cvtepi32_storeu_epi8(low + i, mask(padded - i), q);
    }
}

// ---- memory between the products, kept by the thread that calls ----

// Room for the bytes of int8 tokens, `rows` of at most k numbers; nothing where weights are floats.
struct Bytes {
    uint8_t *high = nullptr, *low = nullptr;
    float* scales = nullptr;

    static int64_t size(int64_t rows, int64_t k) { return rows * (2 * (k + 64) + 64); }

    Bytes(const Matrix& w, uint8_t* room, int64_t rows, int64_t k) {
        if (w.kind != INT8) return;
        scales = reinterpret_cast<float*>(room);
        high = room + (rows * 4 + 63) / 64 * 64;
        low = high + rows * (k + 64);
    }

    // Tokens as `w` takes them; the threads share the work, and wait for each other.
    template <typename T>
    Tokens of(const Matrix& w, const T* x, int64_t rows) const {
        if (w.kind != INT8) return {x, w.k, nullptr, nullptr, nullptr};
        const int64_t stride = 4 * lines_of(w.k, INT8);
        const Share mine = share(rows);
        for (int64_t r = mine.from; r < mine.to; ++r)
            quantized(x + r * w.k, w.k, high + r * stride, low + r * stride, scales + r);
#pragma omp barrier
        return {nullptr, stride, high, low, scales};
    }
};

uint8_t* room(int64_t bytes) {
    thread_local std::vector<uint8_t> kept;
    if (static_cast<int64_t>(kept.size()) < bytes + 64) kept.resize(bytes + 64);
    uint8_t* p = kept.data();
    return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64;
}

int64_t block_rows(int64_t rows, int64_t widest) {
    return std::min(rows, std::max<int64_t>(8 * MOST_ROWS, NEAR / (2 * widest) / 48 * 48));
}

template <typename T>
void before(const Layer& layer, const Adapted* adapted, const T* x, const T* cos, const T* sin,
            T* q, T* k, T* v, int64_t rows, int threads) {
    const int64_t width = layer.q.k, most = block_rows(rows, width);
    uint8_t* memory = room(most * width * sizeof(T) + 64 + Bytes::size(most, width));
    T* norms = reinterpret_cast<T*>(memory);
    const Bytes bytes(layer.q, memory + (most * width * sizeof(T) + 63) / 64 * 64, most, width);
#pragma omp parallel num_threads(threads)
    for (int64_t from = 0; from < rows; from += most) {
        const int64_t count = std::min(most, rows - from);
        const Share mine = share(count);
        for (int64_t r = mine.from; r < mine.to; ++r)
            normed(x + (from + r) * width, layer.norm, layer.epsilon, width,
                   norms + r * width);
#pragma omp barrier
        const Tokens tokens = bytes.of(layer.q, norms, count);
        const Target<T> targets[3] = {
            {&layer.q, q + from * layer.q.n, nullptr, layer.q.n},
            {&layer.k, k + from * layer.k.n, nullptr, layer.k.n},
            {&layer.v, v + from * layer.v.n, nullptr, layer.v.n},
        };
        product<T>(targets, 3, tokens, count);
#pragma omp barrier
        for (int64_t r = from + mine.from; r < from + mine.to; ++r) {
            const T* token = norms + (r - from) * width;
            adapt_all(adapted, &Stacks::q, r, token, q + r * layer.q.n);
            adapt_all(adapted, &Stacks::k, r, token, k + r * layer.k.n);
            adapt_all(adapted, &Stacks::v, r, token, v + r * layer.v.n);
            heads(layer, layer.q_norm, q, cos, sin, layer.q.n, r);
            heads(layer, layer.k_norm, k, cos, sin, layer.k.n, r);
        }
    }
}

template <typename T>
void after(const Layer& layer, const Adapted* adapted, const T* attended, const T* x, T* y,
           int64_t rows, int threads) {
    const int64_t width = layer.o.n, inner = layer.gate.n;
    const int64_t widest = std::max({width, inner, layer.o.k}), most = block_rows(rows, widest);
    const int64_t wide = (most * width * sizeof(T) + 63) / 64 * 64;
    const int64_t long_ = (most * inner * sizeof(T) + 63) / 64 * 64;
    const int64_t adding = adapted ? most * (2 * inner * 4 + 1) + 63 : 0;
    uint8_t* memory = room(wide + long_ + adding / 64 * 64 + Bytes::size(most, widest));
    T* norms = reinterpret_cast<T*>(memory);
    T* gates = reinterpret_cast<T*>(memory + wide);
    Added added = {nullptr, nullptr};
    if (adapted) {
        added.sums = reinterpret_cast<float*>(memory + wide + long_);
        added.is_there = reinterpret_cast<bool*>(added.sums + most * 2 * inner);
    }
    const Bytes bytes(layer.o, memory + wide + long_ + adding / 64 * 64, most, widest);
#pragma omp parallel num_threads(threads)
    for (int64_t from = 0; from < rows; from += most) {
        const int64_t count = std::min(most, rows - from);
        const Share mine = share(count);
        T* out = y + from * width;
        Tokens tokens = bytes.of(layer.o, attended + from * layer.o.k, count);
        const Target<T> first = {&layer.o, out, x + from * width, width};
        product<T>(&first, 1, tokens, count);
#pragma omp barrier
        for (int64_t r = mine.from; r < mine.to; ++r) {
            T *row = out + r * width, *norm = norms + r * width;
            adapt_all(adapted, &Stacks::o, from + r, attended + (from + r) * layer.o.k, row);
            normed(row, layer.post_norm, layer.epsilon, width, norm);
            if (!adapted) continue;
            float* sums = added.sums + r * 2 * inner;
            std::memset(sums, 0, 2 * inner * 4);
            const bool gate = adapt_all(adapted, &Stacks::gate, from + r, norm, sums);
            const bool up = adapt_all(adapted, &Stacks::up, from + r, norm, sums + inner);
            added.is_there[r] = gate || up;
        }
#pragma omp barrier
        tokens = bytes.of(layer.gate, norms, count);
        gated(layer.gate, layer.up, tokens, count, added, gates);
#pragma omp barrier
        tokens = bytes.of(layer.down, gates, count);
        const Target<T> second = {&layer.down, out, out, width};
        product<T>(&second, 1, tokens, count);
#pragma omp barrier
        for (int64_t r = mine.from; r < mine.to; ++r)
            adapt_all(adapted, &Stacks::down, from + r, gates + r * inner, out + r * width);
        if (adapted) {
#pragma omp barrier
        }
    }
}

template <typename T, typename Y>
void linear(const Matrix& w, const T* x, Y* y, int64_t rows, int threads) {
    const int64_t most = block_rows(rows, w.k);
    const Bytes bytes(w, room(Bytes::size(most, w.k)), most, w.k);
#pragma omp parallel num_threads(threads)
    for (int64_t from = 0; from < rows; from += most) {
        const int64_t count = std::min(most, rows - from);
        const Tokens tokens = bytes.of(w, x + from * w.k, count);
        const Target<Y> target = {&w, y + from * w.n, nullptr, w.n};
        product<T>(&target, 1, tokens, count);
#pragma omp barrier
    }
}

// The k numbers of one output.
template <typename T>
void row(const Matrix& w, int64_t output, T* y) {
    const int64_t size = w.kind == FLOAT32 ? 4 : w.kind == BFLOAT16 ? 2 : 1, each = 4 / size;
    const Panel panel = panel_of(w, output / PANEL);
    const uint8_t* from = panel.data + output % PANEL * 4;
    for (int64_t i = 0; i < w.k; ++i) {
        const uint8_t* at = from + i / each * LINE + i % each * size;
        if (w.kind == INT8) {
            const float value = panel.scales[output % PANEL] * static_cast<int8_t>(*at);
            store(y + i, _mm512_set1_ps(value), 1);
        } else {
            std::memcpy(y + i, at, sizeof(T));
        }
    }
}

}  // namespace

extern "C" {

// The kinds (bits) that can be multiplied here, and sizes of the structures, to be compared.
int64_t llmos_kinds() {
#ifdef __AVX512BF16__
    return 1 << FLOAT32 | 1 << BFLOAT16 | 1 << INT8;
#else
    return 1 << FLOAT32 | 1 << INT8;
#endif
}
// Whether there is a matrix unit for bfloat16 here; with `wanted` 0 it is not used from now on: the
// numbers of a token are then the same whatever is computed with it.
int64_t llmos_matrix_unit(int wanted) {
#ifdef MATRIX_UNIT
    unit_is_wanted = wanted;
    return unit_is_there();
#else
    return 0;
#endif
}
int64_t llmos_layer_bytes() { return sizeof(Layer); }
int64_t llmos_stacks_bytes() { return sizeof(Stacks); }

// Tokens are float32 or bfloat16 (`half`), contiguous rows. `wide`: the result is float32.
void llmos_linear(const Matrix* w, const void* x, void* y, int64_t rows, int half, int wide,
                  int threads) {
    if (!half)
        linear(*w, static_cast<const float*>(x), static_cast<float*>(y), rows, threads);
    else if (wide)
        linear(*w, static_cast<const bf16*>(x), static_cast<float*>(y), rows, threads);
    else
        linear(*w, static_cast<const bf16*>(x), static_cast<bf16*>(y), rows, threads);
}

// From the input of a layer to queries, keys and values, turned to their positions (cos null: not).
// `adapted` (or null) is for the tokens of the row.
void llmos_before(const Layer* layer, const Adapted* adapted, const void* x, const void* cos,
                  const void* sin, void* q, void* k, void* v, int64_t rows, int half,
                  int threads) {
    if (half)
        before(*layer, adapted, static_cast<const bf16*>(x), static_cast<const bf16*>(cos),
               static_cast<const bf16*>(sin), static_cast<bf16*>(q), static_cast<bf16*>(k),
               static_cast<bf16*>(v), rows, threads);
    else
        before(*layer, adapted, static_cast<const float*>(x), static_cast<const float*>(cos),
               static_cast<const float*>(sin), static_cast<float*>(q), static_cast<float*>(k),
               static_cast<float*>(v), rows, threads);
}

// From what attention found, and the input of the layer, to its output.
void llmos_after(const Layer* layer, const Adapted* adapted, const void* attended, const void* x,
                 void* y, int64_t rows, int half, int threads) {
    if (half)
        after(*layer, adapted, static_cast<const bf16*>(attended), static_cast<const bf16*>(x),
              static_cast<bf16*>(y), rows, threads);
    else
        after(*layer, adapted, static_cast<const float*>(attended), static_cast<const float*>(x),
              static_cast<float*>(y), rows, threads);
}

// What adapters (`slots` of the tokens, -1: none) add to a layer's product y, for rows that lie
// `x_stride` and `y_stride` numbers apart.
void llmos_adapt(const Stack* stack, const int32_t* slots, const void* x, int64_t x_stride, void* y,
                 int64_t y_stride, int64_t rows, int half, int threads) {
    const int64_t numbers = rows * stack->rank * (stack->k + stack->n);
#pragma omp parallel for num_threads(threads) if (numbers > WORTH_SHARING)
    for (int64_t r = 0; r < rows; ++r) {
        if (slots[r] < 0) continue;
        if (half)
            adapt(*stack, slots[r], static_cast<const bf16*>(x) + r * x_stride,
                  static_cast<bf16*>(y) + r * y_stride);
        else
            adapt(*stack, slots[r], static_cast<const float*>(x) + r * x_stride,
                  static_cast<float*>(y) + r * y_stride);
    }
}

// RMSNorm of each row.
void llmos_norm(const void* x, const void* weight, double epsilon, void* y, int64_t rows,
                int64_t size, int half) {
    for (int64_t r = 0; r < rows; ++r)
        if (half)
            normed(static_cast<const bf16*>(x) + r * size, weight, epsilon, size,
                   static_cast<bf16*>(y) + r * size);
        else
            normed(static_cast<const float*>(x) + r * size, weight, epsilon, size,
                   static_cast<float*>(y) + r * size);
}

// Some outputs' weights as rows: an embedding that shares its numbers with the last layer. -> how
// many were made: fewer than `rows` where an output is not there.
int64_t llmos_rows(const Matrix* w, const int64_t* outputs, void* y, int64_t rows, int half) {
    for (int64_t r = 0; r < rows; ++r) {
        if (outputs[r] < 0 || outputs[r] >= w->n) return r;
        if (half)
            row(*w, outputs[r], static_cast<bf16*>(y) + r * w->k);
        else
            row(*w, outputs[r], static_cast<float*>(y) + r * w->k);
    }
    return rows;
}
}
