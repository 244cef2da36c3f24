// A residual LSTM for training on a CPU, x + linear(lstm(norm(x))): forward and backward pass. cpu_lstm.py uses the C
// interface.
//
// A block of sequences is processed through all steps before the next block, so that its states and the weights stay in
// the nearest caches. Everything else is computed while the rows of a step are in the cache, and the activation of a
// gate while its sum is in registers.

#include <omp.h>

#include "vectors.h"

constexpr int MAX_SIZE = 256;     // of channels and of units
constexpr int64_t CHUNK = 96;     // rows whose gradients stay in the cache until those of the weights are computed
constexpr float EPSILON = 1e-5f;  // as in the layer normalisation of torch

extern "C" int32_t vector_width() { return WIDTH; }
extern "C" const char* instructions() { return INSTRUCTIONS; }

// Sequence n of x begins at float n / inner * outer_stride + n % inner * inner_stride. Each step has `channels` floats.
struct Sizes {
    int64_t steps, sequences, inner, outer_stride, inner_stride, step_stride, channels, units;
    int32_t directions, threads;
};

// Matrices are row-major: N sequences, S steps, D channels, H units. They have a leading axis of directions unless the
// comment says otherwise. A group is WIDTH units. Gates are ordered by group, [H / WIDTH, 4, WIDTH], and within a group
// in the order of torch: i, f, g, o.
struct Weights {
    const float* gates;        // [4 H, D + H], the columns of the input first
    const float* bias;         // [4 H]
    const float* linear;       // [D, H]
    const float* linear_bias;  // [D], without directions
};

// The values that the backward pass needs. A block of sequences is contiguous, ordered by step and then by sequence;
// `first` sequences come before it.
struct Kept {
    float* normal;     // [N S, D], normalised x; without directions
    float* deviation;  // [N S], inverse deviation of x; without directions
    float* gates;      // [N S, 4 H]
    float* hidden;     // [N (S + 1), H], in the order of x; the initial state comes first or, if backward, last
    float* cells;      // as hidden
};

template <int R>
static void rows_of(const Sizes& sizes, int64_t first, int64_t (&base)[R]) {
    for (int64_t r = 0; r < R; r++)
        base[r] = (first + r) / sizes.inner * sizes.outer_stride + (first + r) % sizes.inner * sizes.inner_stride;
}

static inline void normalise(const float* x, int64_t size, float* normal, float* deviation) {
    Vector total{};
    for (int64_t d = 0; d < size; d += WIDTH) total += load(x + d);
    const float mean = sum(total) / size;
    Vector squares{};
    for (int64_t d = 0; d < size; d += WIDTH) {
        const Vector difference = load(x + d) - mean;
        squares += difference * difference;
    }
    *deviation = 1 / __builtin_sqrtf(sum(squares) / size + EPSILON);
    for (int64_t d = 0; d < size; d += WIDTH) store(normal + d, (load(x + d) - mean) * *deviation);
}

