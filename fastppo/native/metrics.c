// Metrics of a rollout that need no network; the definitions are those of ppo/metrics.py and
// functional/diagnostics.py. Sums are in float64.
#include <math.h>

// Places of the figures; then come returns, lengths and last steps of the latest episodes, `max_episodes` each, latest first.
// CLIPPED, RANGE, STD and OUTSIDE are 0 or NaN here; ppo/metrics.py measures them where spaces have bounds.
enum { EXPLAINED_VARIANCE, CLIPPED, RANGE, STD, BROKEN, OUTSIDE, STEPS, REWARDS, EPISODES, RETURNS, LENGTHS, LATEST };

typedef struct {
  long steps, envs;
  const float *rewards, *values, *next_values, *returns;
  const unsigned char *terminated, *truncated, *done, *valid;  // valid may be null: every row counts
  const float *obs;                                            // after each step; null: they need no check
  long obs_size;                                               // of one row
  long max_episodes;
  double *open;  // [2][envs] returns and lengths so far of unfinished episodes
} Rollout;

static int counts(const Rollout *r, long i) { return !r->valid || r->valid[i]; }

// 1 - Var[returns - values] / Var[returns]
static double explained_variance(const Rollout *r, double n) {
  double error = 0, target = 0, noise = 0, spread = 0;
  for (long i = 0; i < r->steps * r->envs; i++)
    if (counts(r, i)) error += r->returns[i] - r->values[i], target += r->returns[i];
  error /= n > 1 ? n : 1, target /= n > 1 ? n : 1;
  for (long i = 0; i < r->steps * r->envs; i++)
    if (counts(r, i)) {
      double e = r->returns[i] - r->values[i] - error, x = r->returns[i] - target;
      noise += e * e, spread += x * x;
    }
  return spread > 0 ? 1 - noise / spread : NAN;
}

void measure(const Rollout *r, double *out) {
  long n = r->steps * r->envs, ended = 0, broken = 0, rows = 0;
  double *latest = out + LATEST, rewards = 0, returns = 0, lengths = 0;
  for (long i = 0; i < 3 * r->max_episodes; i++) latest[i] = NAN;
  for (long t = 0, i = 0; t < r->steps; t++)
    for (long k = 0; k < r->envs; k++, i++) {
      if (counts(r, i)) {
        rows++, rewards += r->rewards[i], r->open[k] += r->rewards[i], r->open[r->envs + k] += 1;
        broken += !isfinite(r->rewards[i]);
      }
      broken += r->truncated[i] && !r->terminated[i] && isfinite(r->values[i]) && !isfinite(r->next_values[i]);
      if (!r->done[i]) continue;
      long at = ended++ % (r->max_episodes ? r->max_episodes : 1);
      returns += r->open[k], lengths += r->open[r->envs + k];
      if (r->max_episodes) {
        latest[at] = r->open[k];
        latest[r->max_episodes + at] = r->open[r->envs + k];
        latest[2 * r->max_episodes + at] = (double)t;
      }
      r->open[k] = r->open[r->envs + k] = 0;
    }
  // the ring's latest entry first
  long filled = ended < r->max_episodes ? ended : r->max_episodes, start = filled ? ended % r->max_episodes : 0;
  for (long part = 0; part < 3; part++) {
    double *x = latest + part * r->max_episodes, sorted[filled + 1];
    for (long i = 0; i < filled; i++) sorted[i] = x[(start + 2 * filled - 1 - i) % filled];
    for (long i = 0; i < filled; i++) x[i] = sorted[i];
  }
  if (r->obs)
    for (long i = 0; i < n * r->obs_size; i++) broken += !isfinite(r->obs[i]);
  out[EXPLAINED_VARIANCE] = explained_variance(r, (double)rows), out[CLIPPED] = 0, out[RANGE] = out[STD] = NAN;
  out[BROKEN] = broken > 0, out[OUTSIDE] = 0, out[STEPS] = (double)rows, out[REWARDS] = rewards;
  out[EPISODES] = (double)ended, out[RETURNS] = returns, out[LENGTHS] = lengths;
}
