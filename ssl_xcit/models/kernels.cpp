// Passes over memory of a training step on a CPU, each fused to one: see kernels.py.
//
// Plain loops over channels, which the compiler vectorises for the processor at hand. Values are
// float32 or bfloat16 (as 16-bit integers), sums float32. Sums over tokens are taken in parts of
// fixed size and in order, so what a kernel gives does not depend on the number of threads.
// Channels C are a multiple of 16 where heads and depthwise convolutions have them. Whoever builds it
// defines BAND, the number of tokens that are convolved together.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;
constexpr float EPS = 1e-12f;  // the smallest norm divided by
constexpr int64_t PART = 128;  // rows summed together

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void put(float x, float& out) { out = x; }
inline void put(float x, bf16& out) {  // to nearest, ties to even; NaN as arithmetic makes it stays
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out = bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// exp for x <= 0: 2^k times a polynomial of degree 6 on |r| <= ln 2 / 2.
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;  // a comparison that is false for NaN, which stays
  float k = std::nearbyint(x * 1.44269504f);
  float r = x - k * 0.693359375f + k * 2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t shift = (int32_t(k) + 127) << 23;
  float scale;
  std::memcpy(&scale, &shift, 4);
  return p * scale;
}

// Phi(x), the normal distribution: 1/2 + x P(x^2) for |x| <= 5, and 0 or 1 beyond, with P of
// degree 13 fitted in t = 2 x^2 / 25 - 1 (error 4e-7). Neither exp nor division.
constexpr float PHI[14] = {
    1.41363889e-01f, -7.02968240e-02f, 5.15184477e-02f, -4.04270515e-02f,
    3.14702764e-02f, -2.34045982e-02f, 1.62671600e-02f, -1.06594777e-02f,
    6.70028245e-03f, -3.59186786e-03f, 1.43906532e-03f, -8.36234714e-04f,
    7.12047447e-04f, -2.55123887e-04f};

inline float gelu(float x) {
  float t = x * x * 0.08f - 1.0f, p = PHI[13];
#pragma GCC unroll 13
  for (int i = 12; i >= 0; i--) p = p * t + PHI[i];
  float cdf = 0.5f + x * p;
  cdf = x > 5.0f ? 1.0f : cdf;  // comparisons are false for NaN, which stays
  cdf = x < -5.0f ? 0.0f : cdf;  // exactly: a BatchNorm would make much of what is left of it
  return x * cdf;
}

// Phi(x) and its density, with one exp for both; Abramowitz and Stegun 7.1.26 (error 1e-7).
inline void normal(float x, float& cdf, float& pdf) {
  float z = std::fabs(x) * 0.70710678f;
  float e = exp_negative(-z * z);
  float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  float tail = 0.5f * p * t * e;
  cdf = x < 0.0f ? tail : 1.0f - tail;
  pdf = 0.39894228f * e;
}

int64_t parts(int64_t rows) { return (rows + PART - 1) / PART; }

// out (width) = sum of the rows of `partial` (n, width), in order
void sum_rows(const std::vector<float>& partial, int64_t n, int64_t width, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < width; start += 64) {
    int64_t stop = std::min(width, start + 64);
    for (int64_t c = start; c < stop; c++) out[c] = 0.0f;
    for (int64_t i = 0; i < n; i++)
#pragma omp simd
      for (int64_t c = start; c < stop; c++) out[c] += partial[i * width + c];
  }
}

// Call work(row, sum) for each row; out (width) is the sum of what it adds to its `sum`
template <typename Work>
inline void summed(int64_t rows, int64_t width, float* out, Work work) {
  int64_t n = parts(rows);
  std::vector<float> partial(n * width, 0.0f);
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < n; part++)
    for (int64_t row = part * PART; row < std::min(rows, (part + 1) * PART); row++)
      work(row, &partial[part * width]);
  sum_rows(partial, n, width, out);
}

inline void row_moments(const float* x, int64_t C, float eps, float& mean, float& rstd) {
  float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < C; c++) sum += x[c];
  mean = sum / float(C);
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < C; c++) squares += (x[c] - mean) * (x[c] - mean);
  rstd = 1.0f / std::sqrt(squares / float(C) + eps);
}

// Samples that take a branch: `kept[i]` is the sample of its i-th, `slot[b]` the place of sample b
// in it, or -1; null: all of them. The row of x for a row of the branch:
inline int64_t source(const int32_t* kept, int64_t row, int64_t N) {
  return kept ? int64_t(kept[row / N]) * N + row % N : row;
}

