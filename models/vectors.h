// Vectors of floats, with the vector extensions of GCC and Clang. They are as wide as those of the processor, because
// the compiler would split wider ones through memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#define INSTRUCTIONS "AVX-512"
constexpr int WIDTH = 16, REGISTERS = 32;
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define INSTRUCTIONS "AVX2"
constexpr int WIDTH = 8, REGISTERS = 16;
#elif defined(__ARM_NEON)
#define INSTRUCTIONS "NEON"
constexpr int WIDTH = 4, REGISTERS = 32;
#elif defined(__SSE2__)
#include <immintrin.h>
#define INSTRUCTIONS "SSE"
constexpr int WIDTH = 4, REGISTERS = 16;
#else
#error "this processor has no supported vector instructions"
#endif

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

// The rows that a product computes together. With four vectors each, they use 24 of 32 or 12 of 16 registers.
constexpr int ROWS = REGISTERS == 32 ? 6 : 3;

static inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

static inline float sum(Vector x) {
    Quad quads[WIDTH / 4];
    std::memcpy(quads, &x, sizeof x);
    for (int i = 1; i < WIDTH / 4; i++) quads[0] += quads[i];
    return (quads[0][0] + quads[0][2]) + (quads[0][1] + quads[0][3]);
}

static inline Vector inverse(Vector x) {
    // An estimate and a step of Newton's method, because a division takes as long as eight or more vector products.
#if defined(__AVX512F__)
    const Vector estimate = _mm512_rcp14_ps(x);
#elif defined(__AVX2__) && defined(__FMA__)
    const Vector estimate = _mm256_rcp_ps(x);
#elif defined(__SSE2__)
    const Vector estimate = _mm_rcp_ps(x);
#else
    return 1.0f / x;
#endif
#if !defined(__ARM_NEON)
    return estimate + estimate * (1.0f - x * estimate);
#endif
}