template <int R>
static void forward_rows(const Sizes& sizes, int64_t first, const float* x, const float* h0, const float* c0,
                         const float* const* gate_weights, const float* const* linear_weights, const Weights& weights,
                         const Kept& kept, float* y, float* hn, float* cn) {
    const int64_t N = sizes.sequences, S = sizes.steps, D = sizes.channels, H = sizes.units;
    int64_t base[R];
    rows_of(sizes, first, base);
    float *normal = kept.normal + first * S * D, *deviation = kept.deviation + first * S;
    for (int64_t direction = 0; direction < sizes.directions; direction++) {
        float* gates = kept.gates + (direction * N + first) * S * 4 * H;
        float* hidden = kept.hidden + (direction * N + first) * (S + 1) * H;
        float* cells = kept.cells + (direction * N + first) * (S + 1) * H;
        const float* bias = weights.bias + direction * 4 * H;
        // The offsets of the states after and before a step.
        const int64_t after = direction == 0, before = 1 - after;
        const int64_t start = direction == 0 ? 0 : S, end = S - start;
        std::memcpy(hidden + start * R * H, h0 + (direction * N + first) * H, R * H * sizeof(float));
        std::memcpy(cells + start * R * H, c0 + (direction * N + first) * H, R * H * sizeof(float));
        for (int64_t s = 0; s < S; s++) {
            const int64_t step = direction == 0 ? s : S - 1 - s;
            const float *inputs[R], *states[R], *fresh[R];
            for (int64_t r = 0; r < R; r++) {
                const int64_t row = step * R + r;
                if (direction == 0)
                    normalise(x + base[r] + step * sizes.step_stride, D, normal + row * D, deviation + row);
                inputs[r] = normal + row * D;
                states[r] = hidden + ((step + before) * R + r) * H;
                fresh[r] = hidden + ((step + after) * R + r) * H;
            }
            for (int64_t g = 0; g < H / WIDTH; g++) {
                Vector sums[R][4];
                for (int q = 0; q < 4; q++)
                    for (int r = 0; r < R; r++) sums[r][q] = load(bias + (g * 4 + q) * WIDTH);
                const float* packed = gate_weights[direction] + g * 4 * WIDTH * (D + H);
                multiply<R, 4>(inputs, D, packed, 4 * WIDTH, sums);
                multiply<R, 4>(states, H, packed + D * 4 * WIDTH, 4 * WIDTH, sums);
                for (int64_t r = 0; r < R; r++) {
                    const Vector i = sigmoid(sums[r][0]), f = sigmoid(sums[r][1]), c = tangent(sums[r][2]),
                                 o = sigmoid(sums[r][3]);
                    const int64_t now = ((step + after) * R + r) * H + g * WIDTH;
                    const Vector next = f * load(cells + ((step + before) * R + r) * H + g * WIDTH) + i * c;
                    store(cells + now, next);
                    store(hidden + now, o * tangent(next));
                    float* own = gates + (step * R + r) * 4 * H + g * 4 * WIDTH;
                    store(own, i), store(own + WIDTH, f), store(own + 2 * WIDTH, c), store(own + 3 * WIDTH, o);
                }
            }
            const int64_t offset = step * sizes.step_stride;
            product<R>(
                fresh, H, linear_weights[direction], D,
                [&](int r, int64_t column) {
                    const int64_t at = base[r] + offset + column;
                    return direction == 0 ? load(x + at) + load(weights.linear_bias + column) : load(y + at);
                },
                [&](int r, int64_t column, Vector sums) { store(y + base[r] + offset + column, sums); });
        }
        std::memcpy(hn + (direction * N + first) * H, hidden + end * R * H, R * H * sizeof(float));
        std::memcpy(cn + (direction * N + first) * H, cells + end * R * H, R * H * sizeof(float));
    }
}

struct Gradients {
    const float *dy, *dhn, *dcn;  // gradients of the outputs; dhn and dcn can be null
    float *dx, *dh0, *dc0;
    // The gradients of the weights in this thread, which are added to: [directions, 4 H, D + H], [directions, 4 H],
    // [directions, D, H], [D].
    float* weights;
};

