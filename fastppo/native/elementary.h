// Elementary functions on vectors, within a few units in the last place; NaN stays NaN.
#ifndef FASTPPO_ELEMENTARY_H
#define FASTPPO_ELEMENTARY_H

#include "products.h"

static inline vector all(float x) { return x - (vector){0}; }

// `yes` where the mask is set, else `no`; a comparison of vectors gives a mask
static inline vector choose(integers mask, vector yes, vector no) {
  return (vector)((mask & (integers)yes) | (~mask & (integers)no));
}

// Set where x is a finite number
static inline integers is_finite(vector x) { return x - x == all(0.0f); }

static inline vector magnitude(vector x) { return (vector)((integers)x & 0x7fffffff); }
static inline vector at_least(vector x, float low) { return choose(x < all(low), all(low), x); }
static inline vector at_most(vector x, float high) { return choose(x > all(high), all(high), x); }

// tanh(x) = x P(x^2) / Q(x^2), within 3e-7, and +-1 from the edge on, so that its slope vanishes. The coefficients minimise
// the largest error up to the edge, 1e-8 before rounding.
static inline vector rational_tanh(vector x) {
  vector size = magnitude(x);
  integers above = size >= all(8.3f);
  size = choose(above, all(8.3f), size);
  vector y = size * size, p = y * 1.447954407e-8f + 2.138283333e-5f;
  p = p * y + 3.541310291e-3f, p = p * y + 0.1341916207f, p = p * y + 0.9999999569f;
  vector q = y * 8.224999051e-7f + 3.361264838e-4f;
  q = q * y + 2.604977999e-2f, q = q * y + 0.4675247778f, q = q * y + 1.0f;
  vector t = choose(above, all(1.0f), size * p / q);
  return (vector)((integers)t | ((integers)x & (int)0x80000000));
}

static inline vector sigmoid(vector x) { return 0.5f + 0.5f * rational_tanh(0.5f * x); }

// exp(r) - 1, where x = n log(2) + r and |r| <= log(2) / 2; within the range of n that a float's exponent has
static inline vector reduced_exponential(vector x, integers *n) {
  vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 x 2^23: the sum's last bits are n
  vector whole = shifted - 12582912.0f, r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  vector p = r * 1.98756915e-4f + 1.39819995e-3f;
  p = p * r + 8.33345192e-3f, p = p * r + 4.16657962e-2f, p = p * r + 1.66666654e-1f, p = p * r + 0.5f;
  *n = (integers)shifted - 0x4b400000;
  return p * r * r + r;
}

static inline vector power_of_2(integers n) { return (vector)((n + 127) << 23); }

// exp(x) for x <= 0, 0 from -87 on
static inline vector decay(vector x) {
  integers tiny = x < all(-87.0f), n;
  vector p = reduced_exponential(choose(tiny, all(-87.0f), x), &n) + 1.0f;
  return choose(tiny, all(0.0f), p * power_of_2(n));
}

// exp(x), and exp(x) - 1 without cancellation
typedef struct {
  vector whole, less_one;
} Exponential;

static inline Exponential exponential(vector x) {
  integers n;
  vector p = reduced_exponential(at_most(at_least(x, -104.0f), 89.0f), &n);
  integers half = n >> 1;  // 2^n itself may overflow
  vector first = power_of_2(half), second = power_of_2(n - half), one = power_of_2(half - n);
  return (Exponential){(p * first + first) * second, (p * first + (first - one)) * second};
}

// log(2^n (1 + f)), 1 + f in [sqrt(1/2), sqrt(2)]
static inline vector reduced_log(vector f, vector n) {
  vector p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f, p = p * f - 1.2420140846e-1f, p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f, p = p * f + 2.0000714765e-1f, p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  vector square = f * f;
  return p * f * square - 2.12194440e-4f * n - 0.5f * square + f + 0.693359375f * n;
}

// log(x) for finite x >= 1
static inline vector logarithm(vector x) {
  integers n = ((integers)x - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
  vector rest = (vector)((integers)x - (n << 23));
  return reduced_log(rest - 1.0f, __builtin_convertvector(n, vector)) + (x - x);
}

// log(1 + exp(x))
static inline vector softplus(vector x) {
  vector u = decay(-magnitude(x));
  integers small = u < all(0.41421356f);
  vector rest = reduced_log(choose(small, u, 0.5f * (u - 1.0f)), choose(small, all(0.0f), all(1.0f)));
  return at_least(x, 0.0f) + rest;
}

// 1 / (1 + exp(-x)), with small relative errors
static inline vector logistic(vector x) { return 1.0f / (1.0f + exponential(-x).whole); }

#endif
