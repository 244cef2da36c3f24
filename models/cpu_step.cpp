// One frame of a network on a CPU: of the large one with its hint encoder, for several streams, or of the device's network,
// for one stream. cpu_step.py uses the C interface.
//
// Every thread takes a group of streams through all layers, so that their features stay in the nearest caches. Streams
// share the weights that are loaded for a group.

#include <cmath>
#include <memory>

#include "vectors.h"

namespace {

constexpr float EPSILON = 1e-5f;  // as in the layer normalisation of torch

// Rows of features are padded to whole vectors: D channels take `padded(D)` floats. The padding is always zero.
int64_t padded(int64_t size) { return (size + WIDTH - 1) / WIDTH * WIDTH; }

}  // namespace

struct AttentionSizes {
    int64_t heads, key, value, window;  // no heads if there is no attention
};

struct LevelSizes {
    float unit, fading, floor, reference, silence, inaudible;  // see models/level.py
};

struct StepSizes {
    int64_t microphones, n_fft, chunk, bins, outputs, hints, channels, units, blocks;
    AttentionSizes attention, fusion;
    int64_t delay;  // of hints; negative if they are used on arrival
    int64_t ramp;   // merged frames with which fusion has its full strength; on arrival
    LevelSizes level;
};

// Matrices [depth, columns] are packed for `product`, and their columns are padded to whole vectors. Affine parts of
// normalisations before an LSTM are included in its weights.
struct AttentionWeights {
    const float *query, *query_bias, *query_slopes;              // [D, L K], slopes of PReLU by column
    const float *key_value, *key_value_bias, *key_value_slopes;  // [D, L K + L V]
    const float *query_scale, *query_shift, *key_scale, *key_shift;  // [L, F K]
    const float *value_scale, *value_shift;                          // [L, F V]
    const float *merge, *merge_bias, *merge_slope, *merge_scale, *merge_shift;  // the last two [F, padded(D)]
};

struct FusionWeights {
    AttentionWeights attention;
    const float *film, *film_bias;       // [hints, 2 padded(D)]: factors, then summands
    const float *age_bias, *age_scale;   // [L, W] and [W], on arrival
};

// The columns of gates are ordered by group of WIDTH units, as in cpu_lstm.cpp.
struct BlockWeights {
    const float *intra_input[2], *intra_hidden[2], *intra_bias[2], *intra_linear[2], *intra_linear_bias;
    const float *inter_input, *inter_hidden, *inter_bias, *inter_linear, *inter_linear_bias;
    AttentionWeights attention;
    FusionWeights fusion;  // after this block
};

struct StepWeights {
    const float* analysis;                   // [n_fft, 2 F]
    const float *input, *input_bias;         // three matrices [3 C, D], one for each frame
    const float *input_scale, *input_shift;  // [padded(D)]
    const float *output, *output_bias;
    const float *encoder, *encoder_bias;     // of the large network
    const float* synthesis;                  // [2 F, n_fft], of the device's network
    const BlockWeights* blocks;
};

struct Rings {
    float *keys, *values;  // [slots, L, W, F K] and [slots, L, W, F V]
};

struct BlockStates {
    float *hidden, *cell;        // [slots, F, H]
    Rings attention;
    const float *weight, *bias;  // [slots, F, D], of the speaker after this block; null without one
    Rings fusion;                // null without hints after this block
    float* features;             // that wait for their hints, [delay or W, F, D]
};

struct StepStates {
    int64_t* frames;  // [slots]
    float* level;     // [slots]; null without a running level
    float *input, *output;  // the previous two frames, [slots, 2, F, C]
    float* encoder;         // the same, of the large network
    float* overlap;         // [S', n_fft - chunk], of the device's network
    uint8_t* arrived;       // [W], whether the frame in each row is merged; on arrival
    const BlockStates* blocks;
};