// The row of the branch for a row of x, or -1
inline int64_t place(const int32_t* slot, int64_t row, int64_t N) {
  if (!slot) return row;
  return slot[row / N] < 0 ? -1 : int64_t(slot[row / N]) * N + row % N;
}

template <typename T>
void layer_norm(const float* x, const int32_t* kept, int64_t rows, int64_t N, int64_t C,
                const float* gain, const float* shift, float eps, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float* in = x + source(kept, row, N) * C;
    float mean, rstd;
    row_moments(in, C, eps, mean, rstd);
    T* to = out + row * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) put((in[c] - mean) * rstd * gain[c] + shift[c], to[c]);
  }
}

// One token of `layer_norm_backward`; the sums of gain and shift go on
template <typename T>
inline void norm_row_backward(const T* d, const float* in, const float* grad, int64_t C,
                              const float* gain, float eps, float* dx, float* d_gain,
                              float* d_shift) {
  float mean, rstd, a = 0.0f, b = 0.0f;
  row_moments(in, C, eps, mean, rstd);
#pragma omp simd reduction(+ : a, b)
  for (int64_t c = 0; c < C; c++) {
    float hat = (in[c] - mean) * rstd, dn = to_float(d[c]), scaled = dn * gain[c];
    a += scaled;
    b += scaled * hat;
    d_gain[c] += dn * hat;
    d_shift[c] += dn;
  }
  a /= float(C);
  b /= float(C);
#pragma omp simd
  for (int64_t c = 0; c < C; c++) {
    float hat = (in[c] - mean) * rstd;
    dx[c] = grad[c] + (to_float(d[c]) * gain[c] - a - hat * b) * rstd;
  }
}

// dx = grad + d layer_norm(x); `sums` (2, C): of the gradients of gain and shift
template <typename T>
void layer_norm_backward(const T* d_normed, const float* x, const int32_t* slot, const float* grad,
                         int64_t rows, int64_t N, int64_t C, const float* gain, float eps,
                         float* dx, float* sums) {
  summed(rows, 2 * C, sums, [=](int64_t row, float* sum) {
    int64_t from = place(slot, row, N);
    if (from < 0)
      std::memcpy(dx + row * C, grad + row * C, C * sizeof(float));
    else
      norm_row_backward(d_normed + from * C, x + row * C, grad + row * C, C, gain, eps,
                        dx + row * C, sum, sum + C);
  });
}

template <typename T>
void bias_gelu(const T* inner, const float* bias, int64_t rows, int64_t C, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T* in = inner + row * C;
    T* to = out + row * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) put(gelu(to_float(in[c]) + bias[c]), to[c]);
  }
}

// grad becomes the gradient of `inner`; `active` = gelu(inner + bias)
template <typename T>
void bias_gelu_backward(const T* inner, const float* bias, int64_t rows, int64_t C, T* grad,
                        T* active, float* d_bias) {
  summed(rows, C, d_bias, [=](int64_t row, float* sum) {
    const T* in = inner + row * C;
    T *g = grad + row * C, *to = active + row * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      float x = to_float(in[c]) + bias[c], cdf, pdf;
      normal(x, cdf, pdf);
      put(x * cdf, to[c]);
      float d = to_float(g[c]) * (cdf + x * pdf);
      sum[c] += d;
      put(d, g[c]);
    }
  });
}

// out = x + scale * (branch + bias), for samples in a slot
template <typename T>
void residual(const float* x, const T* branch, const float* bias, const int32_t* slot, float scale,
              int64_t rows, int64_t N, int64_t C, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float* in = x + row * C;
    float* to = out + row * C;
    int64_t from = place(slot, row, N);
    if (from < 0) {
      std::memcpy(to, in, C * sizeof(float));
      continue;
    }
    const T* b = branch + from * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) to[c] = in[c] + scale * (to_float(b[c]) + bias[c]);
  }
}

// The branch's gradient: out = scale * grad of the kept samples, and its sum over tokens
template <typename T>
void residual_backward(const float* grad, const int32_t* kept, float scale, int64_t rows, int64_t N,
                       int64_t C, T* out, float* d_bias) {
  summed(rows, C, d_bias, [=](int64_t row, float* sum) {
    const float* g = grad + source(kept, row, N) * C;
    T* to = out + row * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      float value = scale * g[c];
      sum[c] += value;
      put(value, to[c]);
    }
  });
}

