// Passes over memory of a training step on a CPU, each fused to one: see kernels.py.
//
// Plain loops over channels, which the compiler vectorises for the processor at hand. Values are
// float32 or bfloat16 (as 16-bit integers), sums float32. Sums over tokens are taken in parts of
// fixed size and in order, so a result does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;
constexpr float EPS = 1e-12f;  // the smallest norm divided by
constexpr int64_t PART = 128;  // rows summed together

inline float up(float x) { return x; }
inline float up(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void down(float x, float& out) { out = x; }
inline void down(float x, bf16& out) {  // to nearest, ties to even; NaN as arithmetic makes it stays
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
  float below = 0.5f + x * p;
  below = x > 5.0f ? 1.0f : below;  // comparisons are false for NaN, which stays
  below = x < -5.0f ? 0.0f : below;  // exactly: a BatchNorm would make much of what is left of it
  return x * below;
}

// Phi(x) and its density, with one exp for both; Abramowitz and Stegun 7.1.26 (error 1e-7).
inline void normal(float x, float& below, float& density) {
  float z = std::fabs(x) * 0.70710678f;
  float e = exp_negative(-z * z);
  float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  float tail = 0.5f * p * e;
  below = x < 0.0f ? tail : 1.0f - tail;
  density = 0.39894228f * e;
}

int64_t parts(int64_t rows) { return (rows + PART - 1) / PART; }

// out (C) = sum of the rows of `partial` (n, C), in order
void add_up(const std::vector<float>& partial, int64_t n, int64_t C, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < C; start += 64) {
    int64_t stop = std::min(C, start + 64);
    for (int64_t c = start; c < stop; c++) out[c] = 0.0f;
    for (int64_t i = 0; i < n; i++)
#pragma omp simd
      for (int64_t c = start; c < stop; c++) out[c] += partial[i * C + c];
  }
}

inline void moments(const float* x, int64_t C, float eps, float& mean, float& rstd) {
  float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < C; c++) sum += x[c];
  mean = sum / float(C);
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < C; c++) squares += (x[c] - mean) * (x[c] - mean);
  rstd = 1.0f / std::sqrt(squares / float(C) + eps);
}

// Samples of a branch: `kept[i]` is the sample of its i-th; null: all
inline int64_t source(const int32_t* kept, int64_t row, int64_t N) {
  return kept ? int64_t(kept[row / N]) * N + row % N : row;
}

template <typename T>
void layer_norm(const float* x, const int32_t* kept, int64_t rows, int64_t N, int64_t C,
                const float* gain, const float* shift, float eps, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float* in = x + source(kept, row, N) * C;
    float mean, rstd;
    moments(in, C, eps, mean, rstd);
    T* to = out + row * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) down((in[c] - mean) * rstd * gain[c] + shift[c], to[c]);
  }
}

// One token of `layer_norm_backward`; the sums of gain and shift go on
template <typename T>
inline void norm_row_backward(const T* d, const float* in, const float* grad, int64_t C,
                              const float* gain, float eps, float* dx, float* d_gain,
                              float* d_shift) {
  float mean, rstd, a = 0.0f, b = 0.0f;
  moments(in, C, eps, mean, rstd);
#pragma omp simd reduction(+ : a, b)
  for (int64_t c = 0; c < C; c++) {
    float hat = (in[c] - mean) * rstd, dn = up(d[c]), scaled = dn * gain[c];
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
    dx[c] = grad[c] + (up(d[c]) * gain[c] - a - hat * b) * rstd;
  }
}

// dx = grad + d layer_norm(x); a sample that is in no slot has grad alone
template <typename T>
void layer_norm_backward(const T* d_normed, const float* x, const int32_t* slot, const float* grad,
                         int64_t rows, int64_t N, int64_t C, const float* gain, float eps,
                         float* dx, float* d_gain, float* d_shift) {
  int64_t n = parts(rows);
  std::vector<float> partial(n * 2 * C, 0.0f), sums(2 * C);
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < n; part++) {
    float *pg = &partial[part * 2 * C], *ps = pg + C;
    for (int64_t row = part * PART; row < std::min(rows, (part + 1) * PART); row++) {
      const float *in = x + row * C, *g = grad + row * C;
      float* to = dx + row * C;
      int64_t from = slot ? (slot[row / N] < 0 ? -1 : int64_t(slot[row / N]) * N + row % N) : row;
      if (from < 0) {
        std::memcpy(to, g, C * sizeof(float));
        continue;
      }
      norm_row_backward(d_normed + from * C, in, g, C, gain, eps, to, pg, ps);
    }
  }
  add_up(partial, n, 2 * C, sums.data());
  std::copy(sums.begin(), sums.begin() + C, d_gain);
  std::copy(sums.begin() + C, sums.end(), d_shift);
}