namespace {

Vector load_part(const float* from, int64_t count) {
    if (count >= WIDTH) return load(from);
    Vector value{};
    std::memcpy(&value, from, count * sizeof(float));
    return value;
}

void store_part(float* to, Vector value, int64_t count) {
    std::memcpy(to, &value, std::min<int64_t>(count, WIDTH) * sizeof(float));
}

// Calls `block` for blocks of up to ROWS of `count` rows.
template <typename Block>
void for_rows(int64_t count, Block block) {
    for (int64_t first = 0; first < count; first += ROWS)
        with_rows(std::min<int64_t>(ROWS, count - first), [&](auto rows) { block(first, rows); });
}

// Computes out [count, columns] = start + x [count, depth] * weights. start(row, column) returns the initial sums.
template <typename Start>
void multiply_rows(const float* x, int64_t x_stride, int64_t count, int64_t depth, const float* weights, int64_t columns,
                   float* out, Start start) {
    for_rows(count, [&](int64_t first, auto rows) {
        const float* from[rows];
        for (int64_t r = 0; r < rows; r++) from[r] = x + (first + r) * x_stride;
        product<rows>(
            from, depth, weights, columns, [&](int r, int64_t column) { return start(first + r, column); },
            [&](int r, int64_t column, Vector sums) { store(out + (first + r) * columns + column, sums); });
    });
}

// Normalises `size` values. finish(index, normal, count) receives `count` of them, a vector or the rest.
template <typename Finish>
void normalise(const float* x, int64_t size, Finish finish) {
    Vector total{};
    for (int64_t d = 0; d < size; d += WIDTH) total += load_part(x + d, size - d);
    const float mean = sum(total) / size;
    Vector squares{};
    for (int64_t d = 0; d < size; d += WIDTH) {
        const Vector difference = load_part(x + d, size - d) - mean;
        squares += difference * difference;
    }
    const int64_t beyond = padded(size) - size;  // lanes that contain -mean
    const float variance = (sum(squares) - beyond * mean * mean) / size;
    const float scale = 1 / std::sqrt(std::max(variance, 0.0f) + EPSILON);
    for (int64_t d = 0; d < size; d += WIDTH) finish(d, (load_part(x + d, size - d) - mean) * scale, size - d);
}

float dot(const float* a, const float* b, int64_t size) {
    Vector total[2] = {};
    int64_t d = 0;
    for (; d + 2 * WIDTH <= size; d += 2 * WIDTH) {
        total[0] += load(a + d) * load(b + d);
        total[1] += load(a + d + WIDTH) * load(b + d + WIDTH);
    }
    for (; d < size; d += WIDTH) total[0] += load_part(a + d, size - d) * load_part(b + d, size - d);
    return sum(total[0] + total[1]);
}

Vector prelu(Vector x, Vector slope) { return x > 0.0f ? x : x * slope; }

// The gates of WIDTH units of R rows: sums become the new cells and the new hidden states.
template <int R>
inline __attribute__((always_inline)) void activate(Vector (&sums)[R][4], Vector (&cells)[R], Vector (&hidden)[R]) {
    for (int r = 0; r < R; r++) {
        const Vector i = sigmoid(sums[r][0]), f = sigmoid(sums[r][1]), c = tangent(sums[r][2]), o = sigmoid(sums[r][3]);
        cells[r] = f * cells[r] + i * c;
        hidden[r] = o * tangent(cells[r]);
    }
}

// The features and everything else that a thread needs for up to ROWS streams.
struct Scratch {
    explicit Scratch(const StepSizes& s)
        : spectrum(2 * s.bins * s.microphones + 4 * WIDTH),
          transformed(ROWS * s.bins * 4 * padded(std::max(s.units, s.hints)) + padded(2 * s.bins) + padded(s.n_fft)),
          frames(3 * (s.bins + 2) * std::max({s.channels, 2 * s.microphones, s.outputs})),
          x(ROWS * s.bins * padded(s.channels)),
          normal(s.bins * 2 * padded(s.channels)),
          gates(ROWS * s.bins * 4 * padded(s.units)),
          hidden(2 * ROWS * s.bins * padded(s.units)),
          cells(ROWS * padded(s.units)),
          projected(s.bins * std::max(columns(s.attention), columns(s.fusion))),
          head(s.bins * std::max({s.attention.key, s.attention.value, s.fusion.key, s.fusion.value}) + WIDTH),
          query(std::max(s.attention.key, s.fusion.key) * s.bins + WIDTH),
          scores(std::max(s.attention.window, s.fusion.window) + WIDTH),
          attended(s.bins * std::max(s.attention.value, s.fusion.value) + WIDTH),
          merged(s.bins * padded(s.channels)),
          hint(s.bins * s.hints + WIDTH),
          results(s.bins * padded(std::max(s.outputs, s.hints))) {}
    static int64_t columns(const AttentionSizes& s) { return padded(s.heads * (s.key + s.value)); }
    Buffer spectrum, transformed, frames, x, normal, gates, hidden, cells, projected, head, query, scores, attended,
        merged, hint, results;
};

class Step {
   public:
    Step(const StepSizes& sizes, const StepWeights& weights, const StepStates& states, Scratch& scratch)
        : s_(sizes), w_(weights), states_(states), t_(scratch) {}

