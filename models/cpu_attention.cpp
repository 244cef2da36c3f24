// Windowed self-attention for training on a CPU, with PReLU and the normalisation of heads before it: forward and
// backward pass. cpu_attention.py uses the C interface.

#include <algorithm>
#include <limits>
#include <omp.h>

#include "vectors.h"

constexpr float EPSILON = 1e-5f;  // as in the layer normalisation of torch
constexpr int MAX_SECTIONS = 3, MAX_COLUMNS = 1024;

// The sizes of projections [frames, bins, columns], with batch * steps frames. The columns are divided into sections,
// and a section into heads of equal size.
struct Projection {
    int64_t batch, steps, bins, columns, sections, heads[MAX_SECTIONS], size[MAX_SECTIONS];
    int32_t threads;
};

struct Section {
    int64_t first, heads, size, columns, heads_before;
};

static Section section_of(const Projection& p, int64_t index) {
    Section section{0, p.heads[index], p.size[index], p.heads[index] * p.size[index], 0};
    for (int64_t before = 0; before < index; before++) {
        section.first += p.heads[before] * p.size[before];
        section.heads_before += p.heads[before];
    }
    return section;
}

static int64_t heads_of(const Projection& p) {
    int64_t heads = 0;
    for (int64_t index = 0; index < p.sections; index++) heads += p.heads[index];
    return heads;
}

// The offset of a frame, for its first head, in the output [batch, heads, steps, bins * size] of a section.
static int64_t frame_of(const Projection& p, const Section& s, int64_t frame) {
    return (frame / p.steps * s.heads * p.steps + frame % p.steps) * p.bins * s.size;
}
// The distance between the heads of a frame in this output.
static int64_t head_stride(const Projection& p, const Section& s) { return p.steps * p.bins * s.size; }

// Replaces the sums of columns by the mean of their head.
static void average_heads(const Section& s, int64_t bins, float* __restrict columns) {
    for (int64_t h = 0; h < s.heads; h++) {
        float total = 0;
        for (int64_t c = 0; c < s.size; c++) total += columns[h * s.size + c];
        for (int64_t c = 0; c < s.size; c++) columns[h * s.size + c] = total / (bins * s.size);
    }
}

// Calls move(offset in the rows [bins, columns] of one frame, offset in the rows [bins * size] of its heads).
template <typename Move>
static void by_head(const Projection& p, const Section& s, Move move) {
    for (int64_t h = 0; h < s.heads; h++)
        for (int64_t f = 0; f < p.bins; f++)
            for (int64_t c = 0; c < s.size; c++)
                move(f * s.columns + h * s.size + c, h * head_stride(p, s) + f * s.size + c);
}