template <int R>
static void backward_rows(const Sizes& sizes, int64_t first, const float* const* gate_weights,
                          const float* const* linear_weights, const Kept& kept, const Gradients& gradients,
                          float* gate_sums, float* outputs) {
    const int64_t N = sizes.sequences, S = sizes.steps, D = sizes.channels, H = sizes.units;
    const int64_t chunk = std::max<int64_t>(1, CHUNK / R);
    int64_t base[R];
    rows_of(sizes, first, base);
    const float *normal = kept.normal + first * S * D, *deviation = kept.deviation + first * S;
    float* const linear_bias = gradients.weights + sizes.directions * (4 * H * (D + H) + 4 * H + D * H);
    alignas(64) float dh[R][MAX_SIZE], dc[R][MAX_SIZE], dnormal[R][MAX_SIZE];
    for (int64_t direction = 0; direction < sizes.directions; direction++) {
        const float* gates = kept.gates + (direction * N + first) * S * 4 * H;
        const float* hidden = kept.hidden + (direction * N + first) * (S + 1) * H;
        const float* cells = kept.cells + (direction * N + first) * (S + 1) * H;
        float* const dgates = gradients.weights + direction * 4 * H * (D + H);
        float* const dbias = gradients.weights + sizes.directions * 4 * H * (D + H) + direction * 4 * H;
        float* const dlinear = gradients.weights + sizes.directions * (4 * H * (D + H) + 4 * H) + direction * D * H;
        const int64_t after = direction == 0, before = 1 - after;
        const int64_t states = (direction * N + first) * H;
        for (int64_t r = 0; r < R; r++) {
            for (int64_t u = 0; u < H; u += WIDTH) {
                store(&dh[r][u], gradients.dhn ? load(gradients.dhn + states + r * H + u) : Vector{});
                store(&dc[r][u], gradients.dcn ? load(gradients.dcn + states + r * H + u) : Vector{});
            }
        }
        for (int64_t left = S; left > 0; left -= chunk) {
            const int64_t count = std::min(chunk, left);
            const int64_t lowest = direction == 0 ? left - count : S - left;  // the first step of the chunk
            for (int64_t s = 0; s < count; s++) {
                const int64_t step = direction == 0 ? left - 1 - s : lowest + s;
                const float *own_outputs[R], *own_sums[R];
                for (int64_t r = 0; r < R; r++) {
                    const int64_t row = (step - lowest) * R + r;
                    float* copy = outputs + row * D;
                    const float* dy = gradients.dy + base[r] + step * sizes.step_stride;
                    for (int64_t d = 0; d < D; d += WIDTH) {
                        store(copy + d, load(dy + d));
                        if (direction == 0) store(linear_bias + d, load(linear_bias + d) + load(dy + d));
                    }
                    own_outputs[r] = copy;
                    own_sums[r] = gate_sums + row * 4 * H;
                }
                product<R>(
                    own_outputs, D, linear_weights[direction], H, [&](int r, int64_t u) { return load(&dh[r][u]); },
                    [&](int r, int64_t u, Vector sums) { store(&dh[r][u], sums); });
                for (int64_t g = 0; g < H / WIDTH; g++) {
                    Vector total[4] = {};
                    for (int64_t r = 0; r < R; r++) {
                        const float* own = gates + (step * R + r) * 4 * H + g * 4 * WIDTH;
                        const Vector i = load(own), f = load(own + WIDTH), c = load(own + 2 * WIDTH),
                                     o = load(own + 3 * WIDTH);
                        const Vector squashed = tangent(load(cells + ((step + after) * R + r) * H + g * WIDTH));
                        const Vector past = load(cells + ((step + before) * R + r) * H + g * WIDTH);
                        const Vector d = load(&dh[r][g * WIDTH]);
                        const Vector through = d * o * (1.0f - squashed * squashed) + load(&dc[r][g * WIDTH]);
                        const Vector sums[4] = {through * c * i * (1.0f - i), through * past * f * (1.0f - f),
                                                through * i * (1.0f - c * c), d * squashed * o * (1.0f - o)};
                        store(&dc[r][g * WIDTH], through * f);
                        float* to = gate_sums + ((step - lowest) * R + r) * 4 * H + g * 4 * WIDTH;
                        for (int q = 0; q < 4; q++) {
                            store(to + q * WIDTH, sums[q]);
                            total[q] += sums[q];
                        }
                    }
                    for (int q = 0; q < 4; q++) {
                        float* to = dbias + (g * 4 + q) * WIDTH;
                        store(to, load(to) + total[q]);
                    }
                }
                product<R>(
                    own_sums, 4 * H, gate_weights[direction], D + H, [](int, int64_t) { return Vector{}; },
                    [&](int r, int64_t column, Vector sums) {
                        store(column < D ? &dnormal[r][column] : &dh[r][column - D], sums);
                    });
                for (int64_t r = 0; r < R; r++) {
                    const float* n = normal + (step * R + r) * D;
                    Vector total{}, along{};
                    for (int64_t d = 0; d < D; d += WIDTH) {
                        total += load(&dnormal[r][d]);
                        along += load(&dnormal[r][d]) * load(n + d);
                    }
                    const float mean = sum(total) / D, slope = sum(along) / D, scale = deviation[step * R + r];
                    float* dx = gradients.dx + base[r] + step * sizes.step_stride;
                    const float* residual = direction == 0 ? own_outputs[r] : dx;
                    for (int64_t d = 0; d < D; d += WIDTH)
                        store(dx + d, load(residual + d) + (load(&dnormal[r][d]) - mean - load(n + d) * slope) * scale);
                }
            }
            const int64_t rows = count * R;
            add_transposed_product(gate_sums, 4 * H, normal + lowest * R * D, D, rows, dgates, D + H);
            add_transposed_product(gate_sums, 4 * H, hidden + (lowest + before) * R * H, H, rows, dgates + D, D + H);
            add_transposed_product(outputs, D, hidden + (lowest + after) * R * H, H, rows, dlinear, H);
        }
        for (int64_t r = 0; r < R; r++) {
            std::memcpy(gradients.dh0 + states + r * H, dh[r], H * sizeof(float));
            std::memcpy(gradients.dc0 + states + r * H, dc[r], H * sizeof(float));
        }
    }
}

