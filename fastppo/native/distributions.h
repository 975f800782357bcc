// Log-probability, entropy and exact KL of action distributions, with their gradients, for WIDTH rows at a time: a vector
// holds one number of each row. The definitions are those of functional/distributions.py and bounded_distributions.py.
#ifndef FASTPPO_DISTRIBUTIONS_H
#define FASTPPO_DISTRIBUTIONS_H

#include <math.h>

#include "elementary.h"

#define LOWEST_LOG_PROB -1e9f
#define LARGEST_BIT_LOGIT 1e3f
#define LOG_STD_MIN -10.0f
#define LOG_STD_MAX 2.0f
#define SHARPNESS 16.0f
#define NODES 64

enum { CATEGORICAL, BERNOULLI, GAUSSIAN, SQUASHED };

typedef struct {
  long kind;
  long n;            // components
  const long *nvec;  // choices of each component of a CATEGORICAL
} Distribution;

// A bounded log standard deviation with what is computed from it. Rows often share it, so it is kept until `raw` changes.
typedef struct {
  vector raw, log_std, slope, std, inverse;
} Bounded;

// Gradients with respect to the distribution's parameters, [P] each
typedef struct {
  vector *logprob, *entropy, *kl;
} Gradients;

typedef struct {
  vector logprob, entropy, kl;
} Evaluation;

// Fill entries with NaN before their first use: they are then valid for `raw` = NaN, and no other value matches
static void forget(Bounded *b, long n) { memset(b, 0xff, (size_t)n * sizeof *b); }

static void bound(Bounded *b, vector raw) {
  if (memcmp(&raw, &b->raw, sizeof raw) == 0) return;
  vector over = SHARPNESS * (raw - LOG_STD_MAX), under = SHARPNESS * (LOG_STD_MIN - raw);
  b->raw = raw;
  b->log_std = raw - softplus(over) / SHARPNESS + softplus(under) / SHARPNESS;
  b->slope = 1.0f - logistic(over) - logistic(under);
  b->std = exponential(b->log_std).whole, b->inverse = exponential(-b->log_std).whole;
}

// max and log(sum(exp(x - max))) of n logits; probabilities p
static inline void softmax(long n, const vector *x, vector *max, vector *log_sum, vector *p) {
  vector most = x[0], sum = {0};
  for (long i = 1; i < n; i++) most = choose(x[i] > most, x[i], most);
  for (long i = 0; i < n; i++) sum += p[i] = decay(x[i] - most);
  for (long i = 0; i < n; i++) p[i] /= sum;
  *max = most, *log_sum = logarithm(sum);
}

static Evaluation evaluate_choice(long n, const vector *x, const vector *old, vector action, Gradients g) {
  Evaluation e = {0};
  vector max, log_sum, old_max, old_log_sum, *p = g.logprob, *old_p = g.kl;
  softmax(n, x, &max, &log_sum, p);
  softmax(n, old, &old_max, &old_log_sum, old_p);
  for (long i = 0; i < n; i++) {
    vector logp = x[i] - max - log_sum, old_logp = old[i] - old_max - old_log_sum;
    e.logprob = choose(action == all((float)i), logp, e.logprob);
    logp = at_least(logp, LOWEST_LOG_PROB);
    e.entropy -= p[i] * logp;
    e.kl += old_p[i] * (at_least(old_logp, LOWEST_LOG_PROB) - logp);
  }
  for (long i = 0; i < n; i++) {
    vector share = p[i], logp = at_least(x[i] - max - log_sum, LOWEST_LOG_PROB);
    g.entropy[i] = -share * (logp + e.entropy);
    g.kl[i] = share - old_p[i];
    g.logprob[i] = choose(action == all((float)i), all(1.0f), all(0.0f)) - share;
  }
  return e;
}

static inline vector bit_logit(vector x) { return at_most(at_least(x, -LARGEST_BIT_LOGIT), LARGEST_BIT_LOGIT); }

