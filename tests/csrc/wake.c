/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Is a sleeper always woken? One thread parks, again and again, in the very
 * moment in which the other one may or may not see that. Without the full
 * barriers of ring.h this hangs soon on any machine with two processors; the
 * stress test hardly sees it, there the next message wakes who was forgotten.
 *
 *	wake [SECONDS]
 *
 * The bells are counters that are spun on: a futex would take so long that the
 * two rarely meet.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <asm/barrier.h>
#ifdef KUCOMMS_TEST_NO_BARRIER
/* The mistake that this program must find. */
#undef smp_mb
#define smp_mb()	do { } while (0)
#endif
#include <kucomms/channel.h>

#define SECONDS	1	/* for each way to sleep */
#ifndef FORGOTTEN
#define FORGOTTEN	30	/* seconds until we call it a hang */
#endif
#define SPINS		2000	/* then let others have this processor */

#define CHECK(condition)						\
	do {								\
		if (!(condition)) {					\
			fprintf(stderr, "%s:%d: %s: not so: %s\n",	\
				__FILE__, __LINE__, __func__,		\
				#condition);				\
			_exit(1);					\
		}							\
	} while (0)

static struct kucomms_channel a, b;	/* a: who parks; b: who never does */
static uint32_t bell;			/* rung by b */
static uint64_t rounds, sleeps;
static int64_t seconds = SECONDS;

/* One turn of a spin that must not last for ever. */
static void spin(uint64_t *turns, time_t *since)
{
	struct timespec now;

	kucomms_cpu_relax();
	if (++*turns % SPINS)
		return;
	clock_gettime(CLOCK_MONOTONIC, &now);
	if (!*since)
		*since = now.tv_sec;
	if (now.tv_sec - *since > FORGOTTEN) {
		fprintf(stderr, "a wake-up was lost\n");
		_exit(1);
	}
	sched_yield();
}

static void bell_ring(void)
{
	__atomic_fetch_add(&bell, 1, __ATOMIC_RELEASE);
}

static void bell_wait(uint32_t seen)
{
	uint64_t turns = 0;
	time_t since = 0;

	sleeps++;
	while (__atomic_load_n(&bell, __ATOMIC_ACQUIRE) == seen)
		spin(&turns, &since);
}

/* The type of the message that begins round @round: 1 in the last one. */
static uint64_t is_last(uint64_t round)
{
	static int64_t end;
	struct timespec now;

	if (round % 256)
		return 0;
	clock_gettime(CLOCK_MONOTONIC, &now);
	if (!round)
		end = now.tv_sec + seconds;
	rounds = round + 1;
	return now.tv_sec > end;
}

/* As long as the other one needs, more or less. */
static void dawdle(uint64_t *random)
{
	uint64_t x = *random;
	volatile uint64_t i;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	*random = x;
	for (i = 0; i < x % 500; i++)
		;
}

/* Look for a message without ever parking. */
static void spin_for_message(struct kucomms_channel *channel,
			     struct kucomms_view *view)
{
	uint64_t turns = 0;
	time_t since = 0;
	int err;

	while ((err = kucomms_channel_peek(channel, view))) {
		CHECK(err == -EAGAIN);
		spin(&turns, &since);
	}
}

/*
 * For data: a sends, b answers, a parks while the answer is on its way. b rings
 * as the ring says, not by way of kucomms_channel_publish(), whose counting is
 * a barrier, too, on some machines.
 */
static void *answer(void *unused)
{
	struct kucomms_frame *frame;
	struct kucomms_view view;
	uint64_t last, i;

	for (i = 0, last = 0; !last; i++) {
		spin_for_message(&b, &view);
		last = view.type;
		kucomms_channel_advance(&b, &view);
		kucomms_channel_release(&b);
		CHECK(!kucomms_channel_reserve(&b, 0, &frame, NULL));
		frame->id = i;
		kucomms_ring_commit(frame, 0, 0);
		if (kucomms_ring_wake_consumer(&b.tx))
			bell_ring();
	}
	return unused;
}

static void ask(uint64_t *random)
{
	struct kucomms_view view;
	uint64_t last, i;
	uint32_t seen;
	int err;

	for (i = 0, last = 0; !last; i++) {
		last = is_last(i);
		CHECK(kucomms_channel_send(&a, NULL, 0, 0, last, i, 0) >= 0);
		dawdle(random);
		for (;;) {
			seen = __atomic_load_n(&bell, __ATOMIC_ACQUIRE);
			if (!kucomms_channel_park_rx(&a))
				bell_wait(seen);
			err = kucomms_channel_peek(&a, &view);
			if (!err)
				break;
			CHECK(err == -EAGAIN);
		}
		CHECK(view.id == i);
		kucomms_channel_advance(&a, &view);
		kucomms_channel_release(&a);
	}
}

/* For space: each message fills the ring, a parks while b gives it back. */
static void *drain(void *unused)
{
	struct kucomms_view view;
	uint64_t last, i;

	for (i = 0, last = 0; !last; i++) {
		spin_for_message(&b, &view);
		CHECK(view.id == i);
		last = view.type;
		kucomms_channel_advance(&b, &view);
		if (kucomms_channel_release(&b))
			bell_ring();
	}
	return unused;
}

static void flood(uint64_t *random)
{
	uint32_t length = (uint32_t)kucomms_message_max(a.ring_size);
	struct kucomms_frame *frame;
	uint64_t last, i;
	uint32_t seen;
	int err;

	for (i = 0, last = 0; !last; i++) {
		last = is_last(i);
		for (;;) {
			err = kucomms_channel_reserve(&a, length, &frame,
						      NULL);
			if (!err)
				break;
			CHECK(err == -EAGAIN);
			seen = __atomic_load_n(&bell, __ATOMIC_ACQUIRE);
			if (!kucomms_channel_park_tx(&a, length))
				bell_wait(seen);
		}
		frame->type = last;
		frame->id = i;
		kucomms_ring_commit(frame, length, 0);
		kucomms_channel_publish(&a);
		dawdle(random);
	}
}

static void run(const char *what, void *(*other)(void *),
		void (*ours)(uint64_t *))
{
	uint64_t random = 88172645463325252ULL;
	pthread_t thread;

	sleeps = 0;
	CHECK(!pthread_create(&thread, NULL, other, NULL));
	ours(&random);
	CHECK(!pthread_join(thread, NULL));
	printf("%s: %llu rounds, slept %llu times\n", what,
	       (unsigned long long)rounds, (unsigned long long)sleeps);
}

int main(int argc, char **argv)
{
	uint64_t size = kucomms_ring_size(0);
	uint64_t side = kucomms_side_size(size);
	int fd = memfd_create("wake", MFD_CLOEXEC);

	if (argc > 1)
		seconds = strtoll(argv[1], NULL, 0);
	CHECK(fd >= 0);
	CHECK(!ftruncate(fd, (off_t)(2 * side)));
	CHECK(!kucomms_channel_init(&a, 0, size, 0, fd, 0));
	CHECK(!kucomms_channel_init(&b, 1, size, 0, fd, side));
	CHECK(!kucomms_channel_attach(&a, fd, side));
	CHECK(!kucomms_channel_attach(&b, fd, 0));
	close(fd);
	run("for data", answer, ask);
	run("for space", drain, flood);
	kucomms_channel_destroy(&a);
	kucomms_channel_destroy(&b);
	return 0;
}