// A register of the processor: 32 of 16 values with AVX-512, else, as with AVX2, 16 of 8. A kernel
// that keeps more sums at once than there are registers spends its time on moving them.
#ifdef __AVX512F__
constexpr int WIDTH = 16, MOST_COLUMNS = 64;
#else
constexpr int WIDTH = 8, MOST_COLUMNS = 16;
#endif
typedef float Lanes __attribute__((vector_size(4 * WIDTH), aligned(4)));

// Four rows of some columns as registers: sum[r] += left_r * row
template <int COLUMNS>
struct Tile {
  Lanes sum[4][COLUMNS / WIDTH];

  Tile() {
    for (auto& row : sum)
      for (auto& lanes : row) lanes = Lanes{};
  }

  inline void add(const float* left, int64_t stride, const float* row) {
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS / WIDTH; j++) {
      Lanes right = *(const Lanes*)(row + j * WIDTH);
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) sum[r][j] += left[r * stride] * right;
    }
  }

  // into rows that are `stride` values apart
  inline void store(float* out, int64_t stride) const {
    for (int r = 0; r < 4; r++) std::memcpy(out + r * stride, sum[r], sizeof(sum[r]));
  }
};

// Columns of a tile, of D (a multiple of 16)
template <int D>
constexpr int columns_of() { return D <= MOST_COLUMNS ? D : MOST_COLUMNS; }

// out (D, D) = a^T b, of (N, D) each
template <int D>
inline void gram(const float* a, const float* b, int64_t N, float* out) {
  constexpr int COLUMNS = columns_of<D>();
  for (int i = 0; i < D; i += 4)
    for (int j = 0; j < D; j += COLUMNS) {
      Tile<COLUMNS> tile;
      for (int64_t n = 0; n < N; n++) tile.add(a + n * D + i, 1, b + n * D + j);
      tile.store(out + i * D + j, D);
    }
}

// out (4, D) = x (4, D) times m (D, D)
template <int D>
inline void times(const float* x, const float* m, float* out) {
  constexpr int COLUMNS = columns_of<D>();
  for (int j = 0; j < D; j += COLUMNS) {
    Tile<COLUMNS> tile;
    for (int k = 0; k < D; k++) tile.add(x + k, D, m + k * D + j);
    tile.store(out + j, D);
  }
}

// What both passes have of one image and head
template <int D>
struct Head {
  std::vector<float> q, k, v;  // (N, D)
  float q_norm[D], k_norm[D];
  alignas(64) float cosine[D * D], attention[D * D];

  // room for whole tiles of tokens
  explicit Head(int64_t N) : q((N + 3) * D), k((N + 3) * D), v((N + 3) * D) {}

  template <typename T>
  void load(const T* qkv, const float* bias, int64_t N, int64_t C, float temperature) {
    float* parts[3] = {q.data(), k.data(), v.data()};
    for (int64_t n = 0; n < N; n++)
      for (int p = 0; p < 3; p++) {
        const T* from = qkv + n * 3 * C + p * C;
#pragma omp simd
        for (int c = 0; c < D; c++) parts[p][n * D + c] = to_float(from[c]) + bias[p * C + c];
      }
    float* norms[2] = {q_norm, k_norm};
    for (int p = 0; p < 2; p++) {
      for (int c = 0; c < D; c++) norms[p][c] = 0.0f;
      for (int64_t n = 0; n < N; n++)
#pragma omp simd
        for (int c = 0; c < D; c++) norms[p][c] += parts[p][n * D + c] * parts[p][n * D + c];
      for (int c = 0; c < D; c++) norms[p][c] = std::max(std::sqrt(norms[p][c]), EPS);
    }
    float inverse[D];
    for (int j = 0; j < D; j++) inverse[j] = 1.0f / k_norm[j];
    gram<D>(q.data(), k.data(), N, cosine);
    for (int i = 0; i < D; i++) {
      float top = -1e30f, sum = 0.0f, of_q = 1.0f / q_norm[i];
      for (int j = 0; j < D; j++) cosine[i * D + j] *= of_q * inverse[j];
#pragma omp simd reduction(max : top)
      for (int j = 0; j < D; j++) top = std::max(top, cosine[i * D + j] * temperature);
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < D; j++) {
        attention[i * D + j] = exp_negative(cosine[i * D + j] * temperature - top);
        sum += attention[i * D + j];
      }
      sum = 1.0f / sum;
      for (int j = 0; j < D; j++) attention[i * D + j] *= sum;
    }
  }
};

template <int D>
inline void transpose(const float* m, float* out) {
  for (int i = 0; i < D; i++)
    for (int j = 0; j < D; j++) out[j * D + i] = m[i * D + j];
}

