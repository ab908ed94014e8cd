/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What core_bench.c, which forks, pins, times and prints, and the measurements
 * know of each other.
 */
#ifndef CORE_BENCH_H
#define CORE_BENCH_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <kucomms/channel.h>

#define CACHE_LINE	64
#define RING_SIZE	(1u << 20)	/* the default of an endpoint */

#define CHECK(condition)						\
	do {								\
		if (__builtin_expect(!(condition), 0)) {		\
			fprintf(stderr, "%s:%d: %s: not so: %s\n",	\
				__FILE__, __LINE__, __func__,		\
				#condition);				\
			_exit(1);					\
		}							\
	} while (0)

enum unit {
	UNIT_NS,
	UNIT_GBS,
	UNIT_MESSAGES,
};

struct measurement;

/* One of the two processes of a measurement. */
struct side {
	const struct measurement *measurement;
	unsigned int number;		/* 0 begins and has the clock, 1 */
	int fd;				/* the memory shared by both */
	uint64_t offset;		/* of this measurement's part of it */
	unsigned char *shared;		/* that part, mapped */
	int eventfd[2];			/* to side 0, to side 1 */
	unsigned char *out;		/* private: what is sent */
	unsigned char *in;		/* private: where it is received */
	void *state;			/* of the measurement */
};

/**
 * struct measurement - one thing to measure
 * @name: as printed
 * @unit: of the value
 * @size: bytes of a message as its user sees it
 * @shared: bytes of shared memory that it needs
 * @open: each process: prepare own part of the memory, may be NULL
 * @attach: each, after open() of both: look at the other's, may be NULL
 * @run: side 0 and 1: do it that many times. No [1]: side 0 is alone
 * @close: each, may be NULL
 * @also: NULL, or the unit in which the same run is printed once more
 * @missing: NULL, or why it cannot run
 */
struct measurement {
	const char *name;
	enum unit unit;
	uint32_t size;
	uint64_t (*shared)(const struct measurement *measurement);
	void (*open)(struct side *side);
	void (*attach)(struct side *side);
	void (*run[2])(struct side *side, uint64_t times);
	void (*close)(struct side *side);
	const char *also;
	const char *missing;
};

/* Each is ended by one without a name. */
extern const struct measurement bare_measurements[];
extern const struct measurement channel_measurements[];
extern const struct measurement ck_measurements[];

extern int single_threaded;	/* --single-threaded */

/* The compiler must think that these bytes are read. */
static inline void consume(const void *data)
{
	__asm__ __volatile__("" : : "r" (data) : "memory");
}

/* The same, and that they are changed: they are not known at the next copy. */
static inline void produce(void *data)
{
	__asm__ __volatile__("" : "+r" (data) : : "memory");
}

#endif /* CORE_BENCH_H */
