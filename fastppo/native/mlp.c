// The PPO update of a policy of fully connected layers: a minibatch from gather to gradient in blocks of rows that stay
// in a core's cache, then clipping and Adam. Definitions: functional/losses.py, ppo/update_step.py, functional/adam.py.
#include "activations.h"
#include "distributions.h"
#include "products.h"
#include "threads.h"

#include <string.h>

#define MOST_LAYERS 8
#define MOST_BLOCK 96          // rows
#define BLOCK_FLOATS 65536     // of all buffers of a block, so that they stay in the second cache
#define FORBIDDEN -1e8f        // logit of an action that the mask forbids
#define PARALLEL_SIZE 32768    // parameters from which the work on them is divided among threads
#define N_DIAGNOSTICS 7

enum { POLICY_LOSS, VALUE_LOSS, ENTROPY, OLD_APPROX_KL, APPROX_KL, EXACT_KL, CLIP_FRACTION };
enum { VALUE_CLIP_OFF, VALUE_CLIP_MAX, VALUE_CLIPPED_ONLY };

typedef struct {
  long weight, bias;  // where they lie in the vector of parameters; weights are [out][in]
} Linear;

typedef struct {
  long features, actor_features;  // of an observation; the actor reads the first of them
  long n_layers;                  // hidden layers of a trunk
  long widths[MOST_LAYERS];
  long activation;
  long shared;                     // whether policy and value share the critic's trunk
  long outputs;                    // of the actor's head
  Linear critic[MOST_LAYERS + 1];  // hidden layers, then the head
  Linear actor[MOST_LAYERS + 1];
  long free_std;  // whether log standard deviations are parameters of their own
  long log_std;   // where they lie
  long size;     // of the vector of parameters
  Distribution distribution;
  long params;  // of the distribution
} Network;

// Rows of a rollout: the features, then the columns named; -1: there is none
typedef struct {
  const float *at;
  long width;
  long mask, old, action, logprob, advantage, target, value, valid;
} Rows;

typedef struct {
  long clips, penalizes, value_clip;
} Loss;

typedef struct {
  const float *learning_rate, *clip, *value_clip, *value, *entropy, *max_norm, *kl;
} Coefficients;

// See ppo/update_step.py and PPOUpdate; `exact_kl` is whether the sums end with those of exact KLs, `stops_epochs` whether
// the mean KL of an epoch is compared with `epoch_limit`
typedef struct {
  float *params, *mean, *square;
  double *left1, *left2;
  float *sums, *kl_limit, *stop_kl, *skipped, *epoch_limit, *last_kl;
  long exact_kl, stops_epochs;
  float adam_eps;
} State;

// A linear layer, and where its parts lie in the workspace
typedef struct {
  long in, out;
  Linear at;
  long forward, backward, bias;                        // shared: weights in panels, padded bias
  long gradient, gradient_row, turned, bias_gradient;  // of a part; a turned gradient is [in][out]
  int reads_obs;
} Layer;

typedef struct {
  const Network *net;
  Layer layers[2 * (MOST_LAYERS + 1)];
  long n_layers, trunks[2], heads[2];  // where the layers of critic and actor begin; a shared trunk is the critic's
  long n_trunks, block;                // block: rows at a time
  long inputs, hidden[2][MOST_LAYERS], before[2][MOST_LAYERS], slopes[MOST_LAYERS];  // buffers of a part: a block's rows
  long out[2], d_out[2], work, bounded;
  long log_std_gradient, gradient_end;  // gradients of a part begin at 0
  long zeros, flat;                     // shared: a row of zeros, and the gradient in the parameters' order
  long part_size, shared_size;          // floats
} Plan;

static long take_space(long *end, long n) {
  long at = *end;
  *end += padded(n);
  return at;
}

// Heads of few outputs are dot products: a panel would be mostly padding
static int uses_dots(long in, long out) { return out * (in / WIDTH + 5) < 2 * in * (padded(out) / PANEL); }

static void plan_layer(Plan *plan, long in, long out, Linear at, int reads_obs) {
  Layer *layer = &plan->layers[plan->n_layers++];
  *layer = (Layer){.in = in, .out = out, .at = at, .turned = in < out, .reads_obs = reads_obs};
  layer->forward = take_space(&plan->shared_size, in * padded(out));
  layer->backward = take_space(&plan->shared_size, out * padded(in));
  layer->bias = take_space(&plan->shared_size, out);
  layer->gradient_row = padded(layer->turned ? out : in);
  layer->gradient = take_space(&plan->gradient_end, (layer->turned ? in : out) * layer->gradient_row);
  layer->bias_gradient = take_space(&plan->gradient_end, out);
}

