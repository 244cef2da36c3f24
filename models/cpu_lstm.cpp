// LSTM for training on a CPU: forward pass, backward pass, gradients of the weights. Plain C interface, see cpu_lstm.py.
//
// A block of sequences goes through all of its steps at once, so that its states and the weights stay in the nearest
// caches, and a gate's activation is computed while its sum is still in registers. Vectors are those of GCC and Clang,
// as wide as the processor's: wider ones would be taken apart through memory.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define INSTRUCTIONS "AVX-512"
constexpr int WIDTH = 16, REGISTERS = 32;
#elif defined(__AVX2__) && defined(__FMA__)
#define INSTRUCTIONS "AVX2"
constexpr int WIDTH = 8, REGISTERS = 16;
#elif defined(__ARM_NEON)
#define INSTRUCTIONS "NEON"
constexpr int WIDTH = 4, REGISTERS = 32;
#elif defined(__SSE2__)
#define INSTRUCTIONS "SSE"
constexpr int WIDTH = 4, REGISTERS = 16;
#else
#error "no vectors that this is made for"
#endif
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
constexpr int MOST_UNITS = 256;
constexpr int ROWS = REGISTERS == 32 ? 6 : 3;          // sequences at once; times four gates: 24 of 32, or 12 of 16
constexpr int PRODUCT_ROWS = REGISTERS == 32 ? 8 : 4;  // the same of a product, times two vectors

extern "C" int32_t vector_width() { return WIDTH; }
extern "C" const char* instructions() { return INSTRUCTIONS; }

static inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

static inline Vector exponential(Vector x) {
    // exp(x) = 2^n exp(r), |r| <= ln 2 / 2; the polynomial is that of the Cephes library. NaN stays NaN.
    x = x < -87.0f ? Vector{} - 87.0f : x;
    x = x > 87.0f ? Vector{} + 87.0f : x;
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
    const Vector n = (x * 1.44269504f + ROUND) - ROUND;
    const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = Vector{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
    Vector power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }
static inline Vector tangent(Vector x) { return 2.0f * sigmoid(x + x) - 1.0f; }

// sums[r][z] += sum over k of rows[r][k] * weights[k][z]
template <int R, int Z>
static inline __attribute__((always_inline)) void multiply(const float* const* rows, int64_t depth, const float* weights,
                                                           Vector (&sums)[R][Z]) {
    for (int64_t k = 0; k < depth; k++) {
        Vector w[Z];
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) w[z] = load(weights + (k * Z + z) * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const float value = rows[r][k];
#pragma GCC unroll 4
            for (int z = 0; z < Z; z++) sums[r][z] += value * w[z];
        }
    }
}

struct Sizes {
    int64_t steps, sequences, inputs, units, output_stride;
    int32_t reverse, threads;
};

// Layouts, row-major: x [steps, sequences, inputs]; y [steps, sequences, output_stride], of which this direction writes
// `units` columns; gates [steps, sequences, groups, 4, WIDTH] and cells [steps, sequences, units] are kept for the way back;
// packed weights [groups, depth, 4, WIDTH], gates in torch's order (i, f, g, o), a group being WIDTH units.