template <typename T>
void bias_gelu(const T* inner, const float* bias, int64_t rows, int64_t C, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T* in = inner + row * C;
    T* to = out + row * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) down(gelu(up(in[c]) + bias[c]), to[c]);
  }
}

// grad becomes the gradient of `inner`; `active` = gelu(inner + bias)
template <typename T>
void bias_gelu_backward(const T* inner, const float* bias, int64_t rows, int64_t C, T* grad,
                        T* active, float* d_bias) {
  int64_t n = parts(rows);
  std::vector<float> partial(n * C, 0.0f);
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < n; part++) {
    float* sum = &partial[part * C];
    for (int64_t row = part * PART; row < std::min(rows, (part + 1) * PART); row++) {
      const T* in = inner + row * C;
      T *g = grad + row * C, *to = active + row * C;
#pragma omp simd
      for (int64_t c = 0; c < C; c++) {
        float x = up(in[c]) + bias[c], below, density;
        normal(x, below, density);
        down(x * below, to[c]);
        float d = up(g[c]) * (below + x * density);
        sum[c] += d;
        down(d, g[c]);
      }
    }
  }
  add_up(partial, n, C, d_bias);
}

// out = x + scale * (branch + bias), for samples in a slot
template <typename T>
void residual(const float* x, const T* branch, const float* bias, const int32_t* slot, float scale,
              int64_t rows, int64_t N, int64_t C, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float* in = x + row * C;
    float* to = out + row * C;
    int64_t from = slot ? (slot[row / N] < 0 ? -1 : int64_t(slot[row / N]) * N + row % N) : row;
    if (from < 0) {
      std::memcpy(to, in, C * sizeof(float));
      continue;
    }
    const T* b = branch + from * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) to[c] = in[c] + scale * (up(b[c]) + bias[c]);
  }
}

// The branch's gradient: out = scale * grad of the kept samples, and its sum over tokens
template <typename T>
void residual_backward(const float* grad, const int32_t* kept, float scale, int64_t rows, int64_t N,
                       int64_t C, T* out, float* d_bias) {
  int64_t n = parts(rows);
  std::vector<float> partial(n * C, 0.0f);
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < n; part++) {
    float* sum = &partial[part * C];
    for (int64_t row = part * PART; row < std::min(rows, (part + 1) * PART); row++) {
      const float* g = grad + source(kept, row, N) * C;
      T* to = out + row * C;
#pragma omp simd
      for (int64_t c = 0; c < C; c++) {
        float value = scale * g[c];
        sum[c] += value;
        down(value, to[c]);
      }
    }
  }
  add_up(partial, n, C, d_bias);
}

// Sixteen channels; of two or four registers where the processor's are shorter
typedef float Lanes __attribute__((vector_size(64), aligned(4)));
constexpr int WIDTH = 16;

// Rows of four tokens or channels as registers: sum[r] += left_r * row
template <int D>
struct Tile {
  Lanes sum[4][D / WIDTH];

  Tile() {
    for (auto& row : sum)
      for (auto& lanes : row) lanes = Lanes{};
  }

  inline void add(const float* left, int64_t stride, const float* row) {
#pragma GCC unroll 4
    for (int j = 0; j < D / WIDTH; j++) {
      Lanes right = *(const Lanes*)(row + j * WIDTH);
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) sum[r][j] += left[r * stride] * right;
    }
  }

  inline void store(float* out, int count) const { std::memcpy(out, sum, count * D * sizeof(float)); }
};

// out (D, D) = a^T b, of (N, D) each
template <int D>
inline void gram(const float* a, const float* b, int64_t N, float* out) {
  for (int i = 0; i < D; i += 4) {
    Tile<D> tile;
    for (int64_t n = 0; n < N; n++) tile.add(a + n * D + i, 1, b + n * D);
    tile.store(out + i * D, 4);
  }
}