static Evaluation evaluate_bit(vector x, vector old, vector action, Gradients g) {
  integers outside = magnitude(x) > all(LARGEST_BIT_LOGIT), set = action > all(0.0f);
  x = bit_logit(x), old = bit_logit(old);
  vector p = logistic(x), old_p = logistic(old), softplus_x = softplus(x), zero = {0};
  g.logprob[0] = choose(outside, zero, choose(set, all(1.0f), zero) - p);
  g.entropy[0] = choose(outside, zero, -x * p * (1.0f - p));
  g.kl[0] = choose(outside, zero, p - old_p);
  return (Evaluation){choose(set, -softplus(-x), -softplus_x), softplus_x - x * p,
                      old_p * (old - x) - softplus(old) + softplus_x};
}

// log(1 - tanh(u)^2), and its derivative -2 tanh(u)
static inline vector log_tanh_slope(vector u) { return 2.0f * (0.69314718f - u - softplus(-2.0f * u)); }

// The expected log(1 - tanh(u)^2) of u = mean + std z by the trapezoidal rule, and its gradients
static vector squashed_part(vector mean, vector std, vector *by_mean, vector *by_std) {
  static _Thread_local float node[NODES], weight[NODES], total = 0;
  if (total == 0) {
    for (int i = 0; i < NODES; i++) {
      float z = -5.0f + 10.0f * (float)i / (NODES - 1);
      node[i] = z, weight[i] = expf(-0.5f * z * z), total += weight[i];
    }
  }
  vector sum = {0}, first = {0}, second = {0};
  for (int i = 0; i < NODES; i++) {
    vector u = mean + std * node[i], curve = -2.0f * rational_tanh(u) * weight[i];
    sum += weight[i] * log_tanh_slope(u), first += curve, second += curve * node[i];
  }
  *by_mean = first / total, *by_std = second / total;
  return sum / total;
}

static Evaluation evaluate_normal(vector mean, vector old_mean, vector action, const Bounded *b, const Bounded *old,
                                  int squashed, long n, Gradients g) {
  vector z = (action - mean) * b->inverse, shift = (old_mean - mean) * b->inverse, ratio = old->std * b->inverse;
  vector spread = choose(old->raw == b->raw, all(1.0f), ratio * ratio);
  g.logprob[0] = z * b->inverse, g.logprob[n] = (z * z - 1.0f) * b->slope;
  g.entropy[0] = (vector){0}, g.entropy[n] = b->slope;
  g.kl[0] = -shift * b->inverse, g.kl[n] = (1.0f - spread - shift * shift) * b->slope;
  Evaluation e = {-0.5f * z * z - b->log_std - 0.91893853f, b->log_std + 1.41893853f,
                  b->log_std - old->log_std + 0.5f * (spread + shift * shift - 1.0f)};
  if (squashed) {
    vector by_mean, by_std;
    e.logprob -= log_tanh_slope(action);
    e.entropy += squashed_part(mean, b->std, &by_mean, &by_std);
    g.entropy[0] += by_mean, g.entropy[n] += by_std * b->std * b->slope;
  }
  return e;
}

// Evaluate `action` under parameters x, [P], beside those of the policy that acted. `bounded` keeps 2n entries. Never
// inlined: acting and update need the same bits, and compilers fuse products and sums as the code around them allows.
__attribute__((noinline)) static Evaluation evaluate(const Distribution *d, const vector *x, const vector *old,
                                                     const vector *action, Bounded *bounded, Gradients g) {
  Evaluation sum = {0};
  for (long i = 0; i < d->n; i++) {
    Evaluation e;
    if (d->kind == CATEGORICAL) {
      e = evaluate_choice(d->nvec[i], x, old, action[i], g);
      x += d->nvec[i], old += d->nvec[i];
      g.logprob += d->nvec[i], g.entropy += d->nvec[i], g.kl += d->nvec[i];
    } else if (d->kind == BERNOULLI) {
      e = evaluate_bit(x[i], old[i], action[i], (Gradients){g.logprob + i, g.entropy + i, g.kl + i});
    } else {
      bound(bounded + i, x[d->n + i]), bound(bounded + d->n + i, old[d->n + i]);
      e = evaluate_normal(x[i], old[i], action[i], bounded + i, bounded + d->n + i, d->kind == SQUASHED, d->n,
                          (Gradients){g.logprob + i, g.entropy + i, g.kl + i});
    }
    sum.logprob += e.logprob, sum.entropy += e.entropy, sum.kl += e.kl;
  }
  return sum;
}

#endif
