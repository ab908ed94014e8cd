// SPDX-License-Identifier: GPL-2.0-only
/*
 * extents.c of the module as a program, by the clock of a processor that is not emulated:
 * 2^20 pages, which are a pool of 4 GiB. See the Makefile.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "extents.h"

#define PAGES	(1UL << 20)
#define LONGEST	32		/* pages of a random buffer */
#define BATCH	32		/* operations, */
#define REPEATS	64		/* repeated, of which the quickest counts */
#define BATCHES	2000

enum { EVERY_SECOND, SOME, ALL };

static struct kucomms_extents extents;
static uint32_t *first, *length, count;
static uint64_t seed = 1;

static uint32_t draw(uint32_t below)
{
	seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
	return (seed >> 33) % below;
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ULL + time.tv_nsec;
}

static void most(uint64_t *value, uint64_t since)
{
	uint64_t took = now() - since;

	if (took > *value)
		*value = took;
}

static void fragment(int pattern)
{
	struct kucomms_extent *entries = calloc(PAGES, sizeof(*entries));
	uint32_t i, kept = 0, pages = 1;

	memset(entries, 0, PAGES * sizeof(*entries));
	kucomms_init_extents(&extents, entries, PAGES);
	for (count = 0; count < PAGES; count++) {
		if (pattern == SOME)
			pages = 1 + draw(LONGEST);
		first[count] = kucomms_take_extent(&extents, pages);
		length[count] = pages;
		if (first[count] == PAGES)
			break;
	}
	for (i = 0; i < count; i++) {
		if ((pattern == EVERY_SECOND && i % 2) || (pattern == SOME && draw(2))) {
			kucomms_free_extent(&extents, first[i], length[i]);
		} else {
			first[kept] = first[i];
			length[kept++] = length[i];
		}
	}
	count = kept;
}

/* One repetition: the longest allocation, failure, free. */
static void once(uint32_t at, uint64_t times[3])
{
	uint64_t since;
	uint32_t i, k;

	memset(times, 0, 3 * sizeof(*times));
	for (i = 0; i < BATCH; i++) {
		k = (at + i * 7919) % count;
		if (first[k] == PAGES)
			continue;
		since = now();
		kucomms_free_extent(&extents, first[k], length[k]);
		most(&times[2], since);
	}
	for (i = 0; i < BATCH; i++) {
		k = (at + i * 7919) % count;
		since = now();
		if (kucomms_take_extent(&extents, PAGES / 4) != PAGES)
			abort();
		most(&times[1], since);
		since = now();
		first[k] = kucomms_take_extent(&extents, length[k]);
		most(&times[0], since);
	}
}

static void measure(const char *name, int pattern)
{
	uint64_t longest[3] = { 0 }, best[3], times[3];
	uint32_t batch, repeat, at, i;

	fragment(pattern);
	for (batch = 0; batch < BATCHES; batch++) {
		at = draw(count);
		memset(best, 0xff, sizeof(best));
		for (repeat = 0; repeat < REPEATS; repeat++) {
			once(at, times);
			for (i = 0; i < 3; i++)
				if (times[i] < best[i])
					best[i] = times[i];
		}
		for (i = 0; i < 3; i++)
			if (best[i] > longest[i])
				longest[i] = best[i];
	}
	printf("%-12s  allocation %.2f us, failure %.2f us, free %.2f us\n", name,
	       longest[0] / 1e3, longest[1] / 1e3, longest[2] / 1e3);
	free(extents.entries);
}

/* All that is done with interrupts off for one buffer of a pool of the user. */
static void measure_bits(void)
{
	static struct kucomms_used used;
	uint64_t best = UINT64_MAX, took, since;
	int i;

	used.bits = calloc(PAGES / 8, 1);
	for (i = 0; i < 1000; i++) {
		kucomms_mark_used(&used, 1, PAGES - 1, true);
		since = now();
		kucomms_mark_used(&used, 1, PAGES - 1, false);
		took = now() - since;
		if (took < best)
			best = took;
	}
	printf("%-12s  cleared in %.2f us\n", "bits", best / 1e3);
	free(used.bits);
}

int main(void)
{
	first = calloc(PAGES + 1, sizeof(*first));
	length = calloc(PAGES + 1, sizeof(*length));
	measure("every second", EVERY_SECOND);
	measure("random", SOME);
	measure("all", ALL);
	measure_bits();
	return 0;
}