static void make_plan(Plan *plan, const Network *net) {
  *plan = (Plan){.net = net, .n_trunks = net->shared ? 1 : 2};
  for (int t = 0; t < 2; t++) {
    const Linear *at = t ? net->actor : net->critic;
    plan->trunks[t] = t < plan->n_trunks ? plan->n_layers : plan->trunks[0];
    for (long l = 0, in = t ? net->actor_features : net->features; t < plan->n_trunks && l < net->n_layers; l++) {
      plan_layer(plan, in, net->widths[l], at[l], l == 0);
      in = net->widths[l];
    }
    plan->heads[t] = plan->n_layers;
    plan_layer(plan, net->widths[net->n_layers - 1], t ? net->outputs : 1, at[net->n_layers], 0);
  }
  if (net->free_std) plan->log_std_gradient = take_space(&plan->gradient_end, net->outputs);
  plan->flat = take_space(&plan->shared_size, net->size);
  long row = stride_of(net->features), widest = 0;
  for (long l = 0; l < net->n_layers; l++) {
    row += stride_of(net->widths[l]) * (1 + plan->n_trunks * (1 + reads_input((int)net->activation)));
    if (net->widths[l] > widest) widest = net->widths[l];
  }
  plan->zeros = take_space(&plan->shared_size, widest);
  plan->block = BLOCK_FLOATS / row / 6 * 6;
  if (plan->block > MOST_BLOCK) plan->block = MOST_BLOCK;
  if (plan->block < 6) plan->block = 6;
  long end = plan->gradient_end, m = plan->block;
  plan->inputs = take_space(&end, m * stride_of(net->features));
  for (int t = 0; t < plan->n_trunks; t++)
    for (long l = 0; l < net->n_layers; l++) {
      plan->hidden[t][l] = take_space(&end, m * stride_of(net->widths[l]));
      plan->before[t][l] = plan->hidden[t][l];
      if (reads_input((int)net->activation)) plan->before[t][l] = take_space(&end, m * stride_of(net->widths[l]));
    }
  for (long l = 0; l < net->n_layers; l++) plan->slopes[l] = take_space(&end, m * stride_of(net->widths[l]));
  for (int t = 0; t < 2; t++) {
    plan->out[t] = take_space(&end, m * stride_of(t ? net->params : 1));
    plan->d_out[t] = take_space(&end, m * stride_of(t ? net->params : 1));
  }
  plan->work = take_space(&end, 5 * net->params * WIDTH + net->distribution.n * WIDTH);
  plan->bounded = take_space(&end, 2 * net->distribution.n * (long)(sizeof(Bounded) / sizeof(float)));
  plan->part_size = (end + 63) / 64 * 64;
  plan->shared_size = (plan->shared_size + 63) / 64 * 64;
}

// Floats of the workspace of `threads` threads; it must be zero at first
long mlp_workspace(const Network *net, int threads) {
  Plan plan;
  make_plan(&plan, net);
  return plan.shared_size + threads * plan.part_size;
}

typedef struct {
  const Plan *plan;
  const Rows *rows;
  const Loss *loss;
  const Coefficients *coefs;
  const State *state;
  const float *params;
  const int64_t *order;
  float mean, divisor;  // of the advantages
  long n, n_valid;      // rows of the minibatch; those that count
  int parts;
  float *shared, *workspace;
  double sums[MOST_PARTS][N_DIAGNOSTICS], squares[MOST_PARTS];
  float scale, step_size, correction;  // of the gradient; of Adam's step
} Job;

// Numbers between two rows of a layer's inputs; the actor may read a part of a row of features
static long input_row(const Plan *plan, const Layer *layer) {
  return stride_of(layer->reads_obs ? plan->net->features : layer->in);
}

static float *part_of(const Job *job, int part) { return job->workspace + part * job->plan->part_size; }

static void pack_part(void *arguments, int part) {
  Job *job = arguments;
  for (long i = 0, item = 0; i < job->plan->n_layers; i++) {
    const Layer *layer = &job->plan->layers[i];
    const float *weight = job->params + layer->at.weight;
    if (item++ % job->parts == part) {
      pack_panels(layer->in, layer->out, weight, 1, layer->in, job->shared + layer->forward);
      memcpy(job->shared + layer->bias, job->params + layer->at.bias, (size_t)layer->out * sizeof(float));
    }
    if (!layer->reads_obs && item++ % job->parts == part)
      pack_panels(layer->out, layer->in, weight, layer->in, 1, job->shared + layer->backward);
  }
}