template <int D, typename T>
void mix_heads(const T* qkv, const float* bias, const float* temperature, int64_t B, int64_t N,
               int64_t H, T* out) {
  int64_t C = H * D;
#pragma omp parallel
  {
    Head<D> head(N);
    alignas(64) float transposed[D * D];
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++) {
        head.load(qkv + b * N * 3 * C + h * D, bias + h * D, N, C, temperature[h]);
        transpose<D>(head.attention, transposed);
        for (int64_t n = 0; n < N; n += 4) {
          float rows[4][D];
          int count = int(std::min<int64_t>(4, N - n));
          times<D>(&head.v[n * D], transposed, rows[0]);
          for (int r = 0; r < count; r++)
#pragma omp simd
            for (int c = 0; c < D; c++) put(rows[r][c], out[(b * N + n + r) * C + h * D + c]);
        }
      }
  }
}

template <int D, typename T>
void mix_heads_backward(const T* qkv, const float* bias, const float* temperature, const T* grad,
                  int64_t B, int64_t N, int64_t H, T* d_qkv, float* sums) {
  int64_t C = H * D;
  std::vector<float> partial(B * (3 * C + H), 0.0f);
#pragma omp parallel
  {
    Head<D> head(N);
    std::vector<float> g((N + 3) * D);
    alignas(64) float d[D * D], transposed[D * D];
    float of_q[D], of_k[D];
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++) {
        head.load(qkv + b * N * 3 * C + h * D, bias + h * D, N, C, temperature[h]);
        for (int64_t n = 0; n < N; n++)
#pragma omp simd
          for (int c = 0; c < D; c++) g[n * D + c] = to_float(grad[(b * N + n) * C + h * D + c]);
        gram<D>(g.data(), head.v.data(), N, d);  // gradient of the attention
        float *sum = &partial[b * (3 * C + H)], of_temperature = 0.0f, inverse[D];
        for (int j = 0; j < D; j++) inverse[j] = 1.0f / head.k_norm[j];
        for (int j = 0; j < D; j++) of_k[j] = 0.0f;
        for (int i = 0; i < D; i++) {
          float along = 0.0f, scaled = 0.0f;
          float *di = d + i * D, *a = head.attention + i * D, *cosine = head.cosine + i * D;
#pragma omp simd reduction(+ : along)
          for (int j = 0; j < D; j++) along += di[j] * a[j];
          float by_q = temperature[h] / head.q_norm[i];
#pragma omp simd reduction(+ : scaled)
          for (int j = 0; j < D; j++) {
            float dz = a[j] * (di[j] - along), dc = dz * cosine[j];
            scaled += dc;
            of_k[j] += dc * temperature[h];
            di[j] = dz * by_q * inverse[j];
          }
          of_temperature += scaled;
          // a norm that was clamped is a constant
          of_q[i] = head.q_norm[i] > EPS ? scaled * by_q / head.q_norm[i] : 0.0f;
        }
        for (int j = 0; j < D; j++)
          of_k[j] = head.k_norm[j] > EPS ? of_k[j] / head.k_norm[j] / head.k_norm[j] : 0.0f;
        sum[3 * C + h] = of_temperature;
        transpose<D>(d, transposed);
        const float* left[3] = {head.k.data(), head.q.data(), g.data()};
        const float* right[3] = {transposed, d, head.attention};
        const float* own[2] = {head.q.data(), head.k.data()};
        const float* radial[2] = {of_q, of_k};
        for (int p = 0; p < 3; p++)
          for (int64_t n = 0; n < N; n += 4) {
            float rows[4][D];
            int count = int(std::min<int64_t>(4, N - n));
            times<D>(left[p] + n * D, right[p], rows[0]);
            for (int r = 0; r < count; r++) {
              T* to = d_qkv + (b * N + n + r) * 3 * C + p * C + h * D;
              float* total = sum + p * C + h * D;
              if (p < 2)
#pragma omp simd
                for (int c = 0; c < D; c++) rows[r][c] -= own[p][(n + r) * D + c] * radial[p][c];
#pragma omp simd
              for (int c = 0; c < D; c++) {
                total[c] += rows[r][c];
                put(rows[r][c], to[c]);
              }
            }
          }
      }
  }
  sum_rows(partial, B, 3 * C + H, sums);
}