// out (4, D) = x (4, D) times m (D, D)
template <int D>
inline void times(const float* x, const float* m, float* out) {
  Tile<D> tile;
  for (int k = 0; k < D; k++) tile.add(x + k, D, m + k * D);
  tile.store(out, 4);
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
        for (int c = 0; c < D; c++) parts[p][n * D + c] = up(from[c]) + bias[p * C + c];
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
void mix(const T* qkv, const float* bias, const float* temperature, int64_t B, int64_t N, int64_t H,
         T* out) {
  int64_t C = H * D;
#pragma omp parallel
  {
    Head<D> head(N);
    alignas(64) float turned[D * D];
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++) {
        head.load(qkv + b * N * 3 * C + h * D, bias + h * D, N, C, temperature[h]);
        transpose<D>(head.attention, turned);
        for (int64_t n = 0; n < N; n += 4) {
          float rows[4][D];
          int count = int(std::min<int64_t>(4, N - n));
          times<D>(&head.v[n * D], turned, rows[0]);
          for (int r = 0; r < count; r++)
#pragma omp simd
            for (int c = 0; c < D; c++) down(rows[r][c], out[(b * N + n + r) * C + h * D + c]);
        }
      }
  }
}

template <int D, typename T>
void mix_backward(const T* qkv, const float* bias, const float* temperature, const T* grad,
                  int64_t B, int64_t N, int64_t H, T* d_qkv, float* d_bias, float* d_temperature) {
  int64_t C = H * D;
  std::vector<float> partial(B * (3 * C + H), 0.0f), sums(3 * C + H);
#pragma omp parallel
  {
    Head<D> head(N);
    std::vector<float> g((N + 3) * D);
    alignas(64) float d[D * D], turned[D * D];
    float of_q[D], of_k[D];
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++) {
        head.load(qkv + b * N * 3 * C + h * D, bias + h * D, N, C, temperature[h]);
        for (int64_t n = 0; n < N; n++)
#pragma omp simd
          for (int c = 0; c < D; c++) g[n * D + c] = up(grad[(b * N + n) * C + h * D + c]);
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
          of_q[i] = head.q_norm[i] > EPS ? scaled * temperature[h] / head.q_norm[i] / head.q_norm[i] : 0.0f;
        }
        for (int j = 0; j < D; j++)
          of_k[j] = head.k_norm[j] > EPS ? of_k[j] / head.k_norm[j] / head.k_norm[j] : 0.0f;
        sum[3 * C + h] = of_temperature;
        transpose<D>(d, turned);
        const float* left[3] = {head.k.data(), head.q.data(), g.data()};
        const float* right[3] = {turned, d, head.attention};
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
                down(rows[r][c], to[c]);
              }
            }
          }
      }
  }
  add_up(partial, B, 3 * C + H, sums.data());
  std::copy(sums.begin(), sums.begin() + 3 * C, d_bias);
  std::copy(sums.begin() + 3 * C, sums.end(), d_temperature);
}

// Mean and biased variance from the sums (n, 2, C) of `count` values and their squares
void spread(const std::vector<double>& partial, int64_t n, int64_t count, int64_t C, float* mean,
            float* variance) {
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

// Local patch interaction of one image: tokens (rows, columns, C), kernels (9, C), zero padding.
// out = bias + sum over taps of image[token + tap] * weight[tap]; `turned` takes tap -tap instead.
void depthwise(const float* image, const float* weight, const float* bias, int64_t rows,
               int64_t columns, int64_t C, bool turned, float* out) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) {
      const float *from[9], *by[9];
      int taps = 0;
      for (int64_t dr = -1; dr <= 1; dr++)
        for (int64_t dc = -1; dc <= 1; dc++) {
          if (r + dr < 0 || r + dr >= rows || c + dc < 0 || c + dc >= columns) continue;
          from[taps] = image + ((r + dr) * columns + c + dc) * C;
          by[taps++] = weight + (turned ? (1 - dr) * 3 + 1 - dc : (dr + 1) * 3 + dc + 1) * C;
        }
      float* to = out + (r * columns + c) * C;
      for (int64_t j = 0; j < C; j += WIDTH) {
        Lanes sum = bias ? *(const Lanes*)(bias + j) : Lanes{};
        for (int t = 0; t < taps; t++) sum += *(const Lanes*)(from[t] + j) * *(const Lanes*)(by[t] + j);
        *(Lanes*)(to + j) = sum;
      }
    }
}