// out[m][out] = bias + x[m][in] weight^T
static void run_layer(const Job *job, const Layer *layer, long m, const float *x, long row_x, float *out, long row_out) {
  const float *bias = job->shared + layer->bias;
  if (uses_dots(layer->in, layer->out)) {
    const float *weight = job->params + layer->at.weight;
    long whole = layer->in / WIDTH * WIDTH;
    for (long i = 0; i < m; i++)
      for (long o = 0; o < layer->out; o++) {
        const float *a = x + i * row_x, *b = weight + o * layer->in;
        vector sum = {0};
        for (long k = 0; k < whole; k += WIDTH) sum += *(const vector *)(a + k) * *(const vector *)(b + k);
        float total = bias[o];
        for (int k = 0; k < WIDTH; k++) total += sum[k];
        for (long k = whole; k < layer->in; k++) total += a[k] * b[k];
        out[i * row_out + o] = total;
      }
    return;
  }
  multiply(m, layer->out, layer->in, (Matrix){x, row_x, 1},
           (Columns){job->shared + layer->forward, PANEL, layer->in * PANEL}, (Matrix){bias, 0, 1}, out, row_out);
}

// Add the gradient of a layer's weights, for inputs x and gradients d of its outputs, to those of a part
static void add_weight_gradient(const Layer *layer, long m, const float *x, long row_x, const float *d, long row_d,
                                float *part) {
  float *c = part + layer->gradient;
  Matrix left = layer->turned ? (Matrix){x, 1, row_x} : (Matrix){d, 1, row_d};
  Columns right = layer->turned ? (Columns){d, row_d, PANEL} : (Columns){x, row_x, PANEL};
  long rows = layer->turned ? layer->in : layer->out, n = layer->turned ? layer->out : layer->in;
  multiply(rows, n, m, left, right, (Matrix){c, layer->gradient_row, 1}, c, layer->gradient_row);
}

static void gather(const Job *job, long first, long m, float *x) {
  long n = job->plan->net->features, row = stride_of(n);
  for (long i = 0; i < m; i++)
    memcpy(x + i * row, job->rows->at + job->order[first + i] * job->rows->width, (size_t)n * sizeof(float));
}

// The losses of values `v`, and their gradients
static inline vector value_loss(const Loss *loss, vector v, vector old, vector target, float limit, vector *gradient) {
  vector error = v - target, plain = error * error;
  *gradient = error;
  if (loss->value_clip == VALUE_CLIP_OFF) return 0.5f * plain;
  if (limit < 0) limit = INFINITY;
  vector step = v - old, kept = at_most(at_least(step, -limit), limit);
  vector clipped_error = old + kept - target, clipped = clipped_error * clipped_error;
  vector clipped_gradient = choose(magnitude(step) > all(limit), all(0.0f), clipped_error);
  if (loss->value_clip == VALUE_CLIPPED_ONLY) {
    *gradient = clipped_gradient;
    return 0.5f * clipped;
  }
  integers larger = clipped > plain, equal = clipped == plain;  // gradients as torch.maximum divides them
  *gradient = choose(larger, clipped_gradient, choose(equal, 0.5f * (error + clipped_gradient), error));
  return 0.5f * choose(larger, clipped, plain);
}

// Column `at` of WIDTH rows
static inline vector column(const float *const *rows, long at) {
  vector x;
  for (int k = 0; k < WIDTH; k++) x[k] = rows[k][at];
  return x;
}

// Space for the numbers of WIDTH rows: the distribution's parameters, those of the acting policy, actions, gradients
typedef struct {
  vector *x, *old, *action;
  Gradients g;
} Lanes;

static Lanes lanes_at(float *work, const Network *net) {
  vector *x = (vector *)work;
  long n = net->params;
  return (Lanes){x, x + n, x + 5 * n, {x + 2 * n, x + 3 * n, x + 4 * n}};
}

