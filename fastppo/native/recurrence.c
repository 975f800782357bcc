// The recurrences of fastppo/functional/recurrence.py, forwards and backwards, for float32 on a CPU. All arrays are
// contiguous: T steps of N sequences with H units. Each thread owns some of the sequences, so the number of threads
// changes no bit of the results. The functions return 0, or 1 if there is no memory.
#include <stdlib.h>

#include "elementary.h"
#include "threads.h"

typedef struct {
  long steps, sequences, units;
  int parts, gates;
  const unsigned char *starts;  // [T, N]
  const float *panels;          // the packed recurrent weight
  float *scratch;               // for each part
  long scratch_size;
  const float *in[12];
  float *out[8];
} Scan;

static long first_sequence(const Scan *scan, int part) { return scan->sequences * part / scan->parts; }

// Rows of scratch: `columns` numbers for each of the part's sequences
static long largest_part(const Scan *scan) { return (scan->sequences + scan->parts - 1) / scan->parts; }

// Pack `weight` [gates * H, H] for a product with h (transposed) or with the gates' gradients, each gate padded
static float *pack_weight(const Scan *scan, const float *weight, int backward) {
  long units = scan->units, wide = padded(units), rows = scan->gates * wide;
  float *panels = aligned_alloc(64, (size_t)(rows * wide) * sizeof(float));
  if (!panels) return NULL;
  if (backward) {
    // rows of the gates' gradients, one block of padded rows for each gate; a panel holds all of them
    for (long first = 0; first < wide; first += PANEL)
      for (long gate = 0; gate < scan->gates; gate++)
        for (long i = 0; i < wide; i++)
          for (long j = 0; j < PANEL; j++)
            panels[(first * scan->gates + gate * PANEL) * wide + i * PANEL + j] =
                i < units && first + j < units ? weight[(gate * units + i) * units + first + j] : 0.0f;
  } else {
    for (long gate = 0; gate < scan->gates; gate++)
      pack_panels(units, units, weight + gate * units * units, 1, units, panels + gate * units * wide);
  }
  return panels;
}

// z[m][gates][wide] = h W^T
static void project(const Scan *scan, long m, const float *h, long wide, float *z) {
  for (int gate = 0; gate < scan->gates; gate++)
    add_product(m, wide, scan->units, h, wide, scan->panels + gate * scan->units * wide, z + gate * wide,
                scan->gates * wide);
}

static int run(Scan *scan, Task task, const float *weight, int backward, int columns, int threads) {
  scan->parts = threads < 1 ? 1 : threads > MOST_PARTS ? MOST_PARTS : threads;
  if (scan->parts > scan->sequences) scan->parts = (int)scan->sequences;
  long wide = padded(scan->units);
  scan->scratch_size = (largest_part(scan) * columns * wide + 15) / 16 * 16;
  float *panels = pack_weight(scan, weight, backward);
  scan->scratch = aligned_alloc(64, (size_t)(scan->scratch_size * scan->parts) * sizeof(float));
  int failed = !panels || !scan->scratch;
  if (!failed) {
    scan->panels = panels;
    memset(scan->scratch, 0, (size_t)(scan->scratch_size * scan->parts) * sizeof(float));
    run_parts(task, scan, scan->parts);
  }
  free(panels), free(scan->scratch);
  return failed;
}

static void lstm_forward_part(void *arguments, int part) {
  const Scan *scan = arguments;
  long H = scan->units, N = scan->sequences, wide = padded(H);
  long first = first_sequence(scan, part), m = first_sequence(scan, part + 1) - first;
  float *h = scan->scratch + part * scan->scratch_size, *c = h + m * wide, *z = c + m * wide;
  const float *gates = scan->in[0];
  float *outputs = scan->out[0], *activated = scan->out[3], *cells = scan->out[4], *tanh_cells = scan->out[5];
  for (long s = 0; s < m; s++) {
    memcpy(h + s * wide, scan->in[1] + (first + s) * H, (size_t)H * sizeof(float));
    memcpy(c + s * wide, scan->in[2] + (first + s) * H, (size_t)H * sizeof(float));
  }
  for (long t = 0; t < scan->steps; t++) {
    for (long s = 0; s < m; s++) {
      long row = t * N + first + s;
      if (scan->starts[row]) {
        memset(h + s * wide, 0, (size_t)H * sizeof(float));
        memset(c + s * wide, 0, (size_t)H * sizeof(float));
      }
      for (int gate = 0; gate < 4; gate++)
        memcpy(z + (s * 4 + gate) * wide, gates + (row * 4 + gate) * H, (size_t)H * sizeof(float));
    }
    project(scan, m, h, wide, z);
    for (long s = 0; s < m; s++) {
      long row = t * N + first + s;
      const float *pre = z + s * 4 * wide;
      float *cell = c + s * wide, *hidden = h + s * wide, *act = activated + row * 4 * H;
      float kept = scan->starts[row] ? 0.0f : 1.0f;
      for (long j = 0, left = H; j < H; j += WIDTH, left -= WIDTH) {
        vector i = sigmoid(*(vector *)(pre + j)), f = sigmoid(*(vector *)(pre + wide + j));
        vector g = rational_tanh(*(vector *)(pre + 2 * wide + j)), o = sigmoid(*(vector *)(pre + 3 * wide + j));
        vector next = f * *(vector *)(cell + j) + i * g, curved = rational_tanh(next), out = o * curved;
        put(act + j, i, left), put(act + H + j, f * kept, left);
        put(act + 2 * H + j, g, left), put(act + 3 * H + j, o, left);
        put(cell + j, next, left), put(hidden + j, out, left);
        put(cells + row * H + j, next, left), put(tanh_cells + row * H + j, curved, left);
        put(outputs + row * H + j, out, left);
      }
    }
  }
  for (long s = 0; s < m; s++) {
    memcpy(scan->out[1] + (first + s) * H, h + s * wide, (size_t)H * sizeof(float));
    memcpy(scan->out[2] + (first + s) * H, c + s * wide, (size_t)H * sizeof(float));
  }
}