// d_weight[tap] += sum over tokens of grad[token] * image[token + tap]; d_bias += sum of grad
void depthwise_weight(const float* image, const float* grad, int64_t rows, int64_t columns,
                      int64_t C, float* d_weight, float* d_bias) {
  for (int64_t j = 0; j < C; j += WIDTH) {
    Lanes sum[9] = {}, total = {};
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) {
        Lanes g = *(const Lanes*)(grad + (r * columns + c) * C + j);
        total += g;
        for (int64_t dr = -1; dr <= 1; dr++)
          for (int64_t dc = -1; dc <= 1; dc++)
            if (r + dr >= 0 && r + dr < rows && c + dc >= 0 && c + dc < columns)
              sum[(dr + 1) * 3 + dc + 1] +=
                  g * *(const Lanes*)(image + ((r + dr) * columns + c + dc) * C + j);
      }
    for (int t = 0; t < 9; t++) *(Lanes*)(d_weight + t * C + j) += sum[t];
    *(Lanes*)(d_bias + j) += total;
  }
}

inline void normed_row(const float* in, int64_t C, const float* gain, const float* shift, float eps,
                       float* out) {
  float mean, rstd;
  moments(in, C, eps, mean, rstd);
#pragma omp simd
  for (int64_t c = 0; c < C; c++) out[c] = (in[c] - mean) * rstd * gain[c] + shift[c];
}

// convolved = conv(layer_norm(x)); mean and biased variance of its GELU over all tokens
template <typename T>
void local_first(const float* x, const float* gain, const float* shift, float eps,
                 const float* weight, const float* bias, int64_t B, int64_t rows, int64_t columns,
                 int64_t C, T* convolved, float* mean, float* variance) {
  int64_t N = rows * columns;
  std::vector<double> partial(mean ? B * 2 * C : 0, 0.0);
#pragma omp parallel
  {
    std::vector<float> image(N * C), out(N * C);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++) {
      for (int64_t n = 0; n < N; n++) normed_row(x + (b * N + n) * C, C, gain, shift, eps, &image[n * C]);
      depthwise(image.data(), weight, bias, rows, columns, C, false, out.data());
      T* to = convolved + b * N * C;
#pragma omp simd
      for (int64_t i = 0; i < N * C; i++) down(out[i], to[i]);
      if (!mean) continue;
      double *sum = &partial[b * 2 * C], *squares = sum + C;
      for (int64_t n = 0; n < N; n++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          float active = gelu(up(to[n * C + c]));
          sum[c] += active;
          squares[c] += double(active) * active;
        }
    }
  }
  if (!mean) return;
  spread(partial, B, B * N, C, mean, variance);
}