// (q k v) (B, N, 3, H, d) before their bias -> softmax(cosines * temperature) v, (B, N, H d)
template <typename T>
void channel_mixing(const T* qkv, const float* bias, const float* temperature, int64_t B, int64_t N,
                    int64_t H, int64_t d, T* out) {
  switch (d) {  // the widths of `kernels.WIDTHS`
    case 16: return mix_heads<16>(qkv, bias, temperature, B, N, H, out);
    case 32: return mix_heads<32>(qkv, bias, temperature, B, N, H, out);
    case 48: return mix_heads<48>(qkv, bias, temperature, B, N, H, out);
    case 64: return mix_heads<64>(qkv, bias, temperature, B, N, H, out);
  }
}

// `sums` (3 C + H): of the gradients of q, k and v over all tokens, and of the temperatures
template <typename T>
void channel_mixing_backward(const T* qkv, const float* bias, const float* temperature,
                             const T* grad, int64_t B, int64_t N, int64_t H, int64_t d, T* d_qkv,
                             float* sums) {
  switch (d) {
    case 16: return mix_heads_backward<16>(qkv, bias, temperature, grad, B, N, H, d_qkv, sums);
    case 32: return mix_heads_backward<32>(qkv, bias, temperature, grad, B, N, H, d_qkv, sums);
    case 48: return mix_heads_backward<48>(qkv, bias, temperature, grad, B, N, H, d_qkv, sums);
    case 64: return mix_heads_backward<64>(qkv, bias, temperature, grad, B, N, H, d_qkv, sums);
  }
}

// Mean and biased variance from the sums (n, 2, C) of `count` values and their squares
void mean_and_variance(const std::vector<double>& partial, int64_t n, int64_t count, int64_t C,
                       float* mean, float* variance) {
  for (int64_t c = 0; c < C; c++) {
    double sum = 0.0, squares = 0.0;
    for (int64_t i = 0; i < n; i++) {
      sum += partial[i * 2 * C + c];
      squares += partial[i * 2 * C + C + c];
    }
    sum /= double(count);
    mean[c] = float(sum);
    variance[c] = float(squares / double(count) - sum * sum);
    if (variance[c] < 0.0f) variance[c] = 0.0f;  // NaN stays
  }
}

// Local patch interaction, in bands of an image's rows that stay in the cache: the rows that a band
// gives, [first, last), and those that a convolution sees for them, [top, bottom). Which rows make a
// band depends on the image's size alone.
struct Band {
  int64_t image, first, last, top, bottom;
};

int64_t band_count(int64_t rows, int64_t columns) {
  return std::min(rows, (rows * columns + BAND - 1) / BAND);
}

// Values of the largest band's rows, those above and below included
int64_t band_size(int64_t rows, int64_t columns, int64_t C) {
  int64_t count = band_count(rows, columns), height = (rows + count - 1) / count;
  return std::min(rows, height + 2) * columns * C;
}

// The i-th band of all images; those of an image differ by a row at most
inline Band band_of(int64_t i, int64_t rows, int64_t columns) {
  int64_t count = band_count(rows, columns), place = i % count;
  int64_t first = place * rows / count, last = (place + 1) * rows / count;
  return {i / count, first, last, std::max<int64_t>(0, first - 1), std::min(rows, last + 1)};
}

// Tokens (rows of the band, columns, C), kernels (9, C), zero padding.
// out = bias + sum over taps of image[token + tap] * weight[tap]; `flipped` takes tap -tap instead.
void depthwise(const float* image, const float* weight, const float* bias, Band band,
               int64_t columns, int64_t C, bool flipped, float* out) {
  for (int64_t r = band.first; r < band.last; r++)
    for (int64_t c = 0; c < columns; c++) {
      const float *from[9], *by[9];
      int taps = 0;
      for (int64_t dr = -1; dr <= 1; dr++)
        for (int64_t dc = -1; dc <= 1; dc++) {
          if (r + dr < band.top || r + dr >= band.bottom || c + dc < 0 || c + dc >= columns)
            continue;
          from[taps] = image + ((r + dr - band.top) * columns + c + dc) * C;
          by[taps++] = weight + (flipped ? (1 - dr) * 3 + 1 - dc : (dr + 1) * 3 + dc + 1) * C;
        }
      float* to = out + ((r - band.first) * columns + c) * C;
      for (int64_t j = 0; j < C; j += WIDTH) {
        Lanes sum = bias ? *(const Lanes*)(bias + j) : Lanes{};
        for (int t = 0; t < taps; t++)
          sum += *(const Lanes*)(from[t] + j) * *(const Lanes*)(by[t] + j);
        *(Lanes*)(to + j) = sum;
      }
    }
}

