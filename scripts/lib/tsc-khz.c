/* Prints the frequency of this machine's time stamp counter in kHz, measured against the monotonic clock. */
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

struct moment {
	uint64_t tsc;
	double seconds;
};

/* Both clocks at one time: of many tries the one that was interrupted least. */
static struct moment now(void)
{
	struct moment best = { 0, 0 };
	uint64_t least = UINT64_MAX;

	for (int i = 0; i < 200; i++) {
		struct timespec t;
		uint64_t before = __rdtsc(), after;

		clock_gettime(CLOCK_MONOTONIC, &t);
		after = __rdtsc();
		if (after - before < least) {
			least = after - before;
			best.tsc = before + least / 2;
			best.seconds = t.tv_sec + t.tv_nsec / 1e9;
		}
	}
	return best;
}

int main(void)
{
	struct timespec pause = { 0, 300000000 };
	struct moment a = now(), b;

	nanosleep(&pause, NULL);
	b = now();
	printf("%.0f\n", (b.tsc - a.tsc) / (b.seconds - a.seconds) / 1000);
	return 0;
}
