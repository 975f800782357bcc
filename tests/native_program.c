// Calls every function of recurrence.c with sizes that divide nothing, in several threads, for the sanitisers.
#include "recurrence.c"

#include <stdio.h>

static float *numbers(long n) {
  float *x = malloc((size_t)n * sizeof(float));
  for (long i = 0; i < n; i++) x[i] = (float)((i * 37) % 19 - 9) / 10;
  return x;
}

static int check(long steps, long sequences, long units, int threads) {
  long rows = steps * sequences, state = sequences * units, failed = 0;
  unsigned char *starts = calloc((size_t)rows, 1);
  for (long i = 0; i < rows; i += 5) starts[i] = 1;
  float *gates = numbers(rows * 4 * units), *weight = numbers(4 * units * units), *h = numbers(state), *c = numbers(state);
  float *bias = numbers(units), *out = numbers(rows * units), *last_h = numbers(state), *last_c = numbers(state);
  float *act = numbers(rows * 4 * units), *cells = numbers(rows * units), *curved = numbers(rows * units);
  float *grads = numbers(rows * 4 * units);
  failed += lstm_forward(steps, sequences, units, threads, gates, weight, starts, h, c, out, last_h, last_c, act, cells, curved);
  failed += lstm_backward(steps, sequences, units, threads, out, NULL, last_c, weight, starts, c, act, cells, curved, grads, last_h, last_c);
  failed += gru_forward(steps, sequences, units, threads, gates, weight, bias, starts, h, out, last_h, act, cells);
  failed += gru_backward(steps, sequences, units, threads, NULL, last_h, weight, starts, h, out, act, cells, grads, curved, last_h);
  // single steps of rows that end where the arrays end
  float *end = gates + rows * 4 * units, *products = act + rows * 4 * units;
  lstm_step(sequences, units, end - state * 4, products - state * 4, c, last_h, last_c);
  gru_step(sequences, units, end - state * 3, products - state * 3, bias, h, last_h);
  mingru_step(sequences, units, end - state * 2, h, last_h);
  free(starts), free(gates), free(weight), free(h), free(c), free(bias), free(out), free(last_h), free(last_c), free(act);
  free(cells), free(curved), free(grads);
  return failed != 0;
}

int main(void) {
  int failed = 0;
  for (int threads = 1; threads <= 3; threads++)
    for (long units = 1; units <= 37; units += 9) failed |= check(7, 5, units, threads) | check(2, 1, units, threads);
  failed |= check(1, 23, 64, 2);
  puts(failed ? "no memory" : "done");
  return failed;
}