// Normalises PReLU(x): y = normal * scale + shift (+ residual). slope is [columns], scale and shift are [bins,
// columns]. statistics [frames, 2, heads of all sections] receives means and inverse deviations.
extern "C" void norm_forward(const Projection* projection, const float* x, const float* slope, const float* scale,
                             const float* shift, const float* residual, float* statistics, float* const* outputs) {
    const Projection& p = *projection;
    const int64_t C = p.columns, heads = heads_of(p);
#pragma omp parallel num_threads(p.threads)
    {
        const Buffer buffer(p.bins * C);
        float* __restrict rows = buffer;
        float sums[MAX_COLUMNS], squares[MAX_COLUMNS];
#pragma omp for schedule(static)
        for (int64_t frame = 0; frame < p.batch * p.steps; frame++)
            for (int64_t index = 0; index < p.sections; index++) {
                const Section s = section_of(p, index);
                const float *from = x + frame * p.bins * C + s.first, *a = slope + s.first;
                std::fill(sums, sums + s.columns, 0.0f);
                std::fill(squares, squares + s.columns, 0.0f);
                for (int64_t f = 0; f < p.bins; f++)
                    for (int64_t c = 0; c < s.columns; c++) {
                        const float value = from[f * C + c], y = value > 0 ? value : value * a[c];
                        rows[f * s.columns + c] = y;
                        sums[c] += y;
                    }
                average_heads(s, p.bins, sums);
                for (int64_t f = 0; f < p.bins; f++)
                    for (int64_t c = 0; c < s.columns; c++) {
                        const float difference = rows[f * s.columns + c] - sums[c];
                        rows[f * s.columns + c] = difference;
                        squares[c] += difference * difference;
                    }
                average_heads(s, p.bins, squares);
                for (int64_t c = 0; c < s.columns; c++) squares[c] = 1 / __builtin_sqrtf(squares[c] + EPSILON);
                float* kept = statistics + frame * 2 * heads + s.heads_before;
                for (int64_t h = 0; h < s.heads; h++) kept[h] = sums[h * s.size], kept[heads + h] = squares[h * s.size];
                float* to = outputs[index] + frame_of(p, s, frame);
                if (residual) {
                    const float* before = residual + frame * p.bins * C;
                    for (int64_t f = 0; f < p.bins; f++)
                        for (int64_t c = 0; c < s.columns; c++) {
                            const int64_t at = f * C + c;
                            to[at] = before[at] + rows[at] * squares[c] * scale[at] + shift[at];
                        }
                    continue;
                }
                for (int64_t f = 0; f < p.bins; f++)
                    for (int64_t c = 0; c < s.columns; c++) {
                        const int64_t at = f * C + s.first + c;
                        rows[f * s.columns + c] = rows[f * s.columns + c] * squares[c] * scale[at] + shift[at];
                    }
                by_head(p, s, [&](int64_t row, int64_t head) { to[head] = rows[row]; });
            }
    }
}

// Adds to `weights`, the gradients of slope, scale and shift, [threads, (1 + 2 bins) columns].
extern "C" void norm_backward(const Projection* projection, const float* x, const float* slope, const float* scale,
                              const float* statistics, const float* const* gradients, float* dx, float* weights) {
    const Projection& p = *projection;
    const int64_t C = p.columns, heads = heads_of(p);
#pragma omp parallel num_threads(p.threads)
    {
        const Buffer buffer(2 * p.bins * C);
        float *__restrict rows = buffer, *__restrict normal = buffer + p.bins * C;
        float mean[MAX_COLUMNS], deviation[MAX_COLUMNS], sums[MAX_COLUMNS], along[MAX_COLUMNS];
        float* __restrict dslope = weights + omp_get_thread_num() * (1 + 2 * p.bins) * C;
        float *__restrict dscale = dslope + C, *__restrict dshift = dscale + p.bins * C;
#pragma omp for schedule(static)
        for (int64_t frame = 0; frame < p.batch * p.steps; frame++)
            for (int64_t index = 0; index < p.sections; index++) {
                const Section s = section_of(p, index);
                const float *from = x + frame * p.bins * C + s.first, *a = slope + s.first;
                const float* kept = statistics + frame * 2 * heads + s.heads_before;
                for (int64_t c = 0; c < s.columns; c++) mean[c] = kept[c / s.size], deviation[c] = kept[heads + c / s.size];
                const float* given = gradients[index] + frame_of(p, s, frame);
                by_head(p, s, [&](int64_t row, int64_t head) { rows[row] = given[head]; });
                std::fill(sums, sums + s.columns, 0.0f);
                std::fill(along, along + s.columns, 0.0f);
                for (int64_t f = 0; f < p.bins; f++)
                    for (int64_t c = 0; c < s.columns; c++) {
                        const int64_t at = f * C + s.first + c, row = f * s.columns + c;
                        const float value = from[f * C + c], y = value > 0 ? value : value * a[c];
                        const float n = (y - mean[c]) * deviation[c], d = rows[row] * scale[at];
                        dscale[at] += rows[row] * n;
                        dshift[at] += rows[row];
                        normal[row] = n;
                        rows[row] = d;
                        sums[c] += d;
                        along[c] += d * n;
                    }
                average_heads(s, p.bins, sums);
                average_heads(s, p.bins, along);
                float* to = dx + frame * p.bins * C + s.first;
                for (int64_t f = 0; f < p.bins; f++)
                    for (int64_t c = 0; c < s.columns; c++) {
                        const int64_t row = f * s.columns + c;
                        const float d = (rows[row] - sums[c] - normal[row] * along[c]) * deviation[c];
                        const float value = from[f * C + c];
                        to[f * C + c] = value > 0 ? d : d * a[c];
                        dslope[s.first + c] += value > 0 ? 0 : d * value;
                    }
            }
    }
}