// Gradients and diagnostics of the losses of `left` rows (at most WIDTH) of a block, from its row `at` on. The block
// starts at row `first` of the minibatch.
static void evaluate_lanes(const Job *job, long first, long at, long left, float *own, vector *sums) {
  const Plan *plan = job->plan;
  const Network *net = plan->net;
  const Rows *rows = job->rows;
  const Coefficients *coefs = job->coefs;
  Lanes lanes = lanes_at(own + plan->work, net);
  vector *x = lanes.x;
  const Gradients g = lanes.g;
  const float *row[WIDTH], *out[WIDTH];
  float *d_out[WIDTH], *values = own + plan->out[0], *d_values = own + plan->d_out[0];
  long row_p = stride_of(net->params), row_v = stride_of(1);
  integers counts;
  vector v;
  for (long k = 0; k < WIDTH; k++) {  // lanes beyond the last row repeat the first, and don't count
    long i = k < left ? at + k : at;
    row[k] = rows->at + job->order[first + i] * rows->width;
    out[k] = own + plan->out[1] + i * row_p, d_out[k] = own + plan->d_out[1] + i * row_p;
    counts[k] = -(k < left && (rows->valid < 0 || row[k][rows->valid] != 0));
    v[k] = values[i * row_v];
  }
  for (long j = 0; j < net->params; j++) {
    x[j] = net->free_std && j >= net->outputs ? all(job->params[net->log_std + j - net->outputs]) : column(out, j);
    if (rows->mask >= 0) x[j] = choose(column(row, rows->mask + j) > all(0.0f), x[j], all(FORBIDDEN));
    lanes.old[j] = column(row, rows->old + j);
  }
  for (long j = 0; j < net->distribution.n; j++) lanes.action[j] = column(row, rows->action + j);
  Evaluation e = evaluate(&net->distribution, x, lanes.old, lanes.action, (Bounded *)(own + plan->bounded), g);

  vector logratio = e.logprob - column(row, rows->logprob), zero = {0};
  Exponential ratios = exponential(logratio);
  vector ratio = ratios.whole, advantage = (column(row, rows->advantage) - job->mean) / job->divisor;
  vector surrogate = ratio * advantage;
  integers finite = is_finite(ratio);
  vector by_logprob = choose(finite, -surrogate, all(NAN));  // a NaN makes the step skip the minibatch, as in torch
  float clip = *coefs->clip, share = 1.0f / (float)(job->n_valid ? job->n_valid : 1);
  if (job->loss->clips) {
    vector clipped = at_most(at_least(ratio, 1 - clip), 1 + clip) * advantage;
    integers cut = finite & (surrogate > clipped);  // false for NaN, so a NaN stays
    surrogate = choose(cut, clipped, surrogate), by_logprob = choose(cut, zero, by_logprob);
  }
  for (long j = 0; j < net->params; j++) {
    vector slope = by_logprob * g.logprob[j] - *coefs->entropy * g.entropy[j];
    if (job->loss->penalizes) slope += *coefs->kl * g.kl[j];
    integers reached = counts;
    if (rows->mask >= 0) reached &= column(row, rows->mask + j) > all(0.0f);
    vector d = choose(reached, share * slope, zero);
    for (long k = 0; k < left; k++) d_out[k][j] = d[k];
    if (net->free_std && j >= net->outputs)
      for (long k = 0; k < left; k++) own[plan->log_std_gradient + j - net->outputs] += d[k];
  }
  vector by_value, value = value_loss(job->loss, v, column(row, rows->value), column(row, rows->target),
                                      *coefs->value_clip, &by_value);
  by_value = choose(counts, share * *coefs->value * by_value, zero);
  for (long k = 0; k < left; k++) d_values[(at + k) * row_v] = by_value[k];
  sums[POLICY_LOSS] -= choose(counts, surrogate, zero), sums[VALUE_LOSS] += choose(counts, value, zero);
  sums[ENTROPY] += choose(counts, e.entropy, zero), sums[EXACT_KL] += choose(counts, e.kl, zero);
  sums[OLD_APPROX_KL] -= choose(counts, logratio, zero);
  sums[APPROX_KL] += choose(counts, ratios.less_one - logratio, zero);
  sums[CLIP_FRACTION] += choose(counts & (magnitude(ratios.less_one) > all(clip)), all(1.0f), zero);
}

// The losses of a block's rows: from outputs to their gradients
static void evaluate_rows(const Job *job, long first, long m, float *own, double *sums) {
  vector block[N_DIAGNOSTICS] = {{0}};
  for (long i = 0; i < m; i += WIDTH) evaluate_lanes(job, first, i, m - i < WIDTH ? m - i : WIDTH, own, block);
  for (int s = 0; s < N_DIAGNOSTICS; s++)
    for (int k = 0; k < WIDTH; k++) sums[s] += (double)block[s][k];
}

// out[m][in] = start + d[m][out] weight
static void run_back(const Job *job, const Layer *layer, long m, const float *d, long row_d, Matrix start, float *out) {
  multiply(m, layer->in, layer->out, (Matrix){d, row_d, 1},
           (Columns){job->shared + layer->backward, PANEL, layer->out * PANEL}, start, out, stride_of(layer->in));
}

// The gradients of head t, for features x
static void add_head_gradient(const Plan *plan, int t, long m, const float *x, float *own) {
  const Layer *head = &plan->layers[plan->heads[t]];
  const float *d = own + plan->d_out[t];
  long row = stride_of(t ? plan->net->params : 1);
  add_weight_gradient(head, m, x, stride_of(head->in), d, row, own);
  for (long i = 0; i < m; i++)
    for (long o = 0; o < head->out; o++) own[head->bias_gradient + o] += d[i * row + o];
}

// Back through the hidden layers of trunk t, from the gradient of the last one's outputs in its buffer
static void back_through_trunk(const Job *job, int t, long m, float *own) {
  const Plan *plan = job->plan;
  for (long l = plan->net->n_layers - 1; l >= 0; l--) {
    const Layer *layer = &plan->layers[plan->trunks[t] + l];
    float *d = own + plan->slopes[l];
    const float *x = own + (l ? plan->hidden[t][l - 1] : plan->inputs);
    deactivate((int)plan->net->activation, m, padded(layer->out), own + plan->before[t][l], own + plan->hidden[t][l], d,
               stride_of(layer->out), own + layer->bias_gradient);
    add_weight_gradient(layer, m, x, input_row(plan, layer), d, stride_of(layer->out), own);
    if (l)
      run_back(job, layer, m, d, stride_of(layer->out), (Matrix){job->shared + plan->zeros, 0, 1},
               own + plan->slopes[l - 1]);
  }
}