    // Runs R streams through the large network. `samples` are [R, M, n_fft], `hints` are [R, hint channels, F].
    template <int R>
    void encode(const int64_t* slots, const float* samples, float* hints) {
        blocks<R>(slots, samples, [](int64_t) {});
        for (int r = 0; r < R; r++) {
            const float* embedding = output(slots[r], x(r));
            const int64_t stride = padded(s_.hints), outputs = s_.outputs;
            const float* encoded = convolve(states_.encoder + slots[r] * 2 * s_.bins * outputs, embedding, padded(outputs),
                                            outputs, w_.encoder, w_.encoder_bias, s_.hints, t_.transformed);
            float* to = hints + r * s_.hints * s_.bins;
            for (int64_t channel = 0; channel < s_.hints; channel++)
                for (int64_t f = 0; f < s_.bins; f++) to[channel * s_.bins + f] = encoded[f * stride + channel];
            states_.frames[slots[r]]++;
        }
    }

    // Runs the device's network. `samples` are [M, n_fft], `estimate` is [S', chunk]. `hints` are `count` hints
    // [hint channels, F] of the given ages.
    void estimate(const float* samples, const float* const* hints, const int64_t* ages, int64_t count, float* estimate) {
        const int64_t slot = 0;
        blocks<1>(&slot, samples, [&](int64_t block) {
            const BlockStates& states = states_.blocks[block];
            if (!states.fusion.keys) return;
            if (s_.delay < 0)
                fuse_arrived(w_.blocks[block].fusion, states, hints, ages, count);
            else
                fuse_delayed(w_.blocks[block].fusion, states, count ? hints[0] : nullptr);
        });
        if (states_.arrived) {
            for (int64_t i = 0; i < count; i++) states_.arrived[row_of(ages[i])] = 1;
            states_.arrived[row_of(0)] = 0;
        }
        synthesise(output(0, x(0)), estimate);
        states_.frames[0]++;
    }

   private:
    float* x(int r) const { return t_.x + r * s_.bins * padded(s_.channels); }

    // Runs R streams up to the last block. after(block) is called after each block.
    template <int R, typename After>
    void blocks(const int64_t* slots, const float* samples, After after) {
        for (int r = 0; r < R; r++) begin(slots[r], samples + r * s_.microphones * s_.n_fft, x(r));
        for (int64_t block = 0; block < s_.blocks; block++) {
            const BlockWeights& weights = w_.blocks[block];
            const BlockStates& states = states_.blocks[block];
            along_frequency<R>(weights);
            for (int r = 0; r < R; r++) {
                along_time(weights, states, slots[r], x(r));
                if (s_.attention.heads) attend_to_itself(weights.attention, states.attention, slots[r], x(r));
                if (states.weight) modulate(states, slots[r], x(r));
            }
            after(block);
        }
    }

    // Computes a convolution over three frames of `channels` from a state with two of them and from the newest one, and
    // puts that one into the state. Returns [F, padded(columns)].
    const float* convolve(float* past, const float* newest, int64_t stride, int64_t channels, const float* weights,
                          const float* bias, int64_t columns, float* out) {
        const int64_t frame = (s_.bins + 2) * channels, whole = padded(columns);
        std::memset(t_.frames, 0, 3 * frame * sizeof(float));
        std::memcpy(t_.frames + channels, past, s_.bins * channels * sizeof(float));
        std::memcpy(t_.frames + frame + channels, past + s_.bins * channels, s_.bins * channels * sizeof(float));
        for (int64_t f = 0; f < s_.bins; f++)
            std::memcpy(t_.frames + 2 * frame + (f + 1) * channels, newest + f * stride, channels * sizeof(float));
        for (int64_t time = 0; time < 3; time++)
            multiply_rows(t_.frames + time * frame, channels, s_.bins, 3 * channels, weights + time * 3 * channels * whole,
                          whole, out,
                          [&](int64_t f, int64_t column) { return load(time ? out + f * whole + column : bias + column); });
        std::memcpy(past, past + s_.bins * channels, s_.bins * channels * sizeof(float));
        std::memcpy(past + s_.bins * channels, t_.frames + 2 * frame + channels, s_.bins * channels * sizeof(float));
        return out;
    }