// out = x + scale_b * conv(times * gelu(convolved) + plus)
template <typename T>
void local_second(const float* x, const T* convolved, const float* times, const float* plus,
                  const float* weight, const float* bias, const float* scale, int64_t B,
                  int64_t rows, int64_t columns, int64_t C, float* out) {
  int64_t N = rows * columns;
#pragma omp parallel
  {
    std::vector<float> image(N * C), branch(N * C);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++) {
      const float* in = x + b * N * C;
      float *to = out + b * N * C, factor = scale ? scale[b] : 1.0f;
      if (factor == 0.0f) {
        std::memcpy(to, in, N * C * sizeof(float));
        continue;
      }
      for (int64_t n = 0; n < N; n++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++)
          image[n * C + c] = gelu(up(convolved[(b * N + n) * C + c])) * times[c] + plus[c];
      depthwise(image.data(), weight, bias, rows, columns, C, false, branch.data());
#pragma omp simd
      for (int64_t i = 0; i < N * C; i++) to[i] = in[i] + factor * branch[i];
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
  int64_t N = rows * columns;
  std::vector<float> partial(B * 12 * C, 0.0f);
#pragma omp parallel
  {
    std::vector<float> image(N * C), active(N * C), g(N * C), back(N * C);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++) {
      T* to = d_normed + b * N * C;
      float factor = scale ? scale[b] : 1.0f, *sum = &partial[b * 12 * C];
      if (factor == 0.0f) {
        std::memset(to, 0, N * C * sizeof(T));
        continue;
      }
      for (int64_t n = 0; n < N; n++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          float a = gelu(up(convolved[(b * N + n) * C + c]));
          active[n * C + c] = (a - mean[c]) * rstd[c];
          image[n * C + c] = a * times[c] + plus[c];
          g[n * C + c] = factor * grad[(b * N + n) * C + c];
        }
      depthwise_weight(image.data(), g.data(), rows, columns, C, sum, sum + 9 * C);
      depthwise(g.data(), weight, nullptr, rows, columns, C, true, back.data());
      for (int64_t n = 0; n < N; n++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          float d = back[n * C + c];
          sum[10 * C + c] += d;
          sum[11 * C + c] += d * active[n * C + c];
          down(d, to[n * C + c]);
        }
    }
  }
  add_up(partial, B, 12 * C, sums);
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
  int64_t N = rows * columns;
  std::vector<float> partial(B * 12 * C, 0.0f);
#pragma omp parallel
  {
    std::vector<float> image(N * C), d(N * C), back(N * C);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++) {
      float* sum = &partial[b * 12 * C];
      for (int64_t n = 0; n < N; n++) {
        normed_row(x + (b * N + n) * C, C, gain, shift, eps, &image[n * C]);
        const int64_t at = (b * N + n) * C;
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
          float in = up(convolved[at + c]), below, density;
          normal(in, below, density);
          float hat = (in * below - mean[c]) * rstd[c];
          float through = times[c] * (up(d_normed[at + c]) - of_mean[c] - hat * of_variance[c]);
          d[n * C + c] = through * (below + in * density);
        }
      }
      depthwise_weight(image.data(), d.data(), rows, columns, C, sum, sum + 9 * C);
      depthwise(d.data(), weight, nullptr, rows, columns, C, true, back.data());
      for (int64_t n = 0; n < N; n++) {
        const int64_t at = (b * N + n) * C;
        norm_row_backward(&back[n * C], x + at, grad + at, C, gain, eps, dx + at, sum + 10 * C, sum + 11 * C);
      }
    }
  }
  add_up(partial, B, 12 * C, sums);
}

// Stem: BatchNorm and GELU between convolutions; rows are pixels.
// out = gelu(times * x + plus)
template <typename T>
void norm_gelu(const T* x, const float* times, const float* plus, int64_t rows, int64_t C, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++)
#pragma omp simd
    for (int64_t c = 0; c < C; c++)
      down(gelu(up(x[row * C + c]) * times[c] + plus[c]), out[row * C + c]);
}

// grad becomes the gradient of times * x + plus. `sums` (2, C): of it, and of it times
// (x - mean) * rstd.
template <typename T>
void norm_gelu_backward(const T* x, const float* times, const float* plus, const float* mean,
                        const float* rstd, int64_t rows, int64_t C, T* grad, float* sums) {
  int64_t n = parts(rows);
  std::vector<float> partial(n * 2 * C, 0.0f);
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < n; part++) {
    float *sum = &partial[part * 2 * C], *along = sum + C;
    for (int64_t row = part * PART; row < std::min(rows, (part + 1) * PART); row++) {
      const T* in = x + row * C;
      T* g = grad + row * C;
#pragma omp simd
      for (int64_t c = 0; c < C; c++) {
        float value = up(in[c]), z = value * times[c] + plus[c], below, density;
        normal(z, below, density);
        float d = up(g[c]) * (below + z * density);
        sum[c] += d;
        along[c] += d * (value - mean[c]) * rstd[c];
        down(d, g[c]);
      }
    }
  }
  add_up(partial, n, 2 * C, sums);
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
        double value = up(x[row * C + c]);
        sum[c] += value;
        squares[c] += value * value;
      }
  }
  spread(partial, n, rows, C, mean, variance);
}

// out = times * x + plus
template <typename T>
void affine(const T* x, const float* times, const float* plus, int64_t rows, int64_t C, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++)
#pragma omp simd
    for (int64_t c = 0; c < C; c++) out[row * C + c] = up(x[row * C + c]) * times[c] + plus[c];
}

