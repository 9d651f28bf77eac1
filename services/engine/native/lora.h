// What LoRA adapters add to products: y += B (A x), each token with the adapter of its own slot.

#pragma once

#include <cstdint>

#include "avx512.h"

extern "C" {

// Adapters of one linear layer, stacked: a (slots, rank, k), b (slots, rank, n), of the tokens'
// type. `a` null: they do not change this layer.
struct Stack {
    const void *a, *b;
    int64_t rank, k, n;
};

// Those of the seven linear layers of a decoder's layer.
struct Stacks {
    Stack q, k, v, o, gate, up, down;
};

// Some adapters, and which of them (-1: none) each token of the row has; then others.
struct Adapted {
    const Stacks* stacks;
    const int32_t* slots;
    const Adapted* next;
};
}

namespace {

constexpr int64_t MOST_RANK = 512;

template <int COUNT, typename T>
inline void dots(const T* a, const T* x, int64_t k, float* out) {
    __m512 sums[COUNT];
    UNROLL for (int r = 0; r < COUNT; ++r) sums[r] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 16) {
        const __mmask16 m = mask(k - i);
        const __m512 token = load(x + i, m);
        UNROLL for (int r = 0; r < COUNT; ++r)
            sums[r] = _mm512_fmadd_ps(token, load(a + r * k + i, m), sums[r]);
    }
    UNROLL for (int r = 0; r < COUNT; ++r) out[r] = _mm512_reduce_add_ps(sums[r]);
}

// y (n) += B (A x) for one token of a slot. Sums are float32, and rounded once.
template <typename T, typename Y>
void adapt(const Stack& stack, int64_t slot, const T* x, Y* y) {
    const int64_t rank = stack.rank, k = stack.k, n = stack.n;
    const T* a = static_cast<const T*>(stack.a) + slot * rank * k;
    const T* b = static_cast<const T*>(stack.b) + slot * rank * n;
    float small[MOST_RANK];
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) dots<4>(a + r * k, x, k, small + r);
    for (; r < rank; ++r) dots<1>(a + r * k, x, k, small + r);
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask16 m = mask(n - i), m2 = mask(n - i - 16);
        __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
        for (r = 0; r < rank; ++r) {
            const __m512 part = _mm512_set1_ps(small[r]);
            first = _mm512_fmadd_ps(part, load(b + r * n + i, m), first);
            second = _mm512_fmadd_ps(part, load(b + r * n + i + 16, m2), second);
        }
        store(y + i, _mm512_add_ps(load(y + i, m), first), m);
        store(y + i + 16, _mm512_add_ps(load(y + i + 16, m2), second), m2);
    }
}

// The same for token `row`, with all that it has; -> whether it has any.
template <typename T, typename Y>
bool adapt_all(const Adapted* adapted, Stack Stacks::*which, int64_t row, const T* x, Y* y) {
    bool any = false;
    for (; adapted; adapted = adapted->next) {
        const Stack& stack = adapted->stacks->*which;
        if (!stack.a || adapted->slots[row] < 0) continue;
        adapt(stack, adapted->slots[row], x, y);
        any = true;
    }
    return any;
}

}  // namespace