// d_weight[tap] += sum over the band's tokens of grad[token] * image[token + tap]; d_bias += sum of
// grad. Both have the rows above and below.
void depthwise_weight(const float* image, const float* grad, Band band, int64_t columns, int64_t C,
                      float* d_weight, float* d_bias) {
  for (int64_t j = 0; j < C; j += WIDTH) {
    Lanes sum[9] = {}, total = {};
    for (int64_t r = band.first; r < band.last; r++)
      for (int64_t c = 0; c < columns; c++) {
        Lanes g = *(const Lanes*)(grad + ((r - band.top) * columns + c) * C + j);
        total += g;
        for (int64_t dr = -1; dr <= 1; dr++)
          for (int64_t dc = -1; dc <= 1; dc++)
            if (r + dr >= band.top && r + dr < band.bottom && c + dc >= 0 && c + dc < columns)
              sum[(dr + 1) * 3 + dc + 1] +=
                  g * *(const Lanes*)(image + ((r + dr - band.top) * columns + c + dc) * C + j);
      }
    for (int t = 0; t < 9; t++) *(Lanes*)(d_weight + t * C + j) += sum[t];
    *(Lanes*)(d_bias + j) += total;
  }
}

inline void normed_row(const float* in, int64_t C, const float* gain, const float* shift, float eps,
                       float* out) {
  float mean, rstd;
  row_moments(in, C, eps, mean, rstd);
#pragma omp simd
  for (int64_t c = 0; c < C; c++) out[c] = (in[c] - mean) * rstd * gain[c] + shift[c];
}

// convolved = conv(layer_norm(x)); mean and biased variance of its GELU over all tokens
template <typename T>
void local_first(const float* x, const float* gain, const float* shift, float eps,
                 const float* weight, const float* bias, int64_t B, int64_t rows, int64_t columns,
                 int64_t C, T* convolved, float* mean, float* variance) {
  int64_t N = rows * columns, bands = B * band_count(rows, columns);
  std::vector<double> partial(mean ? bands * 2 * C : 0, 0.0);
#pragma omp parallel
  {
    std::vector<float> image(band_size(rows, columns, C)), out(image.size());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < bands; i++) {
      Band band = band_of(i, rows, columns);
      const int64_t seen = band.image * N + band.top * columns;
      const int64_t given = band.image * N + band.first * columns;
      const int64_t count = (band.last - band.first) * columns;
      for (int64_t n = 0; n < (band.bottom - band.top) * columns; n++)
        normed_row(x + (seen + n) * C, C, gain, shift, eps, &image[n * C]);
      depthwise(image.data(), weight, bias, band, columns, C, false, out.data());
      T* to = convolved + given * C;
#pragma omp simd
      for (int64_t j = 0; j < count * C; j++) put(out[j], to[j]);
      if (!mean) continue;
      double *sum = &partial[i * 2 * C], *squares = sum + C;
      for (int64_t n = 0; n < count; n++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          float active = gelu(to_float(to[n * C + c]));
          sum[c] += active;
          squares[c] += double(active) * active;
        }
    }
  }
  if (!mean) return;
  mean_and_variance(partial, bands, B * N, C, mean, variance);
}

// out = x + scale_b * conv(times * gelu(convolved) + plus)
template <typename T>
void local_second(const float* x, const T* convolved, const float* times, const float* plus,
                  const float* weight, const float* bias, const float* scale, int64_t B,
                  int64_t rows, int64_t columns, int64_t C, float* out) {
  int64_t N = rows * columns, bands = B * band_count(rows, columns);
#pragma omp parallel
  {
    std::vector<float> image(band_size(rows, columns, C)), branch(image.size());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < bands; i++) {
      Band band = band_of(i, rows, columns);
      const int64_t seen = band.image * N + band.top * columns;
      const int64_t given = band.image * N + band.first * columns;
      const int64_t count = (band.last - band.first) * columns;
      const float* in = x + given * C;
      float *to = out + given * C, factor = scale ? scale[band.image] : 1.0f;
      if (factor == 0.0f) {
        std::memcpy(to, in, count * C * sizeof(float));
        continue;
      }
      for (int64_t n = 0; n < (band.bottom - band.top) * columns; n++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++)
          image[n * C + c] = gelu(to_float(convolved[(seen + n) * C + c])) * times[c] + plus[c];
      depthwise(image.data(), weight, bias, band, columns, C, false, branch.data());
#pragma omp simd
      for (int64_t j = 0; j < count * C; j++) to[j] = in[j] + factor * branch[j];
    }
  }
}

