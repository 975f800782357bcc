// Activations of hidden layers and their slopes, on rows of vectors. Numbers are torch's within 3e-7, of SiLU within 2e-6.
#ifndef FASTPPO_ACTIVATIONS_H
#define FASTPPO_ACTIVATIONS_H

#include "elementary.h"

enum { TANH, RELU, ELU, SILU, GELU };

// The normal distribution function, within 2e-7: Abramowitz and Stegun 7.1.26. `bell` is exp(-x^2 / 2).
static inline vector normal_share(vector x, vector bell) {
  vector size = magnitude(x) * 0.70710678f;
  vector t = 1.0f / (size * 0.3275911f + 1.0f);
  vector p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f, p = p * t - 0.284496736f, p = (p * t + 0.254829592f) * t;
  vector tail = 0.5f * p * bell;
  return choose(x < all(0.0f), tail, 1.0f - tail);
}

static inline vector activated(int kind, vector z) {
  switch (kind) {
    case TANH: return rational_tanh(z);
    case RELU: return choose(z < all(0.0f), all(0.0f), z);
    case ELU: return choose(z > all(0.0f), z, decay(choose(z > all(0.0f), all(0.0f), z)) - 1.0f);
    case SILU: return z * sigmoid(z);
    default: return z * normal_share(z, decay(-0.5f * z * z));
  }
}

// d h / d z, where h = activated(z); z is only read for SILU and GELU
static inline vector slope(int kind, vector z, vector h) {
  switch (kind) {
    case TANH: return 1.0f - h * h;
    case RELU: return choose(h > all(0.0f), all(1.0f), all(0.0f));
    case ELU: return choose(h > all(0.0f), all(1.0f), h + 1.0f);
    case SILU: {
      vector s = sigmoid(z);
      return s + h * (1.0f - s);
    }
    default: {
      vector bell = decay(-0.5f * z * z);
      return normal_share(z, bell) + z * bell * 0.39894228f;
    }
  }
}

static inline int reads_input(int kind) { return kind == SILU || kind == GELU; }

// The loops below are compiled once for each kind, so that no row decides which it is
#define FOR_EACH_KIND(kind, loop)                \
  switch (kind) {                                \
    case TANH: loop(TANH); break;                \
    case RELU: loop(RELU); break;                \
    case ELU: loop(ELU); break;                  \
    case SILU: loop(SILU); break;                \
    case GELU: loop(GELU); break;                \
  }

// h[m][n] = activated(z[m][n]), n a multiple of WIDTH; h may be z
static void activate(int kind, long m, long n, const float *z, float *h, long row) {
#define ACTIVATE(KIND)             \
  for (long i = 0; i < m; i++)     \
    for (long j = i * row; j < i * row + n; j += WIDTH) *(vector *)(h + j) = activated(KIND, *(const vector *)(z + j))
  FOR_EACH_KIND(kind, ACTIVATE)
#undef ACTIVATE
}

// d[m][n] *= slope; bias[n] += the sum of d over rows
static void deactivate(int kind, long m, long n, const float *z, const float *h, float *d, long row, float *bias) {
#define DEACTIVATE(KIND)                                                                  \
  for (long j = 0; j < n; j += WIDTH) {                                                   \
    vector sum = *(vector *)(bias + j);                                                   \
    for (long i = j; i < m * row; i += row) {                                             \
      vector x = *(vector *)(d + i) * slope(KIND, *(const vector *)(z + i), *(const vector *)(h + i)); \
      *(vector *)(d + i) = x, sum += x;                                                   \
    }                                                                                     \
    *(vector *)(bias + j) = sum;                                                          \
  }
  FOR_EACH_KIND(kind, DEACTIVATE)
#undef DEACTIVATE
}

#endif