extern "C" void lstm_forward(const Sizes* sizes, const Weights* weights, const Kept* kept, const float* x,
                             const float* h0, const float* c0, float* y, float* hn, float* cn) {
    const int64_t N = sizes->sequences, D = sizes->channels, H = sizes->units;
    const Buffer packed(sizes->directions * (4 * H * (D + H) + D * H));
    const float *gate_weights[2], *linear_weights[2];
    float* to = packed;
    for (int64_t direction = 0; direction < sizes->directions; direction++) {
        gate_weights[direction] = to;
        pack(weights->gates + direction * 4 * H * (D + H), 1, D + H, D + H, 4 * H, to);
        linear_weights[direction] = to += 4 * H * (D + H);
        pack(weights->linear + direction * D * H, 1, H, H, D, to);
        to += D * H;
    }
#pragma omp parallel for schedule(static) num_threads(sizes->threads)
    for (int64_t n = 0; n < N; n += ROWS)
        with_rows(std::min<int64_t>(ROWS, N - n), [&](auto rows) {
            forward_rows<rows>(*sizes, n, x, h0, c0, gate_weights, linear_weights, *weights, *kept, y, hn, cn);
        });
}

// The gradients of the weights are [threads, …] and must be zeros.
extern "C" void lstm_backward(const Sizes* sizes, const Weights* weights, const Kept* kept, const Gradients* gradients) {
    const int64_t N = sizes->sequences, D = sizes->channels, H = sizes->units;
    const Buffer packed(sizes->directions * (4 * H * (D + H) + D * H));
    const float *gate_weights[2], *linear_weights[2];
    float* to = packed;
    for (int64_t direction = 0; direction < sizes->directions; direction++) {
        gate_weights[direction] = to;
        pack(weights->gates + direction * 4 * H * (D + H), D + H, 1, 4 * H, D + H, to);
        linear_weights[direction] = to += 4 * H * (D + H);
        pack(weights->linear + direction * D * H, H, 1, D, H, to);
        to += D * H;
    }
    const int64_t size = sizes->directions * (4 * H * (D + H) + 4 * H + D * H) + D;
#pragma omp parallel num_threads(sizes->threads)
    {
        const Buffer gate_sums(CHUNK * 4 * H), outputs(CHUNK * D);
        Gradients own = *gradients;
        own.weights += omp_get_thread_num() * size;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += ROWS)
            with_rows(std::min<int64_t>(ROWS, N - n), [&](auto rows) {
                backward_rows<rows>(*sizes, n, gate_weights, linear_weights, *kept, own, gate_sums, outputs);
            });
    }
}
