// Log-probability, entropy and exact KL of one row's action distribution, with their gradients. The definitions are
// those of functional/distributions.py and bounded_distributions.py.
#ifndef FASTPPO_DISTRIBUTIONS_H
#define FASTPPO_DISTRIBUTIONS_H

#include <math.h>

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
  float raw, log_std, slope, std, inverse;
} Bounded;

// Gradients with respect to the distribution's parameters, [P] each
typedef struct {
  float *logprob, *entropy, *kl;
} Gradients;

typedef struct {
  float logprob, entropy, kl;
} Evaluation;

static inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
static inline float sigmoid_of(float x) { return 1.0f / (1.0f + expf(-x)); }
static inline float at_least(float x, float low) { return x < low ? low : x; }

static void bound(Bounded *b, float raw) {
  if (raw == b->raw) return;
  float over = SHARPNESS * (raw - LOG_STD_MAX), under = SHARPNESS * (LOG_STD_MIN - raw);
  b->raw = raw;
  b->log_std = raw - softplus(over) / SHARPNESS + softplus(under) / SHARPNESS;
  b->slope = 1.0f - sigmoid_of(over) - sigmoid_of(under);
  b->std = expf(b->log_std), b->inverse = expf(-b->log_std);
}

// max and log(sum(exp(x - max))) of n logits; probabilities p
static inline void softmax(long n, const float *x, float *max, float *log_sum, float *p) {
  float most = x[0], sum = 0;
  for (long i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
  for (long i = 0; i < n; i++) sum += p[i] = expf(x[i] - most);
  for (long i = 0; i < n; i++) p[i] /= sum;
  *max = most, *log_sum = logf(sum);
}

static Evaluation evaluate_choice(long n, const float *x, const float *old, long action, Gradients g) {
  Evaluation e = {0};
  float max, log_sum, old_max, old_log_sum, *p = g.logprob, *old_p = g.kl;
  softmax(n, x, &max, &log_sum, p);
  softmax(n, old, &old_max, &old_log_sum, old_p);
  for (long i = 0; i < n; i++) {
    float logp = x[i] - max - log_sum, old_logp = old[i] - old_max - old_log_sum;
    if (i == action) e.logprob = logp;
    logp = at_least(logp, LOWEST_LOG_PROB);
    e.entropy -= p[i] * logp;
    e.kl += old_p[i] * (at_least(old_logp, LOWEST_LOG_PROB) - logp);
  }
  for (long i = 0; i < n; i++) {
    float share = p[i], logp = at_least(x[i] - max - log_sum, LOWEST_LOG_PROB);
    g.entropy[i] = -share * (logp + e.entropy);
    g.kl[i] = share - old_p[i];
    g.logprob[i] = (float)(i == action) - share;
  }
  return e;
}

// Clamped; NaN stays NaN
static inline float bit_logit(float x) {
  return x > LARGEST_BIT_LOGIT ? LARGEST_BIT_LOGIT : x < -LARGEST_BIT_LOGIT ? -LARGEST_BIT_LOGIT : x;
}

static Evaluation evaluate_bit(float x, float old, int set, Gradients g) {
  int inside = !(x > LARGEST_BIT_LOGIT || x < -LARGEST_BIT_LOGIT);
  x = bit_logit(x), old = bit_logit(old);
  float p = sigmoid_of(x), old_p = sigmoid_of(old), softplus_x = softplus(x);
  g.logprob[0] = inside ? (float)set - p : 0.0f;
  g.entropy[0] = inside ? -x * p * (1.0f - p) : 0.0f;
  g.kl[0] = inside ? p - old_p : 0.0f;
  return (Evaluation){set ? -softplus(-x) : -softplus_x, softplus_x - x * p, old_p * (old - x) - softplus(old) + softplus_x};
}

// log(1 - tanh(u)^2), and its derivative -2 tanh(u)
static inline float log_tanh_slope(float u) { return 2.0f * (0.69314718f - u - softplus(-2.0f * u)); }

// The expected log(1 - tanh(u)^2) of u = mean + std z by the trapezoidal rule, and its gradients
static float squashed_part(float mean, float std, float *by_mean, float *by_std) {
  static _Thread_local float node[NODES], weight[NODES], total = 0;
  if (total == 0) {
    for (int i = 0; i < NODES; i++) {
      float z = -5.0f + 10.0f * (float)i / (NODES - 1);
      node[i] = z, weight[i] = expf(-0.5f * z * z), total += weight[i];
    }
  }
  float sum = 0, first = 0, second = 0;
  for (int i = 0; i < NODES; i++) {
    float u = mean + std * node[i], curve = -2.0f * tanhf(u) * weight[i];
    sum += weight[i] * log_tanh_slope(u), first += curve, second += curve * node[i];
  }
  *by_mean = first / total, *by_std = second / total;
  return sum / total;
}

static Evaluation evaluate_normal(float mean, float old_mean, float action, const Bounded *b, const Bounded *old,
                                  int squashed, long n, Gradients g) {
  float z = (action - mean) * b->inverse, shift = (old_mean - mean) * b->inverse, ratio = old->std * b->inverse;
  float spread = old->raw == b->raw ? 1.0f : ratio * ratio;
  g.logprob[0] = z * b->inverse, g.logprob[n] = (z * z - 1.0f) * b->slope;
  g.entropy[0] = 0.0f, g.entropy[n] = b->slope;
  g.kl[0] = -shift * b->inverse, g.kl[n] = (1.0f - spread - shift * shift) * b->slope;
  Evaluation e = {-0.5f * z * z - b->log_std - 0.91893853f, b->log_std + 1.41893853f,
                  b->log_std - old->log_std + 0.5f * (spread + shift * shift - 1.0f)};
  if (squashed) {
    float by_mean, by_std;
    e.logprob -= log_tanh_slope(action);
    e.entropy += squashed_part(mean, b->std, &by_mean, &by_std);
    g.entropy[0] += by_mean, g.entropy[n] += by_std * b->std * b->slope;
  }
  return e;
}

// Evaluate `action` under parameters x, [P], beside those of the policy that acted. `bounded` keeps 2n entries.
static Evaluation evaluate(const Distribution *d, const float *x, const float *old, const float *action, Bounded *bounded,
                           Gradients g) {
  Evaluation sum = {0};
  for (long i = 0; i < d->n; i++) {
    Evaluation e;
    if (d->kind == CATEGORICAL) {
      e = evaluate_choice(d->nvec[i], x, old, (long)action[i], g);
      x += d->nvec[i], old += d->nvec[i];
      g.logprob += d->nvec[i], g.entropy += d->nvec[i], g.kl += d->nvec[i];
    } else if (d->kind == BERNOULLI) {
      e = evaluate_bit(x[i], old[i], action[i] > 0, (Gradients){g.logprob + i, g.entropy + i, g.kl + i});
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
