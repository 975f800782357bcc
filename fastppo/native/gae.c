// GAE by the backward recursion; the definition is that of functional/gae.py. The environments of a step lie next to each
// other, so the compiler takes several at once. A NaN reward stays within its episode.

// One step of n environments; `later` are the advantages of the next one
static void step(long n, const float *rewards, const float *values, const float *next_values,
                 const unsigned char *terminated, const unsigned char *done, float gamma, float decay, const float *later,
                 float *advantages, float *restrict returns) {
#pragma GCC ivdep
  for (long i = 0; i < n; i++) {
    // a choice, not a product with the mask: the next value of a terminal row may be NaN
    float future = terminated[i] ? 0.0f : next_values[i];
    float advantage = rewards[i] + gamma * future - values[i] + (done[i] ? 0.0f : decay * later[i]);
    advantages[i] = advantage;
    returns[i] = advantage + values[i];
  }
}

void gae(long steps, long n, const float *rewards, const float *values, const float *next_values,
         const unsigned char *terminated, const unsigned char *done, const float *gamma, const float *gae_lambda,
         float *advantages, float *returns) {
  for (long i = 0; steps && i < n; i++) advantages[(steps - 1) * n + i] = 0.0f;
  const float *later = advantages + (steps - 1) * n;
  for (long t = steps - 1; t >= 0; t--) {
    long at = t * n;
    step(n, rewards + at, values + at, next_values + at, terminated + at, done + at, *gamma,
         *gamma * *gae_lambda, later, advantages + at, returns + at);
    later = advantages + at;
  }
}