// Through the second convolution: `d_normed` is the gradient of BatchNorm's output. `sums` (12, C):
// of the kernels' gradient, the bias', BatchNorm's bias' and gain's.
template <typename T>
void local_second_backward(const float* grad, const T* convolved, const float* mean,
                           const float* rstd, const float* times, const float* plus,
                           const float* weight, const float* scale, int64_t B, int64_t rows,
                           int64_t columns, int64_t C, T* d_normed, float* sums) {
  int64_t N = rows * columns, bands = B * band_count(rows, columns);
  std::vector<float> partial(bands * 12 * C, 0.0f);
#pragma omp parallel
  {
    std::vector<float> image(band_size(rows, columns, C)), active(image.size()), g(image.size()),
        back(image.size());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < bands; i++) {
      Band band = band_of(i, rows, columns);
      const int64_t seen = band.image * N + band.top * columns;
      const int64_t given = band.image * N + band.first * columns;
      const int64_t count = (band.last - band.first) * columns;
      T* to = d_normed + given * C;
      float factor = scale ? scale[band.image] : 1.0f, *sum = &partial[i * 12 * C];
      if (factor == 0.0f) {
        std::memset(to, 0, count * C * sizeof(T));
        continue;
      }
      for (int64_t n = 0; n < (band.bottom - band.top) * columns; n++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          float a = gelu(to_float(convolved[(seen + n) * C + c]));
          active[n * C + c] = (a - mean[c]) * rstd[c];
          image[n * C + c] = a * times[c] + plus[c];
          g[n * C + c] = factor * grad[(seen + n) * C + c];
        }
      depthwise_weight(image.data(), g.data(), band, columns, C, sum, sum + 9 * C);
      depthwise(g.data(), weight, nullptr, band, columns, C, true, back.data());
      const float* own = &active[(given - seen) * C];
      for (int64_t n = 0; n < count; n++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          float d = back[n * C + c];
          sum[10 * C + c] += d;
          sum[11 * C + c] += d * own[n * C + c];
          put(d, to[n * C + c]);
        }
    }
  }
  sum_rows(partial, bands, 12 * C, sums);
}

// Through BatchNorm (whose gradient is times * (d - of_mean - hat * of_variance)), GELU, the first
// convolution and LayerNorm, to dx = grad + ...; `sums` (12, C): of the kernels' gradient, the
// bias', LayerNorm's gain's and shift's.
template <typename T>
void local_first_backward(const T* d_normed, const T* convolved, const float* mean,
                          const float* rstd, const float* times, const float* of_mean,
                          const float* of_variance, const float* x, const float* gain,
                          const float* shift, float eps, const float* weight, const float* grad,
                          int64_t B, int64_t rows, int64_t columns, int64_t C, float* dx,
                          float* sums) {
  int64_t N = rows * columns, bands = B * band_count(rows, columns);
  std::vector<float> partial(bands * 12 * C, 0.0f);
#pragma omp parallel
  {
    std::vector<float> image(band_size(rows, columns, C)), d(image.size()), back(image.size());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < bands; i++) {
      Band band = band_of(i, rows, columns);
      const int64_t seen = band.image * N + band.top * columns;
      const int64_t given = band.image * N + band.first * columns;
      float* sum = &partial[i * 12 * C];
      for (int64_t n = 0; n < (band.bottom - band.top) * columns; n++) {
        const int64_t at = (seen + n) * C;
        normed_row(x + at, C, gain, shift, eps, &image[n * C]);
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          float in = to_float(convolved[at + c]), cdf, pdf;
          normal(in, cdf, pdf);
          float hat = (in * cdf - mean[c]) * rstd[c];
          float through = to_float(d_normed[at + c]) - of_mean[c] - hat * of_variance[c];
          d[n * C + c] = times[c] * through * (cdf + in * pdf);
        }
      }
      depthwise_weight(image.data(), d.data(), band, columns, C, sum, sum + 9 * C);
      depthwise(d.data(), weight, nullptr, band, columns, C, true, back.data());
      for (int64_t n = 0; n < (band.last - band.first) * columns; n++) {
        const int64_t at = (given + n) * C;
        norm_row_backward(&back[n * C], x + at, grad + at, C, gain, eps, dx + at, sum + 10 * C,
                          sum + 11 * C);
      }
    }
  }
  sum_rows(partial, bands, 12 * C, sums);
}