// The sizes of attention. Queries and keys are [batch, heads, steps, key], values [batch, heads, steps, value]. Keys
// and values of the window before the first step are [batch, heads, window, …]; their first unseen[batch] frames are
// ignored. The output is [batch, steps, bins, heads, value / bins], the probabilities [batch, heads, padded steps,
// padded window].
struct Attention {
    int64_t batch, heads, steps, window, bins, key, value;
    int32_t threads;
};

static int64_t padded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// The padded sizes for one head of one stream. Rows are padded with zeros to whole vectors and whole blocks. The query
// of step t attends to rows t + 1 to t + window of the keys, and a block of ROWS queries to `span` rows.
struct Shape {
    int64_t steps, keys, key, value, span, columns;
    explicit Shape(const Attention& a)
        : steps(padded(a.steps, ROWS)),
          keys(padded(a.window + steps + 4, ROWS)),
          key(padded(a.key, WIDTH)),
          value(padded(a.value, WIDTH)),
          span(a.window + ROWS - 1),
          columns(padded(span, 16)) {}
};

extern "C" int32_t probabilities_size(const Attention* attention) {
    const Shape shape(*attention);
    return attention->batch * attention->heads * shape.steps * shape.columns;
}

static void copy_rows(const float* from, int64_t rows, int64_t size, float scale, float* to, int64_t stride) {
    for (int64_t row = 0; row < rows; row++, from += size, to += stride) {
        for (int64_t k = 0; k < size; k++) to[k] = from[k] * scale;
        std::fill(to + size, to + stride, 0.0f);
    }
}

// Copies the previous frames and the new ones into consecutive rows.
static void copy_window(const Attention& a, const Shape& shape, int64_t unit, const float* before, const float* now,
                        int64_t size, float* to, int64_t stride) {
    copy_rows(before + unit * a.window * size, a.window, size, 1, to, stride);
    copy_rows(now + unit * a.steps * size, a.steps, size, 1, to + a.window * stride, stride);
    std::fill(to + (a.window + a.steps) * stride, to + shape.keys * stride, 0.0f);
}

// Calls move(offset in the values [bins, value / bins] of a head, offset in the row of all heads).
template <typename Move>
static void by_bin(const Attention& a, int64_t head, Move move) {
    const int64_t size = a.value / a.bins;
    for (int64_t f = 0; f < a.bins; f++)
        for (int64_t c = 0; c < size; c++) move(f * size + c, (f * a.heads + head) * size + c);
}

// Computes the dot products [ROWS, columns] of ROWS rows with `count` others.
static void dots(const float* rows, const float* others, int64_t stride, int64_t count, float* to, int64_t columns) {
    for (int64_t other = 0; other < count; other += 4) {
        Vector sums[ROWS][4] = {};
        for (int64_t k = 0; k < stride; k += WIDTH) {
            Vector o[4];
#pragma GCC unroll 4
            for (int z = 0; z < 4; z++) o[z] = load(others + (other + z) * stride + k);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const Vector row = load(rows + r * stride + k);
#pragma GCC unroll 4
                for (int z = 0; z < 4; z++) sums[r][z] += row * o[z];
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int z = 0; z < 4; z++) to[r * columns + other + z] = sum(sums[r][z]);
    }
}

// Computes to [ROWS, size] = weights [ROWS, columns] times rows [count, size]; only `count` columns are used.
static void combine(const float* weights, int64_t columns, const float* rows, int64_t count, int64_t size, float* to) {
    const float* own[ROWS];
    for (int r = 0; r < ROWS; r++) own[r] = weights + r * columns;
    const auto block = [&](auto vectors, int64_t column) {
        constexpr int Z = vectors;
        Vector sums[ROWS][Z] = {};
        multiply<ROWS, Z>(own, count, rows + column, size, sums);
        for (int r = 0; r < ROWS; r++)
            for (int z = 0; z < Z; z++) store(to + r * size + column + z * WIDTH, sums[r][z]);
    };
    int64_t column = 0;
    for (; size - column >= 4 * WIDTH; column += 4 * WIDTH) block(std::integral_constant<int, 4>{}, column);
    for (; size - column >= WIDTH; column += WIDTH) block(std::integral_constant<int, 1>{}, column);
}