static void run_trunk(const Job *job, int t, long m, float *own) {
  const Plan *plan = job->plan;
  const float *x = own + plan->inputs;
  for (long l = 0; l < plan->net->n_layers; l++) {
    const Layer *layer = &plan->layers[plan->trunks[t] + l];
    float *z = own + plan->before[t][l], *h = own + plan->hidden[t][l];
    run_layer(job, layer, m, x, input_row(plan, layer), z, stride_of(layer->out));
    activate((int)plan->net->activation, m, padded(layer->out), z, h, stride_of(layer->out));
    x = h;
  }
}

// The gradient of this part's rows
static void differentiate_part(void *arguments, int part) {
  Job *job = arguments;
  const Plan *plan = job->plan;
  const Network *net = plan->net;
  float *own = part_of(job, part);
  forget((Bounded *)(own + plan->bounded), 2 * net->distribution.n);
  memset(own, 0, (size_t)plan->gradient_end * sizeof(float));
  memset(job->sums[part], 0, sizeof job->sums[part]);
  long last = net->n_layers - 1, end = job->n * (part + 1) / job->parts;
  for (long first = job->n * part / job->parts; first < end; first += plan->block) {
    long m = end - first < plan->block ? end - first : plan->block;
    gather(job, first, m, own + plan->inputs);
    for (int t = 0; t < plan->n_trunks; t++) run_trunk(job, t, m, own);
    for (int t = 0; t < 2; t++) {
      const Layer *head = &plan->layers[plan->heads[t]];
      const float *x = own + plan->hidden[t % plan->n_trunks][last];
      run_layer(job, head, m, x, stride_of(head->in), own + plan->out[t], stride_of(t ? net->params : 1));
    }
    evaluate_rows(job, first, m, own, job->sums[part]);
    float *slopes = own + plan->slopes[last];
    Matrix none = {job->shared + plan->zeros, 0, 1};
    for (int t = 0; t < 2; t++) {
      const Layer *head = &plan->layers[plan->heads[t]];
      add_head_gradient(plan, t, m, own + plan->hidden[t % plan->n_trunks][last], own);
      Matrix start = t && net->shared ? (Matrix){slopes, stride_of(head->in), 1} : none;
      run_back(job, head, m, own + plan->d_out[t], stride_of(t ? net->params : 1), start, slopes);
      if (t || !net->shared) back_through_trunk(job, t % plan->n_trunks, m, own);
    }
  }
}

static double sum_of_squares(const float *x, long n) {
  double total = 0;
  for (long first = 0; first < n; first += 1024) {
    vector sum = {0};
    long end = n - first < 1024 ? n : first + 1024;
    for (long i = first; i < end; i += WIDTH) {
      vector y = take(x + i, end - i);
      sum += y * y;
    }
    for (int k = 0; k < WIDTH; k++) total += (double)sum[k];
  }
  return total;
}

// Slice `part` of n
static long from(long n, int part, int parts) { return n * part / parts; }

// Sum the parts' gradients of a slice of each layer into the parameters' order
static void collect_slice(Job *job, int slice, int slices) {
  const Plan *plan = job->plan;
  float *flat = job->shared + plan->flat;
  double squares = 0;
  for (long k = 0; k < plan->n_layers; k++) {
    const Layer *layer = &plan->layers[k];
    long first = from(layer->out, slice, slices), end = from(layer->out, slice + 1, slices);
    for (long o = first; o < end; o++) {
      float *to = flat + layer->at.weight + o * layer->in;
      for (int part = 0; part < job->parts; part++) {
        const float *c = part_of(job, part) + layer->gradient + o * (layer->turned ? 1 : layer->gradient_row);
        long step = layer->turned ? layer->gradient_row : 1;
        if (part == 0)
          for (long i = 0; i < layer->in; i++) to[i] = c[i * step];
        else
          for (long i = 0; i < layer->in; i++) to[i] += c[i * step];
      }
      float bias = 0;
      for (int part = 0; part < job->parts; part++) bias += part_of(job, part)[layer->bias_gradient + o];
      flat[layer->at.bias + o] = bias;
    }
    squares += sum_of_squares(flat + layer->at.weight + first * layer->in, (end - first) * layer->in);
    squares += sum_of_squares(flat + layer->at.bias + first, end - first);
  }
  if (plan->net->free_std && slice == 0) {
    float *to = flat + plan->net->log_std;
    for (long i = 0; i < plan->net->outputs; i++) {
      to[i] = 0;
      for (int part = 0; part < job->parts; part++) to[i] += part_of(job, part)[plan->log_std_gradient + i];
    }
    squares += sum_of_squares(to, plan->net->outputs);
  }
  job->squares[slice] = squares;
}

