/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * One channel under load, both ways at once. Each way has a thread that sends
 * by every means there is (copies, batches, loans committed out of order and
 * dropped ones), a second thread that sends through the same ring, and one that
 * receives, in place and borrowed. All of them really sleep when there is
 * nothing to do, so a bell too few is a hang.
 *
 *	stress [MESSAGES [SEED]]
 *
 * What is checked: each sender's messages come in order, whole, once; borrowed
 * ones do not change; after an orderly close all of them were there.
 *
 * The thread sanitizer knows memory by its address. So for it both sides use
 * the same mapping, or it would see no two threads at one place.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <kucomms/channel.h>

#define RING_SIZE	16384
#define LENGTH_MAX	3000
#define SENDERS		2
#define HELD_MAX	6	/* loans out, messages borrowed, at a time */

#ifdef __SANITIZE_THREAD__
#define MESSAGES	60000
#else
#define MESSAGES	1000000
#endif

#define CHECK(condition)						\
	do {								\
		if (!(condition)) {					\
			fprintf(stderr, "%s:%d: %s: not so: %s\n",	\
				__FILE__, __LINE__, __func__,		\
				#condition);				\
			_exit(1);					\
		}							\
	} while (0)

/*
 * A doorbell that wakes everybody who sleeps: the two senders of a ring may
 * both wait for space. Who is about to sleep reads it, parks, and sleeps only
 * if it was not rung since.
 */
struct bell {
	uint32_t rings;
	uint32_t sleeps;
};

static uint32_t bell_read(struct bell *bell)
{
	return __atomic_load_n(&bell->rings, __ATOMIC_ACQUIRE);
}

static void bell_ring(struct bell *bell)
{
	__atomic_fetch_add(&bell->rings, 1, __ATOMIC_RELEASE);
	syscall(SYS_futex, &bell->rings, FUTEX_WAKE_PRIVATE, INT_MAX, NULL,
		NULL, 0);
}

static void bell_sleep(struct bell *bell, uint32_t seen)
{
	__atomic_fetch_add(&bell->sleeps, 1, __ATOMIC_RELAXED);
	while (bell_read(bell) == seen)
		syscall(SYS_futex, &bell->rings, FUTEX_WAIT_PRIVATE, seen,
			NULL, NULL, 0);
}

/* One way of the channel. */
struct way {
	struct kucomms_channel *from;
	struct kucomms_channel *to;
	struct bell data;
	struct bell space;
	uint64_t messages;	/* of each sender */
	uint64_t seed;
	uint64_t received;
	uint64_t borrowed;
};

struct sender {
	struct way *way;
	uint64_t number;
};

/* xorshift: the same messages in each run with the same seed. */
static uint64_t next_random(uint64_t *state)
{
	uint64_t x = *state;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	*state = x;
	return x;
}

static uint64_t seed_of(uint64_t sender, uint64_t sequence)
{
	return (sender + 1) * 0x9e3779b97f4a7c15ULL ^
	       (sequence + 1) * 0xd1342543de82ef95ULL;
}

/* Mostly short messages, some long ones, each length there is. */
static uint32_t length_of(uint64_t sender, uint64_t sequence)
{
	uint64_t state = seed_of(sender, sequence);
	uint64_t draw = next_random(&state);

	return (uint32_t)((draw >> 8) % (draw & 7 ? 100 : LENGTH_MAX + 1));
}

/* Fill with what belongs to this message; its checksum. */
static uint64_t fill(unsigned char *data, uint32_t length, uint64_t seed)
{
	uint64_t sum = seed;
	uint64_t word;
	uint32_t i;

	for (i = 0; i < length; i += 8) {
		uint32_t part = length - i < 8 ? length - i : 8;

		word = next_random(&seed);
		memcpy(data + i, &word, part);
		if (part < 8)
			word &= (1ULL << 8 * part) - 1;
		sum = (sum ^ word) * 0x100000001b3ULL;
	}
	return sum;
}

static uint64_t checksum(const unsigned char *data, uint32_t length,
			 uint64_t seed)
{
	uint64_t sum = seed;
	uint64_t word;
	uint32_t i;

	for (i = 0; i < length; i += 8) {
		uint32_t part = length - i < 8 ? length - i : 8;

		word = 0;
		memcpy(&word, data + i, part);
		sum = (sum ^ word) * 0x100000001b3ULL;
	}
	return sum;
}

/* ---- sending ---------------------------------------------------------------- */

static void sleep_for_space(struct way *way, uint32_t length)
{
	uint32_t seen = bell_read(&way->space);
	int err = kucomms_channel_park_tx(way->from, length);

	if (err == 1)
		bell_ring(&way->data);
	if (err >= 0)
		bell_sleep(&way->space, seen);
}

static void send_copy(struct way *way, uint64_t sender, uint64_t sequence,
		      int publish)
{
	uint32_t length = length_of(sender, sequence);
	uint64_t seed = seed_of(sender, sequence);
	unsigned char data[LENGTH_MAX];
	uint64_t sum = fill(data, length, seed);
	int err;

	for (;;) {
		err = kucomms_channel_put(way->from, data, length, 0, sender,
					  sequence, sum);
		if (!err)
			break;
		CHECK(err == -EAGAIN);
		/* What was put without a bell must be heard before we sleep. */
		if (kucomms_channel_publish(way->from))
			bell_ring(&way->data);
		sleep_for_space(way, length);
	}
	if (publish && kucomms_channel_publish(way->from))
		bell_ring(&way->data);
}

struct loan {
	struct kucomms_frame *frame;
	struct kucomms_pin pin;
	uint32_t length;
	uint64_t sequence;
	int drop;
};

static void commit_loan(struct way *way, uint64_t sender, struct loan *loan)
{
	unsigned char *data = (unsigned char *)(loan->frame + 1);
	int ring;

	if (loan->drop) {
		memset(data, 0xee, loan->length);
		ring = kucomms_channel_discard(way->from, loan->frame,
					       loan->length);
		/* Its owner may write it until it is unpinned. */
		memset(data, 0xdd, loan->length);
	} else {
#ifdef KUCOMMS_TEST_COMMIT_EARLY
		/* The mistake that this program must find. */
		kucomms_ring_commit(loan->frame, loan->length, 0);
		ring = kucomms_channel_publish(way->from);
		if (ring)
			bell_ring(&way->data);
		sched_yield();
#endif
		loan->frame->type = sender;
		loan->frame->id = loan->sequence;
		loan->frame->user_value =
			fill(data, loan->length,
			     seed_of(sender, loan->sequence));
#ifndef KUCOMMS_TEST_COMMIT_EARLY
		kucomms_ring_commit(loan->frame, loan->length, 0);
		ring = kucomms_channel_publish(way->from);
#endif
	}
	kucomms_channel_unpin_tx(way->from, &loan->pin);
	if (ring)
		bell_ring(&way->data);
}

/*
 * Take several loans, finish them in any order. Only the first waits for space:
 * who sleeps with a loan out would sleep for ever, the consumer stops there.
 * Return: how many messages were sent.
 */
static uint64_t send_loans(struct way *way, uint64_t sender, uint64_t sequence,
			   uint64_t most, uint64_t *random)
{
	uint32_t wanted = 1 + (uint32_t)(next_random(random) % HELD_MAX);
	struct loan loans[HELD_MAX];
	uint32_t count = 0, i;
	uint64_t sent = 0;
	int err;

	while (count < wanted && sent < most) {
		struct loan *loan = &loans[count];

		loan->drop = next_random(random) % 4 == 0;
		loan->sequence = sequence + sent;
		loan->length = length_of(sender, loan->sequence);
		err = kucomms_channel_reserve(way->from, loan->length,
					      &loan->frame, &loan->pin);
		if (err) {
			CHECK(err == -EAGAIN);
			if (count)
				break;
			sleep_for_space(way, loan->length);
			continue;
		}
		sent += !loan->drop;
		count++;
	}
	while (count) {
		i = (uint32_t)(next_random(random) % count);
		commit_loan(way, sender, &loans[i]);
		/* A pin is in a list: the others stay where they are. */
		if (i != --count) {
			struct loan *last = &loans[count];

			pthread_mutex_lock(&way->from->lock);
			loans[i] = *last;
			loans[i].pin.prev->next = &loans[i].pin;
			loans[i].pin.next->prev = &loans[i].pin;
			pthread_mutex_unlock(&way->from->lock);
		}
	}
	return sent;
}

static void *send_all(void *argument)
{
	struct sender *sender = argument;
	struct way *way = sender->way;
	uint64_t random = way->seed * 2 + sender->number + 1;
	uint64_t sequence = 0, batch;

	while (sequence < way->messages) {
		uint64_t left = way->messages - sequence;

		switch (sender->number ? 0 : next_random(&random) % 3) {
		case 0:
			send_copy(way, sender->number, sequence++, 1);
			break;
		case 1:
			batch = 1 + next_random(&random) % 20;
			if (batch > left)
				batch = left;
			while (batch--)
				send_copy(way, sender->number, sequence++,
					  !batch);
			break;
		default:
			sequence += send_loans(way, sender->number, sequence,
					       left, &random);
		}
	}
	return NULL;
}

/* ---- receiving -------------------------------------------------------------- */

struct borrowed {
	struct kucomms_view view;
	struct kucomms_pin pin;
	int held;
};

static void check_message(const struct kucomms_view *view)
{
	CHECK(view->length == length_of(view->type, view->id));
	CHECK(view->user_value ==
	      checksum(view->data, view->length,
		       seed_of(view->type, view->id)));
	CHECK(view->flags == 0);
}

static void give_back(struct way *way, struct borrowed *borrowed)
{
	if (!borrowed->held)
		return;
	/* It has been ours all the time; nobody may have touched it. */
	check_message(&borrowed->view);
	kucomms_channel_unpin_rx(&borrowed->pin);
	borrowed->held = 0;
	if (kucomms_channel_release(way->to))
		bell_ring(&way->space);
}

/* Wait for a message: 0, or 1 when the peer has closed and all was read. */
static int next_message(struct way *way, struct kucomms_view *view)
{
	uint32_t seen;
	int closed, err;

	for (;;) {
		seen = bell_read(&way->data);
		closed = kucomms_ring_peer_state(&way->to->rx) !=
			 KUCOMMS_STATE_OPEN;
		err = kucomms_channel_peek(way->to, view);
		if (!err)
			return 0;
		CHECK(err == -EAGAIN || err == KUCOMMS_SKIPPED);
		/* Also what was skipped. */
		if (kucomms_channel_release(way->to))
			bell_ring(&way->space);
		if (err == KUCOMMS_SKIPPED)
			continue;
		if (closed)
			return 1;
		if (!kucomms_channel_park_rx(way->to))
			bell_sleep(&way->data, seen);
	}
}

static void *receive_all(void *argument)
{
	struct way *way = argument;
	struct borrowed borrowed[HELD_MAX] = { 0 };
	uint64_t expected[SENDERS] = { 0 };
	uint64_t random = way->seed * 3 + 7;
	struct kucomms_view view;
	uint32_t i;

	for (;;) {
		/*
		 * Who sleeps with messages borrowed may keep the space that the
		 * sender waits for.
		 */
		if (kucomms_channel_peek(way->to, &view) == -EAGAIN) {
			for (i = 0; i < HELD_MAX; i++)
				give_back(way, &borrowed[i]);
		}
		if (next_message(way, &view))
			break;
		CHECK(view.type < SENDERS);
		CHECK(view.id == expected[view.type]);
		expected[view.type]++;
		check_message(&view);
		way->received++;
		i = (uint32_t)(next_random(&random) % (4 * HELD_MAX));
		if (i < HELD_MAX) {
			give_back(way, &borrowed[i]);
			borrowed[i].view = view;
			borrowed[i].held = 1;
			way->borrowed++;
			kucomms_channel_borrow(way->to, &view,
					       &borrowed[i].pin);
		} else {
			kucomms_channel_advance(way->to, &view);
		}
		if (kucomms_channel_release(way->to))
			bell_ring(&way->space);
	}
	for (i = 0; i < HELD_MAX; i++)
		CHECK(!borrowed[i].held);
	for (i = 0; i < SENDERS; i++)
		CHECK(expected[i] == way->messages);
	return NULL;
}

/* ---- the whole -------------------------------------------------------------- */

static void channels_open(struct kucomms_channel *a, struct kucomms_channel *b)
{
	uint64_t size = kucomms_ring_size(RING_SIZE);
	uint64_t side = kucomms_side_size(size);
	int fd = memfd_create("stress", MFD_CLOEXEC);

	CHECK(fd >= 0);
	CHECK(!ftruncate(fd, (off_t)(2 * side)));
	CHECK(!kucomms_channel_init(a, 0, size, 0, fd, 0));
	CHECK(!kucomms_channel_init(b, 1, size, 0, fd, side));
	CHECK(!kucomms_channel_attach(a, fd, side));
	CHECK(!kucomms_channel_attach(b, fd, 0));
	close(fd);
}

#ifdef __SANITIZE_THREAD__
/* Let @reader see what @writer writes where @writer writes it. */
static void same_mapping(struct kucomms_channel *reader,
			 struct kucomms_channel *writer)
{
	reader->rx.peer = writer->tx.own;
	reader->rx.data = writer->tx.data;
	reader->tx.peer = writer->rx.own;
}
#endif

static void way_open(struct way *way, struct kucomms_channel *from,
		     struct kucomms_channel *to, uint64_t messages,
		     uint64_t seed)
{
	memset(way, 0, sizeof(*way));
	way->from = from;
	way->to = to;
	way->messages = messages / SENDERS;
	way->seed = seed;
}

int main(int argc, char **argv)
{
	uint64_t messages = argc > 1 ? strtoull(argv[1], NULL, 0) : MESSAGES;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
	pthread_t senders[2][SENDERS], receivers[2];
	struct sender arguments[2][SENDERS];
	static struct kucomms_channel a, b;
	static struct way ways[2];
	uint64_t i, n;

	channels_open(&a, &b);
#ifdef __SANITIZE_THREAD__
	same_mapping(&a, &b);
	same_mapping(&b, &a);
#endif
	way_open(&ways[0], &a, &b, messages / 2, seed);
	way_open(&ways[1], &b, &a, messages / 2, seed + 1);
	for (i = 0; i < 2; i++) {
		CHECK(!pthread_create(&receivers[i], NULL, receive_all,
				      &ways[i]));
		for (n = 0; n < SENDERS; n++) {
			arguments[i][n].way = &ways[i];
			arguments[i][n].number = n;
			CHECK(!pthread_create(&senders[i][n], NULL, send_all,
					      &arguments[i][n]));
		}
	}
	for (i = 0; i < 2; i++) {
		for (n = 0; n < SENDERS; n++)
			CHECK(!pthread_join(senders[i][n], NULL));
		kucomms_channel_close(ways[i].from, KUCOMMS_STATE_CLOSED);
		bell_ring(&ways[i].data);
		CHECK(!pthread_join(receivers[i], NULL));
	}
	for (i = 0; i < 2; i++) {
		struct way *way = &ways[i];

		CHECK(way->received == SENDERS * way->messages);
		CHECK(way->from->messages_sent == way->received);
		CHECK(way->to->messages_received == way->received);
		CHECK(way->to->bytes_received == way->from->bytes_sent);
		CHECK(kucomms_channel_tx_free(way->from) ==
		      way->from->ring_size);
		CHECK(!way->from->protocol_errors);
		printf("%llu messages, %llu borrowed; sleeps: %u for data, %u for space; bells: %u and %u; full %llu times\n",
		       (unsigned long long)way->received,
		       (unsigned long long)way->borrowed,
		       way->data.sleeps, way->space.sleeps,
		       way->data.rings, way->space.rings,
		       (unsigned long long)way->from->full_waits);
	}
	kucomms_channel_destroy(&a);
	kucomms_channel_destroy(&b);
	return 0;
}