// Replaces the scores [ROWS, columns] of queries from step `first` on by probabilities, which are 0 outside the window.
static void softmax(const Attention& a, const Shape& shape, int64_t first, int64_t unseen, float* scores) {
    Integers lanes;
    for (int i = 0; i < WIDTH; i++) lanes[i] = i;
    const int32_t lowest = std::max<int64_t>(0, unseen - first - 1);
    for (int32_t r = 0; r < ROWS; r++, scores += shape.columns) {
        const int32_t begin = std::max(r, lowest), end = r + a.window;
        float most = -std::numeric_limits<float>::infinity();
        for (int32_t c = begin; c < end; c++) most = std::max(most, scores[c]);
        Vector total{};
        for (int32_t c = 0; c < shape.columns; c += WIDTH) {
            const Integers seen = (lanes + c >= begin) & (lanes + c < end);
            const Vector power = exponential(load(scores + c) - most);
            const Vector kept = seen ? power : Vector{};
            store(scores + c, kept);
            total += kept;
        }
        const float scale = 1 / sum(total);
        for (int64_t c = 0; c < shape.columns; c += WIDTH) store(scores + c, load(scores + c) * scale);
    }
}

extern "C" void attention_forward(const Attention* attention, const float* query, const float* key, const float* value,
                                  const float* past_key, const float* past_value, const int64_t* unseen,
                                  float* probabilities, float* output) {
    const Attention& a = *attention;
    const Shape shape(a);
    const float scale = 1 / __builtin_sqrtf(a.key);
#pragma omp parallel num_threads(a.threads)
    {
        const Buffer queries(ROWS * shape.key), keys(shape.keys * shape.key), values(shape.keys * shape.value);
        const Buffer mixed(ROWS * shape.value);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < a.batch * a.heads; unit++) {
            const int64_t stream = unit / a.heads, head = unit % a.heads;
            copy_window(a, shape, unit, past_key, key, a.key, keys, shape.key);
            copy_window(a, shape, unit, past_value, value, a.value, values, shape.value);
            for (int64_t first = 0; first < a.steps; first += ROWS) {
                const int64_t count = std::min<int64_t>(ROWS, a.steps - first);
                std::fill(queries + count * shape.key, queries + ROWS * shape.key, 0.0f);
                copy_rows(query + (unit * a.steps + first) * a.key, count, a.key, scale, queries, shape.key);
                float* own = probabilities + (unit * shape.steps + first) * shape.columns;
                dots(queries, keys + (first + 1) * shape.key, shape.key, shape.span, own, shape.columns);
                softmax(a, shape, first, unseen[stream], own);
                combine(own, shape.columns, values + (first + 1) * shape.value, shape.span, shape.value, mixed);
                for (int64_t r = 0; r < count; r++) {
                    float* to = output + (stream * a.steps + first + r) * a.heads * a.value;
                    const float* from = mixed + r * shape.value;
                    by_bin(a, head, [&](int64_t own, int64_t all) { to[all] = from[own]; });
                }
            }
        }
    }
}

// Transposes a part of a matrix [steps, columns] of queries into [ROWS, columns] of the keys from row `first` on. The
// columns of the result are the queries from `lowest` on.
static void transpose_block(const Shape& shape, int64_t window, int64_t first, int64_t lowest, int64_t count,
                            const float* from, float* to) {
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t q = 0; q < count; q++) {
            const int64_t step = lowest + q, column = first + r - (step / ROWS * ROWS + 1);
            const bool seen = first + r > step && first + r <= step + window;
            to[r * shape.columns + q] = seen ? from[step * shape.columns + column] : 0.0f;
        }
}