// Stem: BatchNorm and GELU between convolutions; rows are pixels.
// out = gelu(times * x + plus)
template <typename T>
void norm_gelu(const T* x, const float* times, const float* plus, int64_t rows, int64_t C, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++)
#pragma omp simd
    for (int64_t c = 0; c < C; c++)
      put(gelu(to_float(x[row * C + c]) * times[c] + plus[c]), out[row * C + c]);
}

// grad becomes the gradient of times * x + plus. `sums` (2, C): of it, and of it times
// (x - mean) * rstd.
template <typename T>
void norm_gelu_backward(const T* x, const float* times, const float* plus, const float* mean,
                        const float* rstd, int64_t rows, int64_t C, T* grad, float* sums) {
  summed(rows, 2 * C, sums, [=](int64_t row, float* sum) {
    const T* in = x + row * C;
    T* g = grad + row * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      float value = to_float(in[c]), z = value * times[c] + plus[c], cdf, pdf;
      normal(z, cdf, pdf);
      float d = to_float(g[c]) * (cdf + z * pdf);
      sum[c] += d;
      sum[C + c] += d * (value - mean[c]) * rstd[c];
      put(d, g[c]);
    }
  });
}

// Mean and biased variance of each column
template <typename T>
void column_moments(const T* x, int64_t rows, int64_t C, float* mean, float* variance) {
  int64_t n = parts(rows);
  std::vector<double> partial(n * 2 * C, 0.0);
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < n; part++) {
    double *sum = &partial[part * 2 * C], *squares = sum + C;
    for (int64_t row = part * PART; row < std::min(rows, (part + 1) * PART); row++)
#pragma omp simd
      for (int64_t c = 0; c < C; c++) {
        double value = to_float(x[row * C + c]);
        sum[c] += value;
        squares[c] += value * value;
      }
  }
  mean_and_variance(partial, n, rows, C, mean, variance);
}

// out = times * x + plus
template <typename T>
void affine(const T* x, const float* times, const float* plus, int64_t rows, int64_t C,
            float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++)
#pragma omp simd
    for (int64_t c = 0; c < C; c++)
      out[row * C + c] = to_float(x[row * C + c]) * times[c] + plus[c];
}

// Sums of BatchNorm's gradient, and of it times the normalised input: (2, C)
template <typename T>
void batch_norm_sums(const float* grad, const T* x, const float* mean, const float* rstd,
                     int64_t rows, int64_t C, float* sums) {
  summed(rows, 2 * C, sums, [=](int64_t row, float* sum) {
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      float g = grad[row * C + c];
      sum[c] += g;
      sum[C + c] += g * (to_float(x[row * C + c]) - mean[c]) * rstd[c];
    }
  });
}

// out = times * (grad - of_mean - (x - mean) * rstd * of_variance)
template <typename T, typename Grad = T>
void batch_norm_backward(const Grad* grad, const T* x, const float* mean, const float* rstd,
                         const float* times, const float* of_mean, const float* of_variance,
                         int64_t rows, int64_t C, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++)
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      float hat = (to_float(x[row * C + c]) - mean[c]) * rstd[c];
      float d = to_float(grad[row * C + c]) - of_mean[c] - hat * of_variance[c];
      put(times[c] * d, out[row * C + c]);
    }
}

// The same of a float32 gradient
template <typename T>
void batch_norm_backward_last(const float* grad, const T* x, const float* mean, const float* rstd,
                              const float* times, const float* of_mean, const float* of_variance,
                              int64_t rows, int64_t C, T* out) {
  batch_norm_backward<T, float>(grad, x, mean, rstd, times, of_mean, of_variance, rows, C, out);
}

}  // namespace

// Each kernel as a pointer to a function, for float32 and for bfloat16
#define EXPORT(kernel)                        \
  void* kernel##_f32 = (void*)kernel<float>;  \
  void* kernel##_bf16 = (void*)kernel<bf16>;

extern "C" {
EXPORT(layer_norm)
EXPORT(layer_norm_backward)
EXPORT(bias_gelu)
EXPORT(bias_gelu_backward)
EXPORT(residual)
EXPORT(residual_backward)
EXPORT(channel_mixing)
EXPORT(channel_mixing_backward)
EXPORT(local_first)
EXPORT(local_second)
EXPORT(local_second_backward)
EXPORT(local_first_backward)
EXPORT(norm_gelu)
EXPORT(norm_gelu_backward)
EXPORT(column_moments)
EXPORT(affine)
EXPORT(batch_norm_sums)
EXPORT(batch_norm_backward)
EXPORT(batch_norm_backward_last)
}