// Sums of BatchNorm's gradient, and of it times the normalised input: (2, C)
template <typename T>
void batch_norm_sums(const float* grad, const T* x, const float* mean, const float* rstd,
                     int64_t rows, int64_t C, float* sums) {
  int64_t n = parts(rows);
  std::vector<float> partial(n * 2 * C, 0.0f);
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < n; part++) {
    float *sum = &partial[part * 2 * C], *along = sum + C;
    for (int64_t row = part * PART; row < std::min(rows, (part + 1) * PART); row++)
#pragma omp simd
      for (int64_t c = 0; c < C; c++) {
        float g = grad[row * C + c];
        sum[c] += g;
        along[c] += g * (up(x[row * C + c]) - mean[c]) * rstd[c];
      }
  }
  add_up(partial, n, 2 * C, sums);
}

// out = times * (grad - of_mean - (x - mean) * rstd * of_variance)
template <typename Grad, typename T>
void batch_norm_backward(const Grad* grad, const T* x, const float* mean, const float* rstd,
                         const float* times, const float* of_mean, const float* of_variance,
                         int64_t rows, int64_t C, T* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++)
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      float hat = (up(x[row * C + c]) - mean[c]) * rstd[c];
      down(times[c] * (up(grad[row * C + c]) - of_mean[c] - hat * of_variance[c]), out[row * C + c]);
    }
}

}  // namespace

#define FOR_WIDTH(d, call)          \
  switch (d) {                      \
    case 16: { constexpr int D = 16; call; return 0; } \
    case 32: { constexpr int D = 32; call; return 0; } \
    case 48: { constexpr int D = 48; call; return 0; } \
    case 64: { constexpr int D = 64; call; return 0; } \
    default: return 1;              \
  }