int lstm_forward(long steps, long sequences, long units, int threads, const float *gates, const float *weight,
                 const unsigned char *starts, const float *hidden, const float *cell, float *outputs, float *last_hidden,
                 float *last_cell, float *activated, float *cells, float *tanh_cells) {
  Scan scan = {.steps = steps, .sequences = sequences, .units = units, .gates = 4, .starts = starts,
               .in = {gates, hidden, cell},
               .out = {outputs, last_hidden, last_cell, activated, cells, tanh_cells}};
  return run(&scan, lstm_forward_part, weight, 0, 6, threads);
}

static void lstm_backward_part(void *arguments, int part) {
  const Scan *scan = arguments;
  long H = scan->units, N = scan->sequences, wide = padded(H);
  long first = first_sequence(scan, part), m = first_sequence(scan, part + 1) - first;
  float *dh = scan->scratch + part * scan->scratch_size, *dc = dh + m * wide, *d = dc + m * wide;
  const float *grad_outputs = scan->in[0], *initial = scan->in[3], *activated = scan->in[4], *cells = scan->in[5];
  const float *tanh_cells = scan->in[6];
  float *grads = scan->out[0];
  for (long s = 0; s < m; s++) {
    if (scan->in[1]) memcpy(dh + s * wide, scan->in[1] + (first + s) * H, (size_t)H * sizeof(float));
    if (scan->in[2]) memcpy(dc + s * wide, scan->in[2] + (first + s) * H, (size_t)H * sizeof(float));
  }
  for (long t = scan->steps - 1; t >= 0; t--) {
    for (long s = 0; s < m; s++) {
      long row = t * N + first + s;
      const float *act = activated + row * 4 * H, *before = t ? cells + (row - N) * H : initial + (first + s) * H;
      float *grad = grads + row * 4 * H, *delta = d + s * 4 * wide, *dh_s = dh + s * wide, *dc_s = dc + s * wide;
      int start = scan->starts[row];
      for (long j = 0, left = H; j < H; j += WIDTH, left -= WIDTH) {
        vector i = take(act + j, left), f = take(act + H + j, left), g = take(act + 2 * H + j, left);
        vector o = take(act + 3 * H + j, left), x = take(tanh_cells + row * H + j, left), zero = {0};
        vector of_hidden = *(vector *)(dh_s + j);
        if (grad_outputs) of_hidden += take(grad_outputs + row * H + j, left);
        vector of_cell = *(vector *)(dc_s + j) + of_hidden * o * (1 - x * x);
        vector di = of_cell * g * i * (1 - i), dg = of_cell * i * (1 - g * g), d_o = of_hidden * x * o * (1 - o);
        vector df = of_cell * take(before + j, left) * f * (1 - f), earlier = of_cell * f;
        if (start) df = zero, earlier = zero;
        put(grad + j, di, left), put(grad + H + j, df, left), put(grad + 2 * H + j, dg, left);
        put(grad + 3 * H + j, d_o, left);
        put(delta + j, di, left), put(delta + wide + j, df, left), put(delta + 2 * wide + j, dg, left);
        put(delta + 3 * wide + j, d_o, left);
        put(dc_s + j, earlier, left);
      }
    }
    memset(dh, 0, (size_t)(m * wide) * sizeof(float));
    add_product(m, wide, 4 * wide, d, 4 * wide, scan->panels, dh, wide);
    for (long s = 0; s < m; s++)
      if (scan->starts[t * N + first + s]) memset(dh + s * wide, 0, (size_t)wide * sizeof(float));
  }
  for (long s = 0; s < m; s++) {
    memcpy(scan->out[1] + (first + s) * H, dh + s * wide, (size_t)H * sizeof(float));
    memcpy(scan->out[2] + (first + s) * H, dc + s * wide, (size_t)H * sizeof(float));
  }
}