static void collect_part(void *arguments, int part) { collect_slice(arguments, part, ((Job *)arguments)->parts); }

// Adam on a slice of the parameters
static void step_slice(const Job *job, long first, long end) {
  const State *state = job->state;
  const float *restrict gradient = job->shared + job->plan->flat;
  float *restrict params = state->params, *restrict mean = state->mean, *restrict square = state->square;
  float scale = job->scale, step_size = job->step_size, correction = job->correction, eps = state->adam_eps;
  for (long i = first; i < end; i++) {
    float g = gradient[i] * scale;
    mean[i] += (1 - 0.9f) * (g - mean[i]);
    square[i] = 0.999f * square[i] + 0.001f * g * g;
    params[i] -= step_size * mean[i] / (sqrtf(square[i]) * correction + eps);
  }
}

static void step_part(void *arguments, int part) {
  Job *job = arguments;
  long n = job->plan->net->size;
  step_slice(job, from(n, part, job->parts), from(n, part + 1, job->parts));
}

static int is_large(const Job *job) { return job->plan->net->size >= PARALLEL_SIZE; }

static void pack(Job *job) {
  int parts = job->parts;
  if (!is_large(job)) job->parts = 1;
  run_parts(pack_part, job, job->parts);
  job->parts = parts;
}

// The gradient of a minibatch, flat, its squared norm, and the means of the diagnostics
static double differentiate(Job *job, float *diagnostics) {
  const Rows *rows = job->rows;
  job->n_valid = job->n;
  if (rows->valid >= 0) {
    job->n_valid = 0;
    for (long i = 0; i < job->n; i++) job->n_valid += rows->at[job->order[i] * rows->width + rows->valid] != 0;
  }
  pack(job);
  run_parts(differentiate_part, job, job->parts);
  double squares = 0;
  if (is_large(job)) {
    run_parts(collect_part, job, job->parts);
    for (int part = 0; part < job->parts; part++) squares += job->squares[part];
  } else {
    collect_slice(job, 0, 1);
    squares = job->squares[0];
  }
  for (int k = 0; k < N_DIAGNOSTICS; k++) {
    double sum = 0;
    for (int part = 0; part < job->parts; part++) sum += job->sums[part][k];
    diagnostics[k] = (float)(sum / (double)(job->n_valid ? job->n_valid : 1));
  }
  return squares;
}

static void begin(Job *job, Plan *plan, const Network *net, const float *params, int parts, float *workspace) {
  make_plan(plan, net);
  job->plan = plan, job->params = params, job->parts = parts < MOST_PARTS ? parts : MOST_PARTS;
  job->shared = workspace, job->workspace = workspace + plan->shared_size;
}

// The gradient [size] of a minibatch of n rows, the means of its diagnostics, and the number of rows that count
void mlp_gradient(const Network *net, const Rows *rows, const Loss *loss, const Coefficients *coefs, const float *params,
                  const int64_t *order, const float *scale, long n, int parts, float *workspace, float *gradient,
                  float *diagnostics, float *n_valid) {
  Plan plan;
  Job job = {.rows = rows, .loss = loss, .coefs = coefs, .order = order, .mean = scale[0], .divisor = scale[1], .n = n};
  begin(&job, &plan, net, params, parts, workspace);
  differentiate(&job, diagnostics);
  memcpy(gradient, job.shared + plan.flat, (size_t)net->size * sizeof(float));
  *n_valid = (float)job.n_valid;
}

// A step on the minibatch of `job`; the state follows ppo/update_step.py
static void take_step(Job *job) {
  const State *state = job->state;
  float *sums = state->sums, *counts = sums + N_DIAGNOSTICS + 1, diagnostics[N_DIAGNOSTICS];
  float norm = (float)sqrt(differentiate(job, diagnostics)), kl = diagnostics[APPROX_KL], limit = *state->kl_limit;
  int within = kl <= limit || limit == INFINITY, finite = isfinite(norm) != 0, take = within && finite;
  if (take) {
    for (int k = 0; k < N_DIAGNOSTICS; k++) sums[k] += diagnostics[k];
    sums[N_DIAGNOSTICS] += norm;
    *state->left1 *= 0.9, *state->left2 *= 0.999;
    job->scale = *job->coefs->max_norm / (norm + 1e-6f);
    if (job->scale > 1) job->scale = 1;
    job->step_size = (float)((double)*job->coefs->learning_rate / (1 - *state->left1));
    job->correction = (float)(1 / sqrt(1 - *state->left2));
    if (is_large(job))
      run_parts(step_part, job, job->parts);
    else
      step_slice(job, 0, job->plan->net->size);
  }
  counts[0] += (float)take, counts[1] += (float)within, counts[2] += kl;
  if (state->exact_kl && !isnan(diagnostics[EXACT_KL])) counts[3] += diagnostics[EXACT_KL], counts[4] += 1;
  state->skipped[0] = finite ? 0 : state->skipped[0] + 1;
  if (state->skipped[0] > state->skipped[1]) state->skipped[1] = state->skipped[0];
  if (!within) *state->stop_kl = kl, *state->kl_limit = -INFINITY;
}