    void begin(int64_t slot, const float* samples, float* x) {
        const int64_t channels = 2 * s_.microphones, columns = padded(2 * s_.bins);
        float* spectrum = t_.spectrum;  // [F, 2 M]: all real parts, then all imaginary parts
        float power = 0;
        for (int64_t m = 0; m < s_.microphones; m++) {
            const float* row = samples + m * s_.n_fft;
            float* const transformed = t_.transformed;
            product<1>(
                &row, s_.n_fft, w_.analysis, columns, [](int, int64_t) { return Vector{}; },
                [&](int, int64_t column, Vector sums) { store(transformed + column, sums); });
            for (int64_t f = 0; f < s_.bins; f++) {
                spectrum[f * channels + m] = transformed[f];
                spectrum[f * channels + s_.microphones + m] = transformed[s_.bins + f];
            }
            power += dot(transformed, transformed, 2 * s_.bins);
        }
        gain_ = 1;
        if (states_.level) {
            float& level = states_.level[slot];
            power *= s_.level.unit;
            level = std::max(power, level * s_.level.fading);
            // An overflow must reach the output, or all later frames would be divided by infinity unnoticed.
            const float scale = std::sqrt(std::max(level, s_.level.floor)) / s_.level.reference + 0 * power;
            for (int64_t i = 0; i < s_.bins * channels; i++) spectrum[i] /= scale;
            gain_ = scale * power / (power + s_.level.silence * level + s_.level.inaudible);
        }
        convolve(states_.input + slot * 2 * s_.bins * channels, spectrum, channels, channels, w_.input, w_.input_bias,
                 s_.channels, x);
        const int64_t whole = padded(s_.channels);
        for (int64_t f = 0; f < s_.bins; f++) {
            float* row = x + f * whole;
            normalise(row, s_.channels, [&](int64_t d, Vector normal, int64_t) {
                store(row + d, normal * load(w_.input_scale + d) + load(w_.input_shift + d));
            });
        }
    }

    // Normalises the features of a bin into `normal`, without the affine part.
    void normalise_row(const float* x, int64_t f) {
        float* const to = t_.normal + f * padded(s_.channels);
        normalise(x + f * padded(s_.channels), s_.channels,
                  [&](int64_t d, Vector normal, int64_t) { store(to + d, normal); });
    }

    template <int R>
    void along_frequency(const BlockWeights& w) {
        const int64_t F = s_.bins, D = padded(s_.channels), H = padded(s_.units);
        for (int direction = 0; direction < 2; direction++) {
            for (int r = 0; r < R; r++) {
                for (int64_t f = 0; f < F; f++) normalise_row(x(r), f);
                multiply_rows(t_.normal, D, F, s_.channels, w.intra_input[direction], 4 * H, t_.gates + r * F * 4 * H,
                              [&](int64_t, int64_t column) { return load(w.intra_bias[direction] + column); });
            }
            recur<R>(w.intra_hidden[direction], direction, t_.hidden + direction * ROWS * F * H);
        }
        for (int r = 0; r < R; r++) {
            float* own = x(r);
            for (int direction = 0; direction < 2; direction++)
                multiply_rows(t_.hidden + (direction * ROWS + r) * F * H, H, F, s_.units, w.intra_linear[direction], D, own,
                              [&](int64_t f, int64_t column) {
                                  const Vector before = load(own + f * D + column);
                                  return direction ? before : before + load(w.intra_linear_bias + column);
                              });
        }
    }

    // Runs an LSTM along the bins, from the sums of its input in `gates`, and stores its states in `hidden` [R, F, H].
    template <int R>
    void recur(const float* weights, int direction, float* hidden) {
        const int64_t F = s_.bins, H = padded(s_.units);
        float* const cells = t_.cells;
        std::memset(cells, 0, R * H * sizeof(float));
        for (int64_t step = 0; step < F; step++) {
            const int64_t f = direction ? F - 1 - step : step, before = direction ? f + 1 : f - 1;
            const float* states[R];
            for (int r = 0; r < R; r++) states[r] = step ? hidden + (r * F + before) * H : nullptr;
            // The sums of a single group and row would wait for each other.
            constexpr int GROUPS = R == 1 ? 2 : 1;
            for (int64_t g = 0; g < H / WIDTH;) {
                if (GROUPS == 2 && H / WIDTH - g >= 2) {
                    unit_groups<R, GROUPS>(weights, g, states, f, hidden);
                    g += 2;
                } else {
                    unit_groups<R, 1>(weights, g, states, f, hidden);
                    g++;
                }
            }
        }
    }