#define EXPORT(T, NAME)                                                                            \
  void layer_norm_##NAME(const float* x, const int32_t* kept, int64_t rows, int64_t N, int64_t C,  \
                         const float* gain, const float* shift, float eps, T* out) {               \
    layer_norm<T>(x, kept, rows, N, C, gain, shift, eps, out);                                     \
  }                                                                                                \
  void layer_norm_backward_##NAME(const T* d, const float* x, const int32_t* slot,                 \
                                  const float* grad, int64_t rows, int64_t N, int64_t C,           \
                                  const float* gain, float eps, float* dx, float* d_gain,          \
                                  float* d_shift) {                                                \
    layer_norm_backward<T>(d, x, slot, grad, rows, N, C, gain, eps, dx, d_gain, d_shift);          \
  }                                                                                                \
  void bias_gelu_##NAME(const T* inner, const float* bias, int64_t rows, int64_t C, T* out) {      \
    bias_gelu<T>(inner, bias, rows, C, out);                                                       \
  }                                                                                                \
  void bias_gelu_backward_##NAME(const T* inner, const float* bias, int64_t rows, int64_t C,       \
                                 T* grad, T* active, float* d_bias) {                              \
    bias_gelu_backward<T>(inner, bias, rows, C, grad, active, d_bias);                             \
  }                                                                                                \
  void residual_##NAME(const float* x, const T* branch, const float* bias, const int32_t* slot,    \
                       float scale, int64_t rows, int64_t N, int64_t C, float* out) {              \
    residual<T>(x, branch, bias, slot, scale, rows, N, C, out);                                    \
  }                                                                                                \
  void residual_backward_##NAME(const float* grad, const int32_t* kept, float scale, int64_t rows, \
                                int64_t N, int64_t C, T* out, float* d_bias) {                     \
    residual_backward<T>(grad, kept, scale, rows, N, C, out, d_bias);                              \
  }                                                                                                \
  void local_first_##NAME(const float* x, const float* gain, const float* shift, float eps,         \
                          const float* weight, const float* bias, int64_t B, int64_t rows,         \
                          int64_t columns, int64_t C, T* convolved, float* mean, float* var) {     \
    local_first<T>(x, gain, shift, eps, weight, bias, B, rows, columns, C, convolved, mean, var);  \
  }                                                                                                \
  void local_second_##NAME(const float* x, const T* convolved, const float* times,                 \
                           const float* plus, const float* weight, const float* bias,              \
                           const float* scale, int64_t B, int64_t rows, int64_t columns,           \
                           int64_t C, float* out) {                                                \
    local_second<T>(x, convolved, times, plus, weight, bias, scale, B, rows, columns, C, out);     \
  }                                                                                                \
  void local_second_backward_##NAME(                                                               \
      const float* grad, const T* convolved, const float* mean, const float* rstd,                 \
      const float* times, const float* plus, const float* weight, const float* scale, int64_t B,   \
      int64_t rows, int64_t columns, int64_t C, T* d_normed, float* sums) {                        \
    local_second_backward<T>(grad, convolved, mean, rstd, times, plus, weight, scale, B, rows,     \
                             columns, C, d_normed, sums);                                          \
  }                                                                                                \
  void local_first_backward_##NAME(                                                                \
      const T* d_normed, const T* convolved, const float* mean, const float* rstd,                 \
      const float* times, const float* of_mean, const float* of_variance, const float* x,          \
      const float* gain, const float* shift, float eps, const float* weight, const float* grad,    \
      int64_t B, int64_t rows, int64_t columns, int64_t C, float* dx, float* sums) {               \
    local_first_backward<T>(d_normed, convolved, mean, rstd, times, of_mean, of_variance, x, gain, \
                            shift, eps, weight, grad, B, rows, columns, C, dx, sums);              \
  }                                                                                                \
  void norm_gelu_##NAME(const T* x, const float* times, const float* plus, int64_t rows,           \
                        int64_t C, T* out) {                                                       \
    norm_gelu<T>(x, times, plus, rows, C, out);                                                    \
  }                                                                                                \
  void norm_gelu_backward_##NAME(const T* x, const float* times, const float* plus,                \
                                 const float* mean, const float* rstd, int64_t rows, int64_t C,    \
                                 T* grad, float* sums) {                                           \
    norm_gelu_backward<T>(x, times, plus, mean, rstd, rows, C, grad, sums);                        \
  }                                                                                                \
  void column_moments_##NAME(const T* x, int64_t rows, int64_t C, float* mean, float* var) {       \
    column_moments<T>(x, rows, C, mean, var);                                                      \
  }                                                                                                \
  void affine_##NAME(const T* x, const float* times, const float* plus, int64_t rows, int64_t C,   \
                     float* out) {                                                                 \
    affine<T>(x, times, plus, rows, C, out);                                                       \
  }                                                                                                \
  void batch_norm_sums_##NAME(const float* grad, const T* x, const float* mean, const float* rstd, \
                              int64_t rows, int64_t C, float* sums) {                              \
    batch_norm_sums<T>(grad, x, mean, rstd, rows, C, sums);                                        \
  }                                                                                                \
  void batch_norm_backward_##NAME(const T* grad, const T* x, const float* mean, const float* rstd, \
                                  const float* times, const float* of_mean,                        \
                                  const float* of_variance, int64_t rows, int64_t C, T* out) {     \
    batch_norm_backward<T, T>(grad, x, mean, rstd, times, of_mean, of_variance, rows, C, out);     \
  }                                                                                                \
  void batch_norm_backward_last_##NAME(const float* grad, const T* x, const float* mean,           \
                                       const float* rstd, const float* times,                      \
                                       const float* of_mean, const float* of_variance,             \
                                       int64_t rows, int64_t C, T* out) {                          \
    batch_norm_backward<float, T>(grad, x, mean, rstd, times, of_mean, of_variance, rows, C, out); \
  }                                                                                                \
  int mix_##NAME(const T* qkv, const float* bias, const float* temperature, int64_t B, int64_t N,  \
                 int64_t H, int64_t d, T* out) {                                                   \
    FOR_WIDTH(d, (mix<D, T>(qkv, bias, temperature, B, N, H, out)))                                \
  }                                                                                                \
  int mix_backward_##NAME(const T* qkv, const float* bias, const float* temperature,               \
                          const T* grad, int64_t B, int64_t N, int64_t H, int64_t d, T* d_qkv,     \
                          float* d_bias, float* d_temperature) {                                   \
    FOR_WIDTH(d, (mix_backward<D, T>(qkv, bias, temperature, grad, B, N, H, d_qkv, d_bias,         \
                                     d_temperature)))                                              \
  }

extern "C" {
EXPORT(float, f32)
EXPORT(bf16, bf16)
}
