/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Concurrency Kit's ck_ring, one producer and one consumer, for comparison: the
 * queue as it is published, with records of 96 bytes, what a kucomms message
 * with 64 bytes of data takes. It knows its buffer by an argument and holds
 * indices only, no pointers, so it can be shared by processes.
 */
#include "core_bench.h"

#ifdef HAVE_CK

#include <ck_ring.h>

/* A power of two, as ck_ring wants it: 768 KiB of records. */
#define RECORDS	8192

struct record {
	uint64_t header[4];
	unsigned char data[64];
};

CK_RING_PROTOTYPE(record, record)

/* One way; the ring is on lines of its own. */
struct queue {
	struct ck_ring ring __attribute__((aligned(2 * CACHE_LINE)));
	struct record records[RECORDS] __attribute__((aligned(2 * CACHE_LINE)));
};

static uint64_t two_queues(const struct measurement *m)
{
	(void)m;
	return 2 * sizeof(struct queue);
}

static void queue_open(struct side *side)
{
	struct queue *queue = (struct queue *)side->shared + side->number;

	ck_ring_init(&queue->ring, RECORDS);
}

/* The record is made in private memory; enqueue copies all of it. */
static int put(struct side *side, struct queue *queue, uint64_t id)
{
	struct record record = { .header = { 64, 1, id, 0 } };

	produce(side->out);
	memcpy(record.data, side->out, sizeof(record.data));
	return ck_ring_enqueue_spsc_record(&queue->ring, queue->records,
					   &record);
}

static int get(struct side *side, struct queue *queue)
{
	int got = ck_ring_dequeue_spsc_record(&queue->ring, queue->records,
					      (struct record *)side->in);

	if (got)
		consume(side->in);
	return got;
}

static uint64_t got_id(const struct side *side)
{
	return ((const struct record *)side->in)->header[2];
}

static void way_send(struct side *side, uint64_t times)
{
	struct queue *queue = (struct queue *)side->shared;

	while (times--)
		while (!put(side, queue, times))
			kucomms_cpu_relax();
}

static void way_receive(struct side *side, uint64_t times)
{
	struct queue *queue = (struct queue *)side->shared;

	while (times--) {
		while (!get(side, queue))
			kucomms_cpu_relax();
		CHECK(got_id(side) == times);
	}
}

static void trip_first(struct side *side, uint64_t times)
{
	struct queue *queue = (struct queue *)side->shared;

	while (times--) {
		CHECK(put(side, &queue[0], times));
		while (!get(side, &queue[1]))
			;
		CHECK(got_id(side) == times);
	}
}

static void trip_second(struct side *side, uint64_t times)
{
	struct queue *queue = (struct queue *)side->shared;

	while (times--) {
		while (!get(side, &queue[0]))
			;
		CHECK(got_id(side) == times);
		CHECK(put(side, &queue[1], times));
	}
}

#define CK(title, which, first, second) {				\
	.name = title,							\
	.unit = which,							\
	.size = 64,							\
	.shared = two_queues,						\
	.open = queue_open,						\
	.run = { first, second },					\
}

#else

#define CK(title, which, first, second) {				\
	.name = title,							\
	.unit = which,							\
	.size = 64,							\
	.missing = "libck-dev was not installed when this was built",	\
}

#endif

const struct measurement ck_measurements[] = {
	CK("ck_ring one way 64 B", UNIT_MESSAGES, way_send, way_receive),
	CK("ck_ring round trip 64 B", UNIT_NS, trip_first, trip_second),
	{ .name = NULL },
};