    template <int R, int G>
    inline __attribute__((always_inline)) void unit_groups(const float* weights, int64_t first, const float* const* states,
                                                           int64_t f, float* hidden) {
        const int64_t F = s_.bins, H = padded(s_.units), depth = s_.units;
        Vector sums[G][R][4];
        for (int g = 0; g < G; g++)
            for (int r = 0; r < R; r++)
                for (int q = 0; q < 4; q++)
                    sums[g][r][q] = load(t_.gates + (r * F + f) * 4 * H + ((first + g) * 4 + q) * WIDTH);
        if (states[0]) {
            const float* own = weights + first * 4 * WIDTH * depth;
            for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 2
                for (int g = 0; g < G; g++) {
                    Vector w[4];
#pragma GCC unroll 4
                    for (int q = 0; q < 4; q++) w[q] = load(own + (g * depth + k) * 4 * WIDTH + q * WIDTH);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                        for (int q = 0; q < 4; q++) sums[g][r][q] += states[r][k] * w[q];
                }
        }
        for (int g = 0; g < G; g++) {
            Vector cell[R], fresh[R];
            for (int r = 0; r < R; r++) cell[r] = load(t_.cells + r * H + (first + g) * WIDTH);
            activate<R>(sums[g], cell, fresh);
            for (int r = 0; r < R; r++) {
                store(t_.cells + r * H + (first + g) * WIDTH, cell[r]);
                store(hidden + (r * F + f) * H + (first + g) * WIDTH, fresh[r]);
            }
        }
    }

    void along_time(const BlockWeights& w, const BlockStates& states, int64_t slot, float* x) {
        const int64_t F = s_.bins, D = padded(s_.channels), H = padded(s_.units), units = s_.units;
        float *hidden = states.hidden + slot * F * units, *cells = states.cell + slot * F * units;
        for_rows(F, [&](int64_t first, auto rows) {
            const float *inputs[rows], *past[rows], *fresh[rows];
            for (int r = 0; r < rows; r++) {
                normalise_row(x, first + r);
                inputs[r] = t_.normal + (first + r) * D;
                past[r] = hidden + (first + r) * units;
                fresh[r] = t_.hidden + r * H;
            }
            for (int64_t g = 0; g < H / WIDTH; g++) {
                Vector sums[rows][4], cell[rows], next[rows];
                for (int q = 0; q < 4; q++)
                    for (int r = 0; r < rows; r++) sums[r][q] = load(w.inter_bias + (g * 4 + q) * WIDTH);
                multiply<rows, 4>(inputs, s_.channels, w.inter_input + g * 4 * WIDTH * s_.channels, 4 * WIDTH, sums);
                multiply<rows, 4>(past, units, w.inter_hidden + g * 4 * WIDTH * units, 4 * WIDTH, sums);
                const int64_t count = units - g * WIDTH;
                for (int r = 0; r < rows; r++) cell[r] = load_part(cells + (first + r) * units + g * WIDTH, count);
                activate<rows>(sums, cell, next);
                for (int r = 0; r < rows; r++) {
                    store_part(cells + (first + r) * units + g * WIDTH, cell[r], count);
                    store(t_.hidden + r * H + g * WIDTH, next[r]);
                }
            }
            product<rows>(
                fresh, units, w.inter_linear, D,
                [&](int r, int64_t column) {
                    return load(x + (first + r) * D + column) + load(w.inter_linear_bias + column);
                },
                [&](int r, int64_t column, Vector sums) { store(x + (first + r) * D + column, sums); });
            for (int r = 0; r < rows; r++)
                std::memcpy(hidden + (first + r) * units, t_.hidden + r * H, units * sizeof(float));
        });
    }

    // Computes features [F, D] * weights with PReLU into `projected` [F, columns].
    void project(const float* features, const float* weights, const float* bias, const float* slopes, int64_t columns) {
        const int64_t D = padded(s_.channels);
        for_rows(s_.bins, [&](int64_t first, auto rows) {
            const float* from[rows];
            for (int r = 0; r < rows; r++) from[r] = features + (first + r) * D;
            product<rows>(
                from, s_.channels, weights, columns, [&](int, int64_t column) { return load(bias + column); },
                [&](int r, int64_t column, Vector sums) {
                    store(t_.projected + (first + r) * columns + column, prelu(sums, load(slopes + column)));
                });
        });
    }