// grad_outputs, grad_hidden and grad_cell may be NULL: zeros
int lstm_backward(long steps, long sequences, long units, int threads, const float *grad_outputs,
                  const float *grad_hidden, const float *grad_cell, const float *weight, const unsigned char *starts,
                  const float *cell, const float *activated, const float *cells, const float *tanh_cells, float *grads,
                  float *grad_first_hidden, float *grad_first_cell) {
  Scan scan = {.steps = steps, .sequences = sequences, .units = units, .gates = 4, .starts = starts,
               .in = {grad_outputs, grad_hidden, grad_cell, cell, activated, cells, tanh_cells},
               .out = {grads, grad_first_hidden, grad_first_cell}};
  return run(&scan, lstm_backward_part, weight, 1, 6, threads);
}

static void gru_forward_part(void *arguments, int part) {
  const Scan *scan = arguments;
  long H = scan->units, N = scan->sequences, wide = padded(H);
  long first = first_sequence(scan, part), m = first_sequence(scan, part + 1) - first;
  float *h = scan->scratch + part * scan->scratch_size, *z = h + m * wide;
  const float *gates = scan->in[0], *bias = scan->in[1];
  float *outputs = scan->out[0], *activated = scan->out[2], *candidates = scan->out[3];
  for (long s = 0; s < m; s++) memcpy(h + s * wide, scan->in[2] + (first + s) * H, (size_t)H * sizeof(float));
  for (long t = 0; t < scan->steps; t++) {
    for (long s = 0; s < m; s++) {
      long row = t * N + first + s;
      if (scan->starts[row]) memset(h + s * wide, 0, (size_t)H * sizeof(float));
      for (int gate = 0; gate < 3; gate++)
        memcpy(z + (s * 3 + gate) * wide, gate < 2 ? gates + (row * 3 + gate) * H : bias, (size_t)H * sizeof(float));
    }
    project(scan, m, h, wide, z);
    for (long s = 0; s < m; s++) {
      long row = t * N + first + s;
      const float *pre = z + s * 3 * wide, *gate_n = gates + (row * 3 + 2) * H;
      float *hidden = h + s * wide, *act = activated + row * 3 * H;
      for (long j = 0, left = H; j < H; j += WIDTH, left -= WIDTH) {
        vector r = sigmoid(*(vector *)(pre + j)), u = sigmoid(*(vector *)(pre + wide + j));
        vector inner = *(vector *)(pre + 2 * wide + j), n = rational_tanh(take(gate_n + j, left) + r * inner);
        vector next = n + u * (*(vector *)(hidden + j) - n);
        put(act + j, r, left), put(act + H + j, u, left), put(act + 2 * H + j, inner, left);
        put(candidates + row * H + j, n, left), put(hidden + j, next, left), put(outputs + row * H + j, next, left);
      }
    }
  }
  for (long s = 0; s < m; s++) memcpy(scan->out[1] + (first + s) * H, h + s * wide, (size_t)H * sizeof(float));
}

int gru_forward(long steps, long sequences, long units, int threads, const float *gates, const float *weight,
                const float *bias, const unsigned char *starts, const float *hidden, float *outputs, float *last_hidden,
                float *activated, float *candidates) {
  Scan scan = {.steps = steps, .sequences = sequences, .units = units, .gates = 3, .starts = starts,
               .in = {gates, bias, hidden},
               .out = {outputs, last_hidden, activated, candidates}};
  return run(&scan, gru_forward_part, weight, 0, 4, threads);
}