static inline Vector power_of_two(Vector x) {
    // Computes 2^n 2^f with |f| <= 1/2 and the polynomial of the Cephes library. NaN stays NaN.
    x = x < -126.0f ? Vector{} - 126.0f : x;
    x = x > 126.0f ? Vector{} + 126.0f : x;
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23; adding it removes the fraction
    const Vector n = (x + ROUND) - ROUND, f = x - n;
    Vector p = Vector{} + 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    Integers bits;
    std::memcpy(&bits, &p, sizeof p);
    bits += __builtin_convertvector(n, Integers) << 23;
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

constexpr float LOG2_E = 1.44269504f;
static inline Vector exponential(Vector x) { return power_of_two(x * LOG2_E); }
static inline Vector sigmoid(Vector x) { return inverse(1.0f + power_of_two(x * -LOG2_E)); }
static inline Vector tangent(Vector x) { return 2.0f * inverse(1.0f + power_of_two(x * (-2 * LOG2_E))) - 1.0f; }

// An array of floats that is aligned to cache lines.
class Buffer {
   public:
    explicit Buffer(int64_t size) : data_(static_cast<float*>(std::aligned_alloc(64, (4 * size + 63) / 64 * 64))) {
        if (!data_) std::abort();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator float*() const { return data_; }

   private:
    float* data_;
};

// Calls `block` with `rows`, from 1 to ROWS, as a compile-time constant.
template <int R = ROWS, typename Block>
static inline void with_rows(int64_t rows, Block block) {
    if (rows == R)
        block(std::integral_constant<int, R>{});
    else if constexpr (R > 1)
        with_rows<R - 1>(rows, block);
}

// Computes sums[r][z] += sum over k of rows[r][k] * weights[k][z]. The rows of `weights` are `stride` floats apart.
template <int R, int Z>
static inline __attribute__((always_inline)) void multiply(const float* const* rows, int64_t depth, const float* weights,
                                                           int64_t stride, Vector (&sums)[R][Z]) {
    for (int64_t k = 0; k < depth; k++) {
        Vector w[Z];
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) w[z] = load(weights + k * stride + z * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const float value = rows[r][k];
#pragma GCC unroll 4
            for (int z = 0; z < Z; z++) sums[r][z] += value * w[z];
        }
    }
}

// Returns how many vectors of columns are processed together if `columns` columns of a matrix remain.
static inline int vectors_of(int64_t columns) { return columns >= 4 * WIDTH ? 4 : columns >= 2 * WIDTH ? 2 : 1; }

// Packs a matrix [depth, columns] with any strides for `product`: into blocks of columns, [depth, vectors, WIDTH] each.
static inline void pack(const float* from, int64_t depth_stride, int64_t column_stride, int64_t depth, int64_t columns,
                        float* to) {
    for (int64_t column = 0; column < columns;) {
        const int64_t count = vectors_of(columns - column) * WIDTH;
        for (int64_t k = 0; k < depth; k++)
            for (int64_t j = 0; j < count; j++) *to++ = from[k * depth_stride + (column + j) * column_stride];
        column += count;
    }
}

template <int R, int Z, typename Start, typename Finish>
static inline __attribute__((always_inline)) void product_block(const float* const* rows, int64_t depth,
                                                                const float* weights, int64_t column, Start start,
                                                                Finish finish) {
    Vector sums[R][Z];
    for (int r = 0; r < R; r++)
        for (int z = 0; z < Z; z++) sums[r][z] = start(r, column + z * WIDTH);
    multiply<R, Z>(rows, depth, weights + depth * column, Z * WIDTH, sums);
    for (int r = 0; r < R; r++)
        for (int z = 0; z < Z; z++) finish(r, column + z * WIDTH, sums[r][z]);
}

// Multiplies R rows by a packed matrix. start(row, column) returns the initial sums, finish(row, column, sums) receives
// the results.
template <int R, typename Start, typename Finish>
static inline __attribute__((always_inline)) void product(const float* const* rows, int64_t depth, const float* weights,
                                                          int64_t columns, Start start, Finish finish) {
    int64_t column = 0;
    for (; columns - column >= 4 * WIDTH; column += 4 * WIDTH)
        product_block<R, 4>(rows, depth, weights, column, start, finish);
    if (columns - column >= 2 * WIDTH) {
        product_block<R, 2>(rows, depth, weights, column, start, finish);
        column += 2 * WIDTH;
    }
    if (columns - column >= WIDTH) product_block<R, 1>(rows, depth, weights, column, start, finish);
}

template <int R, int Z>
static inline void transposed_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                                    float* c, int64_t c_stride) {
    Vector sums[R][Z];
    for (int r = 0; r < R; r++)
        for (int z = 0; z < Z; z++) sums[r][z] = load(c + r * c_stride + z * WIDTH);
    for (int64_t k = 0; k < rows; k++) {
        Vector w[Z];
#pragma GCC unroll 2
        for (int z = 0; z < Z; z++) w[z] = load(b + k * b_stride + z * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const float value = a[k * a_stride + r];
#pragma GCC unroll 2
            for (int z = 0; z < Z; z++) sums[r][z] += value * w[z];
        }
    }
    for (int r = 0; r < R; r++)
        for (int z = 0; z < Z; z++) store(c + r * c_stride + z * WIDTH, sums[r][z]);
}

// Computes c [p, q] += a^T b for a [rows, p] and b [rows, q]. The rows must fit into the cache, and p and q must be
// multiples of 16.
static inline void add_transposed_product(const float* a, int64_t p, const float* b, int64_t q, int64_t rows, float* c,
                                          int64_t c_stride) {
    constexpr int R = REGISTERS == 32 ? 8 : 4;
    for (int64_t column = 0; column < q;) {
        const bool two = q - column >= 2 * WIDTH;
        auto block = two ? transposed_block<R, 2> : transposed_block<R, 1>;
        for (int64_t row = 0; row < p; row += R)
            block(a + row, p, b + column, q, rows, c + row * c_stride + column, c_stride);
        column += two ? 2 * WIDTH : WIDTH;
    }
}