    // Normalises a head, `size` columns of `projected`, to [F size].
    void normalise_head(int64_t columns, int64_t column, int64_t size, const float* scale, const float* shift, float* to) {
        for (int64_t f = 0; f < s_.bins; f++)
            std::memcpy(t_.head + f * size, t_.projected + f * columns + column, size * sizeof(float));
        normalise(t_.head, s_.bins * size, [&](int64_t i, Vector normal, int64_t count) {
            store_part(to + i, normal * load_part(scale + i, count) + load_part(shift + i, count), count);
        });
    }

    // Puts the keys and values of a frame into a row of the rings.
    void write_row(const AttentionWeights& w, const AttentionSizes& s, const Rings& rings, int64_t slot, int64_t row,
                   const float* features) {
        const int64_t keys = s_.bins * s.key, values = s_.bins * s.value, columns = padded(s.heads * (s.key + s.value));
        project(features, w.key_value, w.key_value_bias, w.key_value_slopes, columns);
        for (int64_t head = 0; head < s.heads; head++) {
            const int64_t place = (slot * s.heads + head) * s.window + row;
            normalise_head(columns, head * s.key, s.key, w.key_scale + head * keys, w.key_shift + head * keys,
                           rings.keys + place * keys);
            normalise_head(columns, s.heads * s.key + head * s.value, s.value, w.value_scale + head * values,
                           w.value_shift + head * values, rings.values + place * values);
        }
    }

    // Adds the attention of x to some rows of the rings. visible(row) says whether a row is one of them, and
    // bias(head, row) is added to its score.
    template <typename Visible, typename Bias>
    void attend(const AttentionWeights& w, const AttentionSizes& s, const Rings& rings, int64_t slot, float* x,
                float strength, Visible visible, Bias bias) {
        const int64_t D = padded(s_.channels), keys = s_.bins * s.key, values = s_.bins * s.value;
        const int64_t columns = padded(s.heads * s.key);
        project(x, w.query, w.query_bias, w.query_slopes, columns);
        const float scale = 1 / std::sqrt(static_cast<float>(keys));
        for (int64_t head = 0; head < s.heads; head++) {
            normalise_head(columns, head * s.key, s.key, w.query_scale + head * keys, w.query_shift + head * keys,
                           t_.query);
            const int64_t first = (slot * s.heads + head) * s.window;
            float highest = -INFINITY;
            for (int64_t row = 0; row < s.window; row++)
                if (visible(row)) {
                    t_.scores[row] = dot(t_.query, rings.keys + (first + row) * keys, keys) * scale + bias(head, row);
                    highest = std::max(highest, t_.scores[row]);
                }
            float total = 0;
            for (int64_t row = 0; row < s.window; row++)
                total += t_.scores[row] = visible(row) ? std::exp(t_.scores[row] - highest) : 0.0f;
            weigh(rings.values + first * values, s.window, 1 / total, values);
            for (int64_t f = 0; f < s_.bins; f++)
                std::memcpy(t_.merged + f * D + head * s.value, t_.attended + f * s.value, s.value * sizeof(float));
        }
        merge(w, x, strength);
    }

    void attend_to_itself(const AttentionWeights& w, const Rings& rings, int64_t slot, float* x) {
        // The oldest row is replaced. Then the ring is the window, and attention does not depend on its order.
        const int64_t frames = states_.frames[slot];
        write_row(w, s_.attention, rings, slot, frames % s_.attention.window, x);
        attend(
            w, s_.attention, rings, slot, x, 1, [&](int64_t row) { return row <= frames; },
            [](int64_t, int64_t) { return 0.0f; });
    }

    // The row of the rings for the frame of the given age.
    int64_t row_of(int64_t age) const {
        const int64_t row = (states_.frames[0] - age) % s_.fusion.window;
        return row < 0 ? row + s_.fusion.window : row;
    }

    // Merges the features of a frame with its hint, zeros if it is null, and puts the result into a row of the rings.
    // The features are [F, padded(D)].
    void merge_hint(const FusionWeights& w, const Rings& rings, int64_t row, const float* features, const float* hint) {
        const int64_t F = s_.bins, D = padded(s_.channels), hints = s_.hints;
        for (int64_t f = 0; f < F; f++)
            for (int64_t channel = 0; channel < hints; channel++)
                t_.hint[f * hints + channel] = hint ? hint[channel * F + f] : 0.0f;
        float* const film = t_.normal;
        multiply_rows(t_.hint, hints, F, hints, w.film, 2 * D, film,
                      [&](int64_t, int64_t column) { return load(w.film_bias + column); });
        for (int64_t f = 0; f < F; f++)
            for (int64_t d = 0; d < D; d += WIDTH)
                store(t_.merged + f * D + d,
                      load(features + f * D + d) * load(film + f * 2 * D + d) + load(film + f * 2 * D + D + d));
        write_row(w.attention, s_.fusion, rings, 0, row, t_.merged);
    }