// What PPOUpdate._end_epoch does after an epoch of n minibatches
static void end_epoch(const State *state, long n) {
  float *of_epoch = state->sums + N_DIAGNOSTICS + 3;
  if (state->exact_kl) {
    if (of_epoch[2] > 0) *state->last_kl = of_epoch[1] / of_epoch[2];
    of_epoch[1] = of_epoch[2] = 0;
  }
  if (!state->stops_epochs) return;
  float kl = of_epoch[0] / (float)n;
  if (!(kl <= *state->epoch_limit) && *state->epoch_limit != INFINITY) *state->stop_kl = kl, *state->kl_limit = -INFINITY;
  of_epoch[0] = 0;
}

// Epochs of a step on each of `minibatches` of n rows: order[epochs][minibatches][n], scales[epochs][minibatches][2].
// Returns early once the KL has stopped the update: the steps left would change nothing.
void mlp_epochs(const Network *net, const Rows *rows, const Loss *loss, const Coefficients *coefs, const State *state,
                const int64_t *order, const float *scales, long epochs, long minibatches, long n, int parts,
                float *workspace) {
  Plan plan;
  Job job = {.rows = rows, .loss = loss, .coefs = coefs, .state = state, .n = n};
  begin(&job, &plan, net, state->params, parts, workspace);
  for (long epoch = 0; epoch < epochs && *state->kl_limit != -INFINITY; epoch++) {
    for (long i = 0; i < minibatches && *state->kl_limit != -INFINITY; i++, order += n, scales += 2) {
      job.order = order, job.mean = scales[0], job.divisor = scales[1];
      take_step(&job);
    }
    end_epoch(state, minibatches);
  }
}

// Pack the parameters into a workspace, for mlp_act and mlp_values
void mlp_pack(const Network *net, const float *params, float *workspace) {
  Plan plan;
  Job job = {0};
  begin(&job, &plan, net, params, 1, workspace);
  pack(&job);
}

// How observations become features: (x - mean) scale within +-clip, in float64; or x / divisor where mean is null
typedef struct {
  const double *mean, *scale;
  float clip, divisor;
} Input;

// Environments that act together; each `..._step` is the distance in bytes from one time step to the next
typedef struct {
  const Network *net;
  const float *params;
  const Input *input;
  const char *obs, *noise;
  char *outputs, *actions;
  long obs_step, noise_step, outputs_step, actions_step;
  long n;
  float *workspace;
  int parts;
} Group;

typedef struct {
  Job job;
  const Input *input;
  const float *obs, *noise;
  long rows, trunk;
  float *params, *values;
  int64_t *choices;  // actions of a categorical or Bernoulli distribution
  float *numbers;    // of a Gaussian
} Forward;

static void read_input(const Input *input, long n, const float *obs, float *x) {
  if (input->mean == NULL) {
    for (long k = 0; k < n; k++) x[k] = input->divisor == 1 ? obs[k] : obs[k] / input->divisor;
    return;
  }
  for (long k = 0; k < n; k++) {
    float y = (float)(((double)obs[k] - input->mean[k]) * input->scale[k]);
    x[k] = y > input->clip ? input->clip : y < -input->clip ? -input->clip : y;
  }
}

// Draw the action of one row from parameters x and noise; `bounded` keeps an entry for each vector of components
static void sample_row(const Distribution *d, const float *x, const float *noise, int64_t *choice, float *number,
                       Bounded *bounded) {
  if (d->kind >= GAUSSIAN) {
    for (long i = 0; i < d->n; i += WIDTH, bounded++) {
      bound(bounded, take(x + d->n + i, d->n - i));
      put(number + i, take(x + i, d->n - i) + bounded->std * take(noise + i, d->n - i), d->n - i);
    }
    return;
  }
  for (long i = 0; i < d->n; i++) {
    if (d->kind == BERNOULLI) {
      choice[i] = x[i] + noise[i] > 0;
      continue;
    }
    long best = 0;
    float most = x[0] + noise[0];
    for (long k = 1; k < d->nvec[i]; k++)
      if (x[k] + noise[k] > most) most = x[k] + noise[k], best = k;
    choice[i] = best, x += d->nvec[i], noise += d->nvec[i];
  }
}

