// Calls every function of mlp.c and gae.c with shapes that divide nothing, in several threads, for the sanitisers.
#include "gae.c"
#include "mlp.c"

#include <stdio.h>
#include <stdlib.h>

static float *numbers(long n) {
  float *x = malloc((size_t)n * sizeof(float));
  for (long i = 0; i < n; i++) x[i] = (float)((i * 37) % 19 - 9) / 10;
  return x;
}

static long add_layers(Linear *to, long n_layers, const long *widths, long in, long out, long at) {
  for (long l = 0; l <= n_layers; l++) {
    long width = l < n_layers ? widths[l] : out;
    to[l] = (Linear){at, at + in * width};
    at += in * width + width, in = width;
  }
  return at;
}

static int check(long kind, long features, const long *widths, long n_layers, long activation, long shared, int threads) {
  static const long nvec[] = {2, 5};
  long n = kind == CATEGORICAL ? 2 : 3, params = kind == CATEGORICAL ? 7 : kind == BERNOULLI ? 3 : 6;
  Network net = {.features = features, .actor_features = features, .n_layers = n_layers, .activation = activation};
  net.shared = shared, net.params = params, net.outputs = kind >= GAUSSIAN ? 3 : params, net.free_std = 0;
  net.distribution = (Distribution){kind, n, nvec};
  for (long l = 0; l < n_layers; l++) net.widths[l] = widths[l];
  long size = add_layers(net.critic, n_layers, widths, features, 1, 0);
  if (shared)
    size = add_layers(net.actor + n_layers, 0, widths, widths[n_layers - 1], net.outputs, size);
  else
    size = add_layers(net.actor, n_layers, widths, features, net.outputs, size);
  if (kind >= GAUSSIAN) net.free_std = 1, net.log_std = size, size += 3;
  net.size = size;

  long rows = 131, width = features + params + params + n + 5, at = features;
  Rows data = {.width = width, .mask = at, .old = at + params, .action = at + 2 * params};
  at += 2 * params + n;
  data.logprob = at, data.advantage = at + 1, data.target = at + 2, data.value = at + 3, data.valid = at + 4;
  float *table = numbers(rows * width), *vector = numbers(size), *mean = calloc((size_t)size, 4);
  float *square = calloc((size_t)size, 4), *workspace = calloc((size_t)mlp_workspace(&net, threads), 4);
  for (long i = 0; i < rows; i++)
    for (long k = 0; k < n; k++) table[i * width + data.action + k] = (float)((i + k) % 2);
  data.at = table;
  int64_t *order = malloc(128 * sizeof(int64_t));
  for (long i = 0; i < 128; i++) order[i] = (i * 7) % rows;
  float some[] = {1e-3f, 0.2f, 0.2f, 0.5f, 0.01f, 0.5f, 0.3f}, scales[] = {0, 1, 0.1f, 2};
  Coefficients coefs = {some, some + 1, some + 2, some + 3, some + 4, some + 5, some + 6};
  Loss loss = {1, 1, VALUE_CLIP_MAX};
  float sums[13] = {0}, limit = INFINITY, stop = 0, skipped[2] = {0};
  double left[] = {1, 1};
  float last;
  State state = {vector, mean, square, left, left + 1, sums, &limit, &stop, skipped, &limit, &last, 1, 1, 1e-5f};
  mlp_epochs(&net, &data, &loss, &coefs, &state, order, scales, 1, 2, 64, threads, workspace);
  float *gradient = calloc((size_t)size, 4), diagnostics[N_DIAGNOSTICS], n_valid;
  mlp_gradient(&net, &data, &loss, &coefs, vector, order, scales, 61, threads, workspace, gradient, diagnostics, &n_valid);

  float *obs = numbers(29 * features), *noise = numbers(29 * 7), *outputs = numbers(29 * params), *values = numbers(29);
  double *moments = calloc((size_t)features, sizeof(double));
  void *actions = calloc(29 * 3, 8);
  Input plain = {NULL, NULL, 0, 2}, normalized = {moments, moments, 5, 1};
  mlp_pack(&net, vector, workspace);
  Group group = {&net, vector, &plain, (char *)obs, (char *)noise, (char *)outputs, actions};
  group.n = 29, group.workspace = workspace, group.parts = threads;
  mlp_act(&group, 0);
  mlp_values(&net, vector, &normalized, obs, 29, threads, workspace, values);
  mlp_logprobs(&net, outputs, actions, 29, threads, workspace, values);
  int bad = sums[N_DIAGNOSTICS + 1] != 2 || !(n_valid > 0);
  free(table), free(vector), free(mean), free(square), free(workspace), free(order), free(gradient), free(obs);
  free(noise), free(outputs), free(values), free(moments), free(actions);
  return bad;
}

int main(void) {
  static const long narrow[] = {1}, odd[] = {33, 7, 70}, wide[] = {200, 190};
  int bad = 0;
  for (int threads = 1; threads <= 3; threads++)
    for (long kind = CATEGORICAL; kind <= SQUASHED; kind++) {
      bad |= check(kind, 1, narrow, 1, TANH, 0, threads);
      bad |= check(kind, 5, odd, 3, kind % 2 ? GELU : SILU, 1, threads);
      bad |= check(kind, 77, odd, 3, kind % 2 ? RELU : ELU, 0, threads);
    }
  bad |= check(GAUSSIAN, 10, wide, 2, TANH, 0, 2);
  bad |= check(CATEGORICAL, 5, odd, 3, TANH, 0, MOST_PARTS + 6);
  float x[6] = {1, 2, 3, 4, 5, 6}, out[12], gamma = 0.9f;
  unsigned char ends[6] = {0, 1, 0, 0, 0, 1};
  gae(2, 3, x, x, x, ends, ends, &gamma, &gamma, out, out + 6);
  puts(bad ? "wrong" : "done");
  return bad;
}