template <int R>
static void forward_rows(const Sizes& sizes, int64_t first, const float* x, const float* h0, const float* c0,
                         const float* w_input, const float* w_hidden, const float* bias, float* y, float* gates,
                         float* cells) {
    const int64_t H = sizes.units, D = sizes.inputs, groups = H / WIDTH;
    alignas(64) float hidden[2][R][MOST_UNITS], cell[R][MOST_UNITS];
    for (int r = 0; r < R; r++) {
        std::memcpy(hidden[0][r], h0 + (first + r) * H, H * sizeof(float));
        std::memcpy(cell[r], c0 + (first + r) * H, H * sizeof(float));
    }
    int now = 0;
    for (int64_t t = 0; t < sizes.steps; t++, now = 1 - now) {
        const int64_t row = (sizes.reverse ? sizes.steps - 1 - t : t) * sizes.sequences + first;
        const float *inputs[R], *states[R];
        for (int r = 0; r < R; r++) inputs[r] = x + (row + r) * D, states[r] = hidden[now][r];
        for (int64_t g = 0; g < groups; g++) {
            Vector sums[R][4];
            for (int q = 0; q < 4; q++)
                for (int r = 0; r < R; r++) sums[r][q] = load(bias + (g * 4 + q) * WIDTH);
            multiply<R, 4>(inputs, D, w_input + g * D * 4 * WIDTH, sums);
            multiply<R, 4>(states, H, w_hidden + g * H * 4 * WIDTH, sums);
            for (int r = 0; r < R; r++) {
                const Vector i = sigmoid(sums[r][0]), f = sigmoid(sums[r][1]), c = tangent(sums[r][2]),
                             o = sigmoid(sums[r][3]);
                const Vector next = f * load(&cell[r][g * WIDTH]) + i * c, h = o * tangent(next);
                store(&cell[r][g * WIDTH], next);
                store(&hidden[1 - now][r][g * WIDTH], h);
                store(y + (row + r) * sizes.output_stride + g * WIDTH, h);
                float* kept = gates + (row + r) * 4 * H + g * 4 * WIDTH;
                store(kept, i), store(kept + WIDTH, f), store(kept + 2 * WIDTH, c), store(kept + 3 * WIDTH, o);
                store(cells + (row + r) * H + g * WIDTH, next);
            }
        }
    }
}

// On the way back `gates` become the gradients of the gates' sums. `weights` are [blocks, 4 units, Z, WIDTH]: the columns
// of the input's weights, then of the hidden state's, cut into blocks of Z vectors.
template <int R, int Z>
static void backward_rows(const Sizes& sizes, int64_t first, const float* dy, const float* dcn, const float* c0,
                          const float* weights, const float* cells, float* gates, float* dx, float* dh0, float* dc0) {
    const int64_t H = sizes.units, D = sizes.inputs, groups = H / WIDTH, blocks = (D + H) / (Z * WIDTH);
    alignas(64) float dh[R][MOST_UNITS], dc[R][MOST_UNITS];
    std::memset(dh, 0, sizeof dh);
    for (int r = 0; r < R; r++) std::memcpy(dc[r], dcn + (first + r) * H, H * sizeof(float));
    for (int64_t t = sizes.steps - 1; t >= 0; t--) {
        const int64_t step = sizes.reverse ? sizes.steps - 1 - t : t, before = sizes.reverse ? step + 1 : step - 1;
        const int64_t row = step * sizes.sequences + first;
        const float* sums_of[R];
        for (int r = 0; r < R; r++) {
            float* own = gates + (row + r) * 4 * H;
            sums_of[r] = own;
            const float* past =
                t > 0 ? cells + (before * sizes.sequences + first + r) * H : c0 + (first + r) * H;
            for (int64_t g = 0; g < groups; g++) {
                float* kept = own + g * 4 * WIDTH;
                const Vector i = load(kept), f = load(kept + WIDTH), c = load(kept + 2 * WIDTH),
                             o = load(kept + 3 * WIDTH);
                const Vector squashed = tangent(load(cells + (row + r) * H + g * WIDTH));
                const Vector d = load(dy + (row + r) * sizes.output_stride + g * WIDTH) + load(&dh[r][g * WIDTH]);
                const Vector through = d * o * (1.0f - squashed * squashed) + load(&dc[r][g * WIDTH]);
                store(kept, through * c * i * (1.0f - i));
                store(kept + WIDTH, through * load(past + g * WIDTH) * f * (1.0f - f));
                store(kept + 2 * WIDTH, through * i * (1.0f - c * c));
                store(kept + 3 * WIDTH, d * squashed * o * (1.0f - o));
                store(&dc[r][g * WIDTH], through * f);
            }
        }
        for (int64_t block = 0; block < blocks; block++) {
            Vector sums[R][Z];
            for (int r = 0; r < R; r++)
                for (int z = 0; z < Z; z++) sums[r][z] = Vector{};
            multiply<R, Z>(sums_of, 4 * H, weights + block * 4 * H * Z * WIDTH, sums);
            for (int r = 0; r < R; r++)
                for (int z = 0; z < Z; z++) {
                    const int64_t column = (block * Z + z) * WIDTH;
                    store(column < D ? dx + (row + r) * D + column : &dh[r][column - D], sums[r][z]);
                }
        }
    }
    for (int r = 0; r < R; r++) {
        std::memcpy(dh0 + (first + r) * H, dh[r], H * sizeof(float));
        std::memcpy(dc0 + (first + r) * H, dc[r], H * sizeof(float));
    }
}

