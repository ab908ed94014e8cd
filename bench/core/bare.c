/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The floors: what the machine and the kernel need when nothing is done but to
 * move the bytes, or to wake each other.
 */
#include "core_bench.h"

/* ---- ping-pong ---------------------------------------------------------- */

/*
 * A message and the word that says it is there, on as few lines as possible:
 * 96 bytes and the word are on two.
 */
struct ping {
	unsigned char data[96];
	uint64_t sequence;
} __attribute__((aligned(2 * CACHE_LINE)));

struct word {
	uint64_t sequence;
} __attribute__((aligned(2 * CACHE_LINE)));

static uint64_t two_pings(const struct measurement *m)
{
	(void)m;
	return 2 * sizeof(struct ping);
}

static void ping_write(struct ping *ping, struct side *side, uint64_t sequence)
{
	produce(side->out);
	memcpy(ping->data, side->out, sizeof(ping->data));
	__atomic_store_n(&ping->sequence, sequence, __ATOMIC_RELEASE);
}

static void ping_read(struct ping *ping, struct side *side, uint64_t sequence)
{
	while (__atomic_load_n(&ping->sequence, __ATOMIC_ACQUIRE) != sequence)
		;
	memcpy(side->in, ping->data, sizeof(ping->data));
	consume(side->in);
}

/* The words go on counting where the run before has stopped. */
static void ping_first(struct side *side, uint64_t times)
{
	struct ping *ping = (struct ping *)side->shared;
	uint64_t sequence = ping[0].sequence;

	while (times--) {
		ping_write(&ping[0], side, ++sequence);
		ping_read(&ping[1], side, sequence);
	}
}

static void ping_second(struct side *side, uint64_t times)
{
	struct ping *ping = (struct ping *)side->shared;
	uint64_t sequence = ping[1].sequence;

	while (times--) {
		ping_read(&ping[0], side, ++sequence);
		ping_write(&ping[1], side, sequence);
	}
}

static void word_wait(struct word *word, uint64_t sequence)
{
	while (__atomic_load_n(&word->sequence, __ATOMIC_ACQUIRE) != sequence)
		;
}

static void word_first(struct side *side, uint64_t times)
{
	struct word *word = (struct word *)side->shared;
	uint64_t sequence = word[0].sequence;

	while (times--) {
		__atomic_store_n(&word[0].sequence, ++sequence,
				 __ATOMIC_RELEASE);
		word_wait(&word[1], sequence);
	}
}

static void word_second(struct side *side, uint64_t times)
{
	struct word *word = (struct word *)side->shared;
	uint64_t sequence = word[1].sequence;

	while (times--) {
		word_wait(&word[0], ++sequence);
		__atomic_store_n(&word[1].sequence, sequence,
				 __ATOMIC_RELEASE);
	}
}

/* ---- memcpy through a ring of slots ------------------------------------- */

/*
 * A slot is the data, a word behind them, and what is left of the last line.
 * The word counts: even the slot is free, odd it is full.
 */
static uint64_t slot_stride(const struct measurement *m)
{
	return (m->size + sizeof(uint64_t) + CACHE_LINE - 1) &
	       ~(uint64_t)(CACHE_LINE - 1);
}

static uint64_t slot_count(const struct measurement *m)
{
	uint64_t count = RING_SIZE / slot_stride(m);

	return count < 4 ? 4 : count;
}

static uint64_t slots_size(const struct measurement *m)
{
	return slot_stride(m) * slot_count(m);
}

/* Where this side is in the ring: the slot, and how often it went round. */
struct cursor {
	uint64_t at;
	uint64_t lap;
};

static void slots_open(struct side *side)
{
	side->state = calloc(1, sizeof(struct cursor));
	CHECK(side->state);
}

static void slots_close(struct side *side)
{
	free(side->state);
}

static void slots_copy(struct side *side, uint64_t times, int receive)
{
	const struct measurement *m = side->measurement;
	uint64_t stride = slot_stride(m), end = slots_size(m);
	struct cursor cursor = *(struct cursor *)side->state;
	uint32_t size = m->size;

	while (times--) {
		unsigned char *slot = side->shared + cursor.at;
		uint64_t *word = (uint64_t *)(slot + stride - sizeof(*word));
		uint64_t wanted = 2 * cursor.lap + !!receive;

		while (__atomic_load_n(word, __ATOMIC_ACQUIRE) != wanted)
			kucomms_cpu_relax();
		if (receive) {
			memcpy(side->in, slot, size);
			consume(side->in);
		} else {
			produce(side->out);
			memcpy(slot, side->out, size);
		}
		__atomic_store_n(word, wanted + 1, __ATOMIC_RELEASE);
		cursor.at += stride;
		if (cursor.at == end) {
			cursor.at = 0;
			cursor.lap++;
		}
	}
	*(struct cursor *)side->state = cursor;
}

static void slots_send(struct side *side, uint64_t times)
{
	slots_copy(side, times, 0);
}

static void slots_receive(struct side *side, uint64_t times)
{
	slots_copy(side, times, 1);
}

/* ---- eventfd ------------------------------------------------------------ */

static void event_write(int fd)
{
	uint64_t one = 1;

	CHECK(write(fd, &one, sizeof(one)) == sizeof(one));
}

static void event_read(int fd)
{
	uint64_t count;

	CHECK(read(fd, &count, sizeof(count)) == sizeof(count));
	CHECK(count == 1);
}

static void event_first(struct side *side, uint64_t times)
{
	while (times--) {
		event_write(side->eventfd[1]);
		event_read(side->eventfd[0]);
	}
}

static void event_second(struct side *side, uint64_t times)
{
	while (times--) {
		event_read(side->eventfd[1]);
		event_write(side->eventfd[0]);
	}
}

#define MEMCPY(bytes) {							\
	.name = "memcpy " #bytes " B through shared memory",		\
	.unit = UNIT_GBS,						\
	.size = bytes,							\
	.shared = slots_size,						\
	.open = slots_open,						\
	.run = { slots_send, slots_receive },				\
	.close = slots_close,						\
}

const struct measurement bare_measurements[] = {
	{
		.name = "ping-pong 96 B",
		.unit = UNIT_NS,
		.size = 96,
		.shared = two_pings,
		.run = { ping_first, ping_second },
	}, {
		.name = "ping-pong 8 B",
		.unit = UNIT_NS,
		.size = 8,
		.shared = two_pings,
		.run = { word_first, word_second },
	},
	MEMCPY(16),
	MEMCPY(64),
	MEMCPY(256),
	MEMCPY(1024),
	MEMCPY(4096),
	MEMCPY(16384),
	MEMCPY(65536),
	MEMCPY(262144),
	MEMCPY(1048576),
	{
		.name = "eventfd round trip",
		.unit = UNIT_NS,
		.size = 8,
		.run = { event_first, event_second },
	},
	{ .name = NULL },
};
