// Products of small matrices by vectors of the machine's own width, written with the compiler's vector extensions.
#ifndef FASTPPO_PRODUCTS_H
#define FASTPPO_PRODUCTS_H

#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define PANEL (2 * WIDTH)  // columns of a panel: two vectors

typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int integers __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

static inline long padded(long n) { return (n + PANEL - 1) / PANEL * PANEL; }

// Rows of a buffer begin this many numbers apart. The gap of a cache line keeps the rows of a column in different sets.
static inline long stride_of(long n) { return padded(n) + 16; }

// Pack b[k][n], read at b[k * row + n * column], into panels of PANEL columns, [n / PANEL][k][PANEL], zeros beyond n.
static void pack_panels(long k, long n, const float *b, long row, long column, float *panels) {
  for (long first = 0; first < n; first += PANEL, panels += k * PANEL) {
    long width = n - first < PANEL ? n - first : PANEL;
    const float *from = b + first * column;
    if (width < PANEL) memset(panels, 0, (size_t)(k * PANEL) * sizeof(float));
    if (column == 1)
      for (long i = 0; i < k; i++) memcpy(panels + i * PANEL, from + i * row, (size_t)width * sizeof(float));
    else
      for (long j = 0; j < width; j++)
        for (long i = 0; i < k; i++) panels[i * PANEL + j] = from[i * row + j * column];
  }
}

// Element (i, j) is at[i * row + j * step]
typedef struct {
  const float *at;
  long row, step;
} Matrix;

// Element (i, j) is at[j / PANEL * panel + i * row + j % PANEL]: panels have panel = rows * PANEL and row = PANEL, rows of
// a multiple of PANEL columns have panel = PANEL
typedef struct {
  const float *at;
  long row, panel;
} Columns;

// One tile: c[R][PANEL] = start[R][PANEL] + a[R][k] b[k][PANEL]
#define DEFINE_TILE(R)                                                                                             \
  static inline void tile##R(long k, Matrix a, Columns b, Matrix start, float *c, long stride_c) {                 \
    vector sum[R][2];                                                                                              \
    for (int i = 0; i < R; i++) {                                                                                  \
      const float *from = start.at + i * start.row;                                                                \
      sum[i][0] = *(const vector *)from, sum[i][1] = *(const vector *)(from + WIDTH);                              \
    }                                                                                                              \
    const float *row = b.at, *column = a.at;                                                                       \
    for (long j = 0; j < k; j++, row += b.row, column += a.step) {                                                 \
      vector left = *(const vector *)row, right = *(const vector *)(row + WIDTH);                                  \
      _Pragma("GCC unroll 6") for (int i = 0; i < R; i++) {                                                        \
        float x = column[i * a.row];                                                                               \
        sum[i][0] += x * left, sum[i][1] += x * right;                                                             \
      }                                                                                                            \
    }                                                                                                              \
    for (int i = 0; i < R; i++)                                                                                    \
      *(vector *)(c + i * stride_c) = sum[i][0], *(vector *)(c + i * stride_c + WIDTH) = sum[i][1];                \
  }
DEFINE_TILE(1)
DEFINE_TILE(2)
DEFINE_TILE(3)
DEFINE_TILE(4)
DEFINE_TILE(5)
DEFINE_TILE(6)

// c[m][n] = start[m][n] + a[m][k] b[k][n]; start and c have padded(n) columns, and start may be c
static void multiply(long m, long n, long k, Matrix a, Columns b, Matrix start, float *c, long stride_c) {
  long tiles = (m + 5) / 6;
  for (long j = 0; j < n; j += PANEL)
    for (long tile = 0, i = 0; tile < tiles; tile++) {
      long rows = (m - i + tiles - tile - 1) / (tiles - tile);  // as even as possible
      Matrix left = {a.at + i * a.row, a.row, a.step}, first = {start.at + i * start.row + j, start.row, 1};
      Columns right = {b.at + j / PANEL * b.panel, b.row, b.panel};
      float *to = c + i * stride_c + j;
      switch (rows) {
        case 6: tile6(k, left, right, first, to, stride_c); break;
        case 5: tile5(k, left, right, first, to, stride_c); break;
        case 4: tile4(k, left, right, first, to, stride_c); break;
        case 3: tile3(k, left, right, first, to, stride_c); break;
        case 2: tile2(k, left, right, first, to, stride_c); break;
        case 1: tile1(k, left, right, first, to, stride_c); break;
      }
      i += rows;
    }
}

// c[m][n] += a[m][k] b[k][n], b in panels; c has padded(n) columns
static inline void add_product(long m, long n, long k, const float *a, long stride_a, const float *panels, float *c,
                               long stride_c) {
  multiply(m, n, k, (Matrix){a, stride_a, 1}, (Columns){panels, PANEL, k * PANEL}, (Matrix){c, stride_c, 1}, c, stride_c);
}

// The next WIDTH numbers of a row of which `left` remain; zeros beyond its end
static inline vector take(const float *row, long left) {
  if (left >= WIDTH) return *(const vector *)row;
  vector x = {0};
  memcpy(&x, row, (size_t)left * sizeof(float));
  return x;
}

static inline void put(float *row, vector x, long left) {
  if (left >= WIDTH)
    *(vector *)row = x;
  else
    memcpy(row, &x, (size_t)left * sizeof(float));
}

#endif