extern "C" void lstm_forward(const Sizes* sizes, const float* x, const float* h0, const float* c0, const float* w_input,
                             const float* w_hidden, const float* bias, float* y, float* gates, float* cells) {
    const int64_t count = sizes->sequences;
#pragma omp parallel for schedule(static) num_threads(sizes->threads)
    for (int64_t n = 0; n < count; n += ROWS) {
        if (n + ROWS <= count)
            forward_rows<ROWS>(*sizes, n, x, h0, c0, w_input, w_hidden, bias, y, gates, cells);
        else
            for (int64_t last = n; last < count; last++)
                forward_rows<1>(*sizes, last, x, h0, c0, w_input, w_hidden, bias, y, gates, cells);
    }
}

template <int Z>
static void backward(const Sizes& sizes, const float* dy, const float* dcn, const float* c0, const float* weights,
                     const float* cells, float* gates, float* dx, float* dh0, float* dc0) {
    const int64_t count = sizes.sequences;
#pragma omp parallel for schedule(static) num_threads(sizes.threads)
    for (int64_t n = 0; n < count; n += ROWS) {
        if (n + ROWS <= count)
            backward_rows<ROWS, Z>(sizes, n, dy, dcn, c0, weights, cells, gates, dx, dh0, dc0);
        else
            for (int64_t last = n; last < count; last++)
                backward_rows<1, Z>(sizes, last, dy, dcn, c0, weights, cells, gates, dx, dh0, dc0);
    }
}

extern "C" void lstm_backward(const Sizes* sizes, const float* dy, const float* dcn, const float* c0,
                              const float* weights, int32_t vectors, const float* cells, float* gates, float* dx,
                              float* dh0, float* dc0) {
    auto run = vectors == 4 ? backward<4> : vectors == 2 ? backward<2> : backward<1>;
    run(*sizes, dy, dcn, c0, weights, cells, gates, dx, dh0, dc0);
}

template <int R, int Z>
static void product_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, float* c,
                          int64_t c_stride) {
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

// c [p, q] += a^T b of a [rows, p] and b [rows, q], far more rows than columns; p and q multiples of 16.
extern "C" void transposed_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                                   int64_t p, int64_t q, float* c, int32_t threads) {
    constexpr int64_t CHUNK = 256;  // rows that stay in the cache while all of c is gone through
    const int64_t parts = std::min<int64_t>(threads, p / PRODUCT_ROWS);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t begin = part * (p / PRODUCT_ROWS) / parts * PRODUCT_ROWS, end = (part + 1) * (p / PRODUCT_ROWS) / parts * PRODUCT_ROWS;
        for (int64_t k = 0; k < rows; k += CHUNK) {
            const int64_t count = std::min(CHUNK, rows - k);
            for (int64_t column = 0; column < q;) {
                const bool two = q - column >= 2 * WIDTH;
                auto block = two ? product_block<PRODUCT_ROWS, 2> : product_block<PRODUCT_ROWS, 1>;
                for (int64_t row = begin; row < end; row += PRODUCT_ROWS)
                    block(a + k * a_stride + row, a_stride, b + k * b_stride + column, b_stride, count,
                          c + row * q + column, q);
                column += two ? 2 * WIDTH : WIDTH;
            }
        }
    }
}