static void forward_part(void *arguments, int part) {
  Forward *f = arguments;
  Job *job = &f->job;
  const Plan *plan = job->plan;
  const Network *net = plan->net;
  const Distribution *d = &net->distribution;
  float *own = part_of(job, part);
  Bounded *bounded = (Bounded *)(own + plan->bounded);
  forget(bounded, d->n);
  int t = (int)f->trunk, body = t % (int)plan->n_trunks;
  const Layer *head = &plan->layers[plan->heads[t]];
  long end = from(f->rows, part + 1, job->parts), row_x = stride_of(net->features), row = stride_of(t ? net->params : 1);
  for (long first = from(f->rows, part, job->parts); first < end; first += plan->block) {
    long m = end - first < plan->block ? end - first : plan->block;
    for (long i = 0; i < m; i++)
      read_input(f->input, net->features, f->obs + (first + i) * net->features, own + plan->inputs + i * row_x);
    run_trunk(job, body, m, own);
    run_layer(job, head, m, own + plan->hidden[body][net->n_layers - 1], stride_of(head->in), own + plan->out[t], row);
    for (long i = 0; i < m; i++) {
      float *out = own + plan->out[t] + i * row;
      long at = first + i;
      if (t == 0) {
        f->values[at] = out[0];
        continue;
      }
      if (net->free_std) memcpy(out + net->outputs, job->params + net->log_std, (size_t)net->outputs * sizeof(float));
      memcpy(f->params + at * net->params, out, (size_t)net->params * sizeof(float));
      long n_noise = d->kind == CATEGORICAL ? net->params : d->n;
      sample_row(d, out, f->noise + at * n_noise, f->choices + at * d->n, f->numbers + at * d->n, bounded);
    }
  }
}

static void forward(Forward *f, const Network *net, const float *params, int parts, float *workspace) {
  Plan plan;
  begin(&f->job, &plan, net, params, parts, workspace);
  run_parts(forward_part, f, f->job.parts);
}

// Act for step t of a group, with the parameters in its workspace: write the distribution's parameters and the actions
void mlp_act(const Group *g, long t) {
  Forward f = {.input = g->input, .rows = g->n, .trunk = 1};
  f.obs = (const float *)(g->obs + t * g->obs_step), f.noise = (const float *)(g->noise + t * g->noise_step);
  f.params = (float *)(g->outputs + t * g->outputs_step);
  f.choices = (int64_t *)(g->actions + t * g->actions_step), f.numbers = (float *)f.choices;
  forward(&f, g->net, g->params, g->parts, g->workspace);
}

typedef struct {
  Job job;
  const float *params;
  const int64_t *choices;
  const float *numbers;
  long rows;
  float *logprobs;
} Logprobs;

static void logprobs_part(void *arguments, int part) {
  const Logprobs *l = arguments;
  const Plan *plan = l->job.plan;
  const Network *net = plan->net;
  const Distribution *d = &net->distribution;
  float *own = part_of(&l->job, part);
  Bounded *bounded = (Bounded *)(own + plan->bounded);
  Lanes lanes = lanes_at(own + plan->work, net);
  forget(bounded, 2 * d->n);
  long end = from(l->rows, part + 1, l->job.parts);
  for (long first = from(l->rows, part, l->job.parts); first < end; first += WIDTH) {
    long left = end - first < WIDTH ? end - first : WIDTH;
    const float *row[WIDTH];
    for (long k = 0; k < WIDTH; k++) row[k] = l->params + (k < left ? first + k : first) * net->params;
    for (long j = 0; j < net->params; j++) lanes.x[j] = column(row, j);
    for (long j = 0; j < d->n; j++)
      for (long k = 0; k < WIDTH; k++) {
        long at = (k < left ? first + k : first) * d->n + j;
        lanes.action[j][k] = d->kind >= GAUSSIAN ? l->numbers[at] : (float)l->choices[at];
      }
    vector logprob = evaluate(d, lanes.x, lanes.x, lanes.action, bounded, lanes.g).logprob;
    put(l->logprobs + first, logprob, left);
  }
}

// Write the log-probabilities of n actions, by the code of the update: before its first step every ratio is then 1
void mlp_logprobs(const Network *net, const float *params, const void *actions, long n, int parts, float *workspace,
                  float *logprobs) {
  Plan plan;
  Logprobs l = {.params = params, .choices = actions, .numbers = actions, .rows = n, .logprobs = logprobs};
  begin(&l.job, &plan, net, NULL, parts, workspace);
  run_parts(logprobs_part, &l, l.job.parts);
}

// Write V of n rows of obs
void mlp_values(const Network *net, const float *params, const Input *input, const float *obs, long n, int parts,
                float *workspace, float *values) {
  Forward f = {.input = input, .obs = obs, .rows = n, .trunk = 0, .values = values};
  forward(&f, net, params, parts, workspace);
}