extern "C" void attention_backward(const Attention* attention, const float* query, const float* key, const float* value,
                                   const float* past_key, const float* past_value, const float* probabilities,
                                   const float* gradient, float* dquery, float* dkey, float* dvalue, float* dpast_key,
                                   float* dpast_value) {
    const Attention& a = *attention;
    const Shape shape(a);
    const float scale = 1 / __builtin_sqrtf(a.key);
#pragma omp parallel num_threads(a.threads)
    {
        const Buffer queries(shape.steps * shape.key), keys(shape.keys * shape.key), values(shape.keys * shape.value);
        const Buffer outputs(shape.steps * shape.value), scores(shape.steps * shape.columns);
        const Buffer transposed(ROWS * shape.columns), mixed(ROWS * std::max(shape.key, shape.value));
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < a.batch * a.heads; unit++) {
            const int64_t stream = unit / a.heads, head = unit % a.heads;
            const float* own = probabilities + unit * shape.steps * shape.columns;
            copy_window(a, shape, unit, past_key, key, a.key, keys, shape.key);
            copy_window(a, shape, unit, past_value, value, a.value, values, shape.value);
            copy_rows(query + unit * a.steps * a.key, a.steps, a.key, scale, queries, shape.key);
            std::fill(queries + a.steps * shape.key, queries + shape.steps * shape.key, 0.0f);
            std::fill(outputs + 0, outputs + shape.steps * shape.value, 0.0f);
            for (int64_t step = 0; step < a.steps; step++) {
                const float* from = gradient + (stream * a.steps + step) * a.heads * a.value;
                float* to = outputs + step * shape.value;
                by_bin(a, head, [&](int64_t own, int64_t all) { to[own] = from[all]; });
            }
            for (int64_t first = 0; first < a.steps; first += ROWS) {
                float* d = scores + first * shape.columns;
                dots(outputs + first * shape.value, values + (first + 1) * shape.value, shape.value, shape.span, d,
                     shape.columns);
                for (int64_t r = 0; r < ROWS; r++) {
                    float* row = d + r * shape.columns;
                    const float* p = own + (first + r) * shape.columns;
                    std::fill(row + shape.span, row + shape.columns, 0.0f);
                    Vector total{};
                    for (int64_t c = 0; c < shape.columns; c += WIDTH) total += load(row + c) * load(p + c);
                    const float mean = sum(total);
                    for (int64_t c = 0; c < shape.columns; c += WIDTH)
                        store(row + c, (load(row + c) - mean) * load(p + c));
                }
                combine(d, shape.columns, keys + (first + 1) * shape.key, shape.span, shape.key, mixed);
                for (int64_t r = 0; r < std::min<int64_t>(ROWS, a.steps - first); r++)
                    for (int64_t k = 0; k < a.key; k++)
                        dquery[(unit * a.steps + first + r) * a.key + k] = mixed[r * shape.key + k] * scale;
            }
            const auto put = [&](int64_t row, int64_t size, const float* from, float* before, float* now) {
                float* to = row < a.window ? before + (unit * a.window + row) * size
                                           : now + (unit * a.steps + row - a.window) * size;
                std::copy(from, from + size, to);
            };
            for (int64_t first = 0; first < a.window + a.steps; first += ROWS) {
                const int64_t lowest = std::max<int64_t>(0, first - a.window);
                const int64_t count = std::max<int64_t>(0, std::min(a.steps, first + ROWS - 1) - lowest);
                const int64_t rows = std::min<int64_t>(ROWS, a.window + a.steps - first);
                transpose_block(shape, a.window, first, lowest, count, scores, transposed);
                combine(transposed, shape.columns, queries + lowest * shape.key, count, shape.key, mixed);
                for (int64_t r = 0; r < rows; r++) put(first + r, a.key, mixed + r * shape.key, dpast_key, dkey);
                transpose_block(shape, a.window, first, lowest, count, own, transposed);
                combine(transposed, shape.columns, outputs + lowest * shape.value, count, shape.value, mixed);
                for (int64_t r = 0; r < rows; r++) put(first + r, a.value, mixed + r * shape.value, dpast_value, dvalue);
            }
        }
    }
}
