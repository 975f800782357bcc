// A pool of threads that sleep between calls. A thread that waits spins for at most some 50 us, and lets others have its
// core meanwhile: where another program uses the other cores, it waits for a thread on its own.
#ifndef FASTPPO_THREADS_H
#define FASTPPO_THREADS_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define MOST_PARTS 64
#define SPIN_NANOSECONDS 50000
#define HELD_NANOSECONDS 2000  // of these; then the core is offered

typedef void (*Task)(void *arguments, int part);

static struct {
  pthread_mutex_t owner;  // held by the caller whose parts are running
  pthread_mutex_t lock;   // guards the conditions
  pthread_cond_t begin, end;
  atomic_long round;
  atomic_int left;  // parts of this round that other threads still work on
  int n_threads;
  long first_round[MOST_PARTS];  // the round at which each thread was made
  Task task;
  void *arguments;
  int parts;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .begin = PTHREAD_COND_INITIALIZER,
          .end = PTHREAD_COND_INITIALIZER};

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

// One turn of a wait that began at `since`; 0 once it is time to sleep
static int spin(int64_t since) {
  for (int i = 0; i < 32; i++) relax();
  int64_t waited = nanoseconds() - since;
  if (waited > HELD_NANOSECONDS) sched_yield();
  return waited < SPIN_NANOSECONDS;
}

static void *work(void *number) {
  int part = (int)(intptr_t)number;
  long seen = pool.first_round[part];
  for (;;) {
    for (int64_t since = nanoseconds(); atomic_load(&pool.round) == seen && spin(since);) continue;
    if (atomic_load(&pool.round) == seen) {
      pthread_mutex_lock(&pool.lock);
      while (atomic_load(&pool.round) == seen) pthread_cond_wait(&pool.begin, &pool.lock);
      pthread_mutex_unlock(&pool.lock);
    }
    seen = atomic_load(&pool.round);
    if (part < pool.parts) pool.task(pool.arguments, part);
    // every thread reports, so that none still reads this round when the next begins
    if (atomic_fetch_sub(&pool.left, 1) == 1) {
      pthread_mutex_lock(&pool.lock);
      pthread_cond_signal(&pool.end);
      pthread_mutex_unlock(&pool.lock);
    }
  }
  return NULL;
}

// A forked child has none of its parent's threads, and may have its locks in any state.
static void forget_threads(void) {
  pool.n_threads = 0;
  pthread_mutex_init(&pool.owner, NULL);
  pthread_mutex_init(&pool.lock, NULL);
  pthread_cond_init(&pool.begin, NULL);
  pthread_cond_init(&pool.end, NULL);
}

static void start_threads(int n) {
  static int registered = 0;
  if (!registered) registered = pthread_atfork(NULL, NULL, forget_threads) == 0;
  while (pool.n_threads < n) {
    pthread_t thread;
    pool.first_round[pool.n_threads + 1] = atomic_load(&pool.round);
    if (pthread_create(&thread, NULL, work, (void *)(intptr_t)(pool.n_threads + 1))) return;
    pthread_detach(thread);
    pool.n_threads++;
  }
}

// Call task(arguments, part) for each part below `parts`, in as many threads; in this one alone if others use the pool.
static void run_parts(Task task, void *arguments, int parts) {
  if (parts > MOST_PARTS) parts = MOST_PARTS;
  if (parts > 1 && pthread_mutex_trylock(&pool.owner) == 0) {
    start_threads(parts - 1);
    int ready = pool.n_threads + 1 < parts ? 0 : 1;  // the system may refuse a thread
    if (ready) {
      pool.task = task, pool.arguments = arguments, pool.parts = parts;
      atomic_store(&pool.left, pool.n_threads);
      pthread_mutex_lock(&pool.lock);
      atomic_fetch_add(&pool.round, 1);
      pthread_cond_broadcast(&pool.begin);
      pthread_mutex_unlock(&pool.lock);
      task(arguments, 0);
      for (int64_t since = nanoseconds(); atomic_load(&pool.left) && spin(since);) continue;
      pthread_mutex_lock(&pool.lock);
      while (atomic_load(&pool.left)) pthread_cond_wait(&pool.end, &pool.lock);
      pthread_mutex_unlock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.owner);
    if (ready) return;
  }
  for (int part = 0; part < parts; part++) task(arguments, part);
}

#endif