    void fuse_delayed(const FusionWeights& w, const BlockStates& states, const float* hint) {
        const int64_t size = s_.bins * padded(s_.channels), row = row_of(0);
        float* const waiting = s_.delay ? states.features + states_.frames[0] % s_.delay * size : x(0);
        merge_hint(w, states.fusion, row, waiting, hint);
        if (s_.delay) std::memcpy(waiting, x(0), size * sizeof(float));
        // At the start of a stream, rows without a frame have keys and values of zeros.
        attend(
            w.attention, s_.fusion, states.fusion, 0, x(0), 1, [](int64_t) { return true; },
            [](int64_t, int64_t) { return 0.0f; });
    }

    void fuse_arrived(const FusionWeights& w, const BlockStates& states, const float* const* hints, const int64_t* ages,
                      int64_t count) {
        const int64_t size = s_.bins * padded(s_.channels), window = s_.fusion.window;
        for (int64_t i = 0; i < count; i++)
            merge_hint(w, states.fusion, row_of(ages[i]), states.features + row_of(ages[i]) * size, hints[i]);
        std::memcpy(states.features + row_of(0) * size, x(0), size * sizeof(float));
        const auto age_of = [&](int64_t row) { return (states_.frames[0] - row - 1) % window + 1; };
        const auto visible = [&](int64_t row) {
            // A stream that was reset has forgotten the frames before.
            if (row >= states_.frames[0]) return false;
            for (int64_t i = 0; i < count; i++)
                if (row == row_of(ages[i])) return true;
            return states_.arrived[row] != 0;
        };
        int64_t seen = 0, youngest = window;
        for (int64_t row = 0; row < window; row++)
            if (visible(row)) {
                seen++;
                youngest = std::min(youngest, age_of(row));
            }
        if (!seen) return;
        const float strength = std::min(1.0f, static_cast<float>(seen) / s_.ramp) * w.age_scale[youngest - 1];
        attend(w.attention, s_.fusion, states.fusion, 0, x(0), strength, visible,
               [&](int64_t head, int64_t row) { return w.age_bias[head * window + age_of(row) - 1]; });
    }

    // Computes `attended`, the sum of the first `count` rows [size] with the weights `scores` * factor.
    void weigh(const float* rows, int64_t count, float factor, int64_t size) {
        std::memset(t_.attended, 0, size * sizeof(float));
        for (int64_t i = 0; i < count; i += 4) {
            const float* from[4];
            float weights[4];
            for (int64_t j = 0; j < 4; j++) {
                from[j] = rows + std::min(i + j, count - 1) * size;
                weights[j] = i + j < count ? t_.scores[i + j] * factor : 0.0f;
            }
            // Rows that are not attended to are often at the end, or far from the others.
            if (weights[0] == 0 && weights[1] == 0 && weights[2] == 0 && weights[3] == 0) continue;
            for (int64_t d = 0; d < size; d += WIDTH) {
                const int64_t left = size - d;
                Vector total = load_part(t_.attended + d, left);
                for (int j = 0; j < 4; j++) total += weights[j] * load_part(from[j] + d, left);
                store_part(t_.attended + d, total, left);
            }
        }
    }

    void merge(const AttentionWeights& w, float* x, float strength) {
        const int64_t F = s_.bins, D = padded(s_.channels);
        const Vector slope = Vector{} + *w.merge_slope;
        Vector total{};
        float* const merged = t_.normal;
        for_rows(F, [&](int64_t first, auto rows) {
            const float* from[rows];
            for (int r = 0; r < rows; r++) from[r] = t_.merged + (first + r) * D;
            product<rows>(
                from, s_.channels, w.merge, D, [&](int, int64_t column) { return load(w.merge_bias + column); },
                [&](int r, int64_t column, Vector sums) {
                    const Vector value = prelu(sums, slope);
                    total += value;
                    store(merged + (first + r) * D + column, value);
                });
        });
        const float count = F * s_.channels, mean = sum(total) / count;
        Vector squares{};
        for (int64_t i = 0; i < F * D; i += WIDTH) {
            const Vector difference = load(merged + i) - mean;
            squares += difference * difference;
        }
        const float variance = (sum(squares) - F * (D - s_.channels) * mean * mean) / count;
        const float scale = 1 / std::sqrt(std::max(variance, 0.0f) + EPSILON);
        for (int64_t i = 0; i < F * D; i += WIDTH)
            store(x + i, load(x + i) + strength * ((load(merged + i) - mean) * scale * load(w.merge_scale + i) +
                                                   load(w.merge_shift + i)));
    }