static void gru_backward_part(void *arguments, int part) {
  const Scan *scan = arguments;
  long H = scan->units, N = scan->sequences, wide = padded(H);
  long first = first_sequence(scan, part), m = first_sequence(scan, part + 1) - first;
  float *dh = scan->scratch + part * scan->scratch_size, *through = dh + m * wide, *d = through + m * wide;
  const float *grad_outputs = scan->in[0], *initial = scan->in[2], *outputs = scan->in[3], *activated = scan->in[4];
  const float *candidates = scan->in[5];
  float *grads = scan->out[0], *of_candidates = scan->out[1];
  if (scan->in[1])
    for (long s = 0; s < m; s++) memcpy(dh + s * wide, scan->in[1] + (first + s) * H, (size_t)H * sizeof(float));
  for (long t = scan->steps - 1; t >= 0; t--) {
    for (long s = 0; s < m; s++) {
      long row = t * N + first + s;
      const float *act = activated + row * 3 * H, *before = t ? outputs + (row - N) * H : initial + (first + s) * H;
      float *grad = grads + row * 3 * H, *delta = d + s * 3 * wide;
      int start = scan->starts[row];
      for (long j = 0, left = H; j < H; j += WIDTH, left -= WIDTH) {
        vector r = take(act + j, left), u = take(act + H + j, left), inner = take(act + 2 * H + j, left);
        vector n = take(candidates + row * H + j, left), zero = {0}, h = start ? zero : take(before + j, left);
        vector of_hidden = *(vector *)(dh + s * wide + j);
        if (grad_outputs) of_hidden += take(grad_outputs + row * H + j, left);
        vector dn = of_hidden * (1 - u) * (1 - n * n), da = dn * inner * r * (1 - r), dd = dn * r;
        vector db = of_hidden * (h - n) * u * (1 - u);
        put(grad + j, da, left), put(grad + H + j, db, left), put(grad + 2 * H + j, dd, left);
        put(delta + j, da, left), put(delta + wide + j, db, left), put(delta + 2 * wide + j, dd, left);
        put(of_candidates + row * H + j, dn, left), put(through + s * wide + j, of_hidden * u, left);
      }
    }
    memcpy(dh, through, (size_t)(m * wide) * sizeof(float));
    add_product(m, wide, 3 * wide, d, 3 * wide, scan->panels, dh, wide);
    for (long s = 0; s < m; s++)
      if (scan->starts[t * N + first + s]) memset(dh + s * wide, 0, (size_t)wide * sizeof(float));
  }
  for (long s = 0; s < m; s++) memcpy(scan->out[2] + (first + s) * H, dh + s * wide, (size_t)H * sizeof(float));
}

// grads are those of a, b and d; of_candidates that of gates_n. grad_outputs and grad_hidden may be NULL: zeros
int gru_backward(long steps, long sequences, long units, int threads, const float *grad_outputs,
                 const float *grad_hidden, const float *weight, const unsigned char *starts, const float *hidden,
                 const float *outputs, const float *activated, const float *candidates, float *grads,
                 float *of_candidates, float *grad_first_hidden) {
  Scan scan = {.steps = steps, .sequences = sequences, .units = units, .gates = 3, .starts = starts,
               .in = {grad_outputs, grad_hidden, hidden, outputs, activated, candidates},
               .out = {grads, of_candidates, grad_first_hidden}};
  return run(&scan, gru_backward_part, weight, 1, 5, threads);
}

// One step of `rows` states, for acting: gates and recurrent [rows, gates * H] are the projections of input and state.
void lstm_step(long rows, long H, const float *gates, const float *recurrent, const float *cell, float *new_hidden,
               float *new_cell) {
  for (long row = 0; row < rows; row++, gates += 4 * H, recurrent += 4 * H)
    for (long j = 0, at = row * H, left = H; j < H; j += WIDTH, at += WIDTH, left -= WIDTH) {
      vector z[4];
      for (long gate = 0; gate < 4; gate++) z[gate] = take(gates + gate * H + j, left) + take(recurrent + gate * H + j, left);
      vector next = sigmoid(z[1]) * take(cell + at, left) + sigmoid(z[0]) * rational_tanh(z[2]);
      put(new_cell + at, next, left), put(new_hidden + at, sigmoid(z[3]) * rational_tanh(next), left);
    }
}

void gru_step(long rows, long H, const float *gates, const float *recurrent, const float *bias, const float *hidden,
              float *new_hidden) {
  for (long row = 0; row < rows; row++, gates += 3 * H, recurrent += 3 * H)
    for (long j = 0, at = row * H, left = H; j < H; j += WIDTH, at += WIDTH, left -= WIDTH) {
      vector r = sigmoid(take(gates + j, left) + take(recurrent + j, left));
      vector u = sigmoid(take(gates + H + j, left) + take(recurrent + H + j, left));
      vector inner = take(recurrent + 2 * H + j, left) + take(bias + j, left);
      vector n = rational_tanh(take(gates + 2 * H + j, left) + r * inner);
      put(new_hidden + at, n + u * (take(hidden + at, left) - n), left);
    }
}

void mingru_step(long rows, long H, const float *gates, const float *hidden, float *new_hidden) {
  for (long row = 0; row < rows; row++, gates += 2 * H)
    for (long j = 0, at = row * H, left = H; j < H; j += WIDTH, at += WIDTH, left -= WIDTH) {
      vector h = take(hidden + at, left);
      put(new_hidden + at, h + sigmoid(take(gates + j, left)) * (take(gates + H + j, left) - h), left);
    }
}