    void modulate(const BlockStates& states, int64_t slot, float* x) {
        const int64_t D = padded(s_.channels), channels = s_.channels;
        const float *weight = states.weight + slot * s_.bins * channels, *bias = states.bias + slot * s_.bins * channels;
        for (int64_t f = 0; f < s_.bins; f++)
            for (int64_t d = 0; d < channels; d += WIDTH) {
                const int64_t left = channels - d;
                const Vector scaled = load(x + f * D + d) * load_part(weight + f * channels + d, left);
                store(x + f * D + d, scaled + load_part(bias + f * channels + d, left));
            }
    }

    // Returns the spectral estimate [F, padded(2 S')].
    const float* output(int64_t slot, const float* x) {
        const int64_t channels = s_.channels;
        return convolve(states_.output + slot * 2 * s_.bins * channels, x, padded(channels), channels, w_.output,
                        w_.output_bias, s_.outputs, t_.results);
    }

    // Transforms a spectral estimate to samples [S', chunk].
    void synthesise(const float* embedding, float* estimate) {
        const int64_t stride = padded(s_.outputs), overlap = s_.n_fft - s_.chunk;
        float* const spectrum = t_.transformed;
        float* const frame = t_.transformed + padded(2 * s_.bins);
        for (int64_t signal = 0; signal < s_.outputs / 2; signal++) {
            for (int64_t f = 0; f < s_.bins; f++)
                for (int64_t part = 0; part < 2; part++)
                    spectrum[2 * f + part] = embedding[f * stride + 2 * signal + part] * gain_;
            const float* row = spectrum;
            product<1>(
                &row, 2 * s_.bins, w_.synthesis, padded(s_.n_fft), [](int, int64_t) { return Vector{}; },
                [&](int, int64_t column, Vector sums) { store(frame + column, sums); });
            float *to = estimate + signal * s_.chunk, *tail = states_.overlap + signal * overlap;
            std::memcpy(to, frame, s_.chunk * sizeof(float));
            for (int64_t i = 0; i < overlap; i++) to[i] += tail[i];
            std::memcpy(tail, frame + s_.chunk, overlap * sizeof(float));
        }
    }

    const StepSizes& s_;
    const StepWeights& w_;
    const StepStates& states_;
    Scratch& t_;
    float gain_ = 1;  // that restores the level of the last stream that began
};

Scratch& scratch_for(const StepSizes& sizes) {
    // Memory that is allocated in every call would be mapped anew by the system each time.
    static thread_local std::unique_ptr<Scratch> scratch;
    static thread_local StepSizes made_for;
    if (!scratch || std::memcmp(&made_for, &sizes, sizeof made_for)) {
        scratch.reset(new Scratch(sizes));
        made_for = sizes;
    }
    return *scratch;
}

}  // namespace

extern "C" int32_t vector_width() { return WIDTH; }
extern "C" const char* instructions() { return INSTRUCTIONS; }

// Runs a frame of `count` streams through the large network. `samples` are [count, M, n_fft], `hints` are
// [count, hint channels, F].
extern "C" void step_large(const StepSizes* sizes, const StepWeights* weights, const StepStates* states,
                           const int64_t* slots, int64_t count, const float* samples, float* hints, int32_t threads) {
    const int64_t groups = (count + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(std::min<int64_t>(threads, groups)) if (threads > 1 && groups > 1)
    {
        Step step(*sizes, *weights, *states, scratch_for(*sizes));
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < groups; group++) {
            const int64_t first = group * ROWS;
            with_rows(std::min<int64_t>(ROWS, count - first), [&](auto rows) {
                step.encode<rows>(slots + first, samples + first * sizes->microphones * sizes->n_fft,
                                  hints + first * sizes->hints * sizes->bins);
            });
        }
    }
}

// Runs a frame through the device's network. `samples` are [M, n_fft], `hints` are `count` hints [hint channels, F] of
// the given ages, `estimate` is [S', chunk].
extern "C" void step_small(const StepSizes* sizes, const StepWeights* weights, const StepStates* states,
                           const float* samples, const float* const* hints, const int64_t* ages, int64_t count,
                           float* estimate) {
    Step(*sizes, *weights, *states, scratch_for(*sizes)).estimate(samples, hints, ages, count, estimate);
}
