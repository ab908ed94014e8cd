/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The channel: two rings, as shm:// has them, but nobody ever sleeps. So no
 * doorbell is needed, and that none is asked for is checked.
 */
#include "core_bench.h"

#define BATCH	32	/* messages, of the measurements "in batches" */

static uint64_t two_sides(const struct measurement *m)
{
	(void)m;
	return 2 * kucomms_side_size(kucomms_ring_size(RING_SIZE));
}

static void side_init(struct side *side, struct kucomms_channel *channel,
		      unsigned int own)
{
	uint64_t size = kucomms_ring_size(RING_SIZE);

	CHECK(!kucomms_channel_init(channel, own, size, 0, side->fd,
				    side->offset +
				    own * kucomms_side_size(size)));
}

static void side_attach(struct side *side, struct kucomms_channel *channel)
{
	uint64_t size = channel->ring_size;

	CHECK(!kucomms_channel_attach(channel, side->fd,
				      side->offset +
				      !channel->own * kucomms_side_size(size)));
}

/* Channels are on lines of their own, as malloc() would not see to. */
static struct kucomms_channel *channel_alloc(unsigned int count)
{
	struct kucomms_channel *channels = NULL;

	CHECK(!posix_memalign((void **)&channels, 2 * CACHE_LINE,
			      count * sizeof(*channels)));
	return channels;
}

static void *idle(void *unused)
{
	for (;;)
		pause();
	return unused;
}

/*
 * The lock of a process with one thread is not taken by an atomic access: the C
 * library leaves that out. So there is a second thread, as in most programs,
 * which only sleeps.
 */
static void second_thread(void)
{
	static int started;
	pthread_t thread;

	if (single_threaded || started)
		return;
	started = 1;
	CHECK(!pthread_create(&thread, NULL, idle, NULL));
}

static void channel_open(struct side *side)
{
	second_thread();
	side->state = channel_alloc(1);
	side_init(side, side->state, side->number);
}

static void channel_attach(struct side *side)
{
	side_attach(side, side->state);
}

static void channel_close(struct side *side)
{
	kucomms_channel_destroy(side->state);
	free(side->state);
}

/* Both ends in this process. */
static void pair_open(struct side *side)
{
	struct kucomms_channel *pair = channel_alloc(2);

	second_thread();
	side->state = pair;
	side_init(side, &pair[0], 0);
	side_init(side, &pair[1], 1);
}

static void pair_attach(struct side *side)
{
	struct kucomms_channel *pair = side->state;

	side_attach(side, &pair[0]);
	side_attach(side, &pair[1]);
}

static void pair_close(struct side *side)
{
	struct kucomms_channel *pair = side->state;

	kucomms_channel_destroy(&pair[0]);
	kucomms_channel_destroy(&pair[1]);
	free(pair);
}

/* ---- messages ----------------------------------------------------------- */

static void send_one(struct side *side, struct kucomms_channel *channel,
		     uint64_t id)
{
	int err;

	produce(side->out);
	for (;;) {
		err = kucomms_channel_send(channel, side->out,
					   side->measurement->size, 0, 1, id,
					   0);
		if (!err)
			return;
		CHECK(err == -EAGAIN);
		kucomms_cpu_relax();
	}
}

/* Copy out the message that was looked at and go on. */
static void take(struct side *side, struct kucomms_channel *channel,
		 const struct kucomms_view *view)
{
	CHECK(view->length == side->measurement->size);
	memcpy(side->in, view->data, view->length);
	consume(side->in);
	kucomms_channel_advance(channel, view);
}

/*
 * Wait for a message without a pause, as the bare ping-pong does. Return: its
 * id.
 */
static uint64_t receive_one(struct side *side, struct kucomms_channel *channel)
{
	struct kucomms_view view;
	int err;

	do
		err = kucomms_channel_peek(channel, &view);
	while (err == -EAGAIN);
	CHECK(!err);
	take(side, channel, &view);
	CHECK(!kucomms_channel_release(channel));
	return view.id;
}

/* ---- round trip --------------------------------------------------------- */

static void trip_first(struct side *side, uint64_t times)
{
	struct kucomms_channel *channel = side->state;

	while (times--) {
		send_one(side, channel, times);
		CHECK(receive_one(side, channel) == times);
	}
}

static void trip_second(struct side *side, uint64_t times)
{
	struct kucomms_channel *channel = side->state;

	while (times--) {
		CHECK(receive_one(side, channel) == times);
		send_one(side, channel, times);
	}
}

/* ---- one way ------------------------------------------------------------ */

static void way_send(struct side *side, uint64_t times)
{
	while (times--)
		send_one(side, side->state, times);
}

static void way_receive(struct side *side, uint64_t times)
{
	struct kucomms_channel *channel = side->state;
	struct kucomms_view view;
	int err;

	while (times--) {
		while ((err = kucomms_channel_peek(channel, &view)) == -EAGAIN)
			kucomms_cpu_relax();
		CHECK(!err && view.id == times);
		take(side, channel, &view);
		CHECK(!kucomms_channel_release(channel));
	}
}

/* Ask about the doorbell, and give back space, once per batch. */
static void batch_send(struct side *side, uint64_t times)
{
	struct kucomms_channel *channel = side->state;
	int err;

	while (times--) {
		produce(side->out);
		while ((err = kucomms_channel_put(channel, side->out,
						  side->measurement->size, 0,
						  1, times, 0)) == -EAGAIN)
			kucomms_cpu_relax();
		CHECK(!err);
		if (times % BATCH == 0)
			CHECK(!kucomms_channel_publish(channel));
	}
}

static void batch_receive(struct side *side, uint64_t times)
{
	struct kucomms_channel *channel = side->state;
	struct kucomms_view view;
	unsigned int kept = 0;
	int err;

	while (times) {
		err = kucomms_channel_peek(channel, &view);
		if (!err) {
			CHECK(view.id == --times);
			take(side, channel, &view);
			if (++kept < BATCH)
				continue;
		} else {
			CHECK(err == -EAGAIN);
			kucomms_cpu_relax();
		}
		CHECK(!kucomms_channel_release(channel));
		kept = 0;
	}
	CHECK(!kucomms_channel_release(channel));
}

/* ---- one thread --------------------------------------------------------- */

/* From reserve to release; the data are neither written nor read. */
static void thread_run(struct side *side, uint64_t times)
{
	struct kucomms_channel *pair = side->state;
	uint32_t size = side->measurement->size;
	struct kucomms_frame *frame;
	struct kucomms_view view;

	while (times--) {
		CHECK(!kucomms_channel_reserve(&pair[0], size, &frame,
					       NULL));
		frame->type = 1;
		frame->id = times;
		frame->user_value = 0;
		kucomms_ring_commit(frame, size, 0);
		CHECK(!kucomms_channel_publish(&pair[0]));
		CHECK(!kucomms_channel_peek(&pair[1], &view));
		CHECK(view.id == times && view.length == size);
		kucomms_channel_advance(&pair[1], &view);
		CHECK(!kucomms_channel_release(&pair[1]));
	}
}

/* The same with the data copied in and out. */
static void thread_copy(struct side *side, uint64_t times)
{
	struct kucomms_channel *pair = side->state;

	while (times--) {
		send_one(side, &pair[0], times);
		CHECK(receive_one(side, &pair[1]) == times);
	}
}

#define CHANNEL(title, bytes, which, first, second)			\
	.name = title,							\
	.unit = which,							\
	.size = bytes,							\
	.shared = two_sides,						\
	.open = channel_open,						\
	.attach = channel_attach,					\
	.run = { first, second },					\
	.close = channel_close

#define ROUND_TRIP(bytes)						\
	{ CHANNEL("kucomms round trip " #bytes " B", bytes, UNIT_NS,	\
		  trip_first, trip_second) }

#define ONE_WAY(bytes)							\
	{ CHANNEL("kucomms one way " #bytes " B", bytes, UNIT_MESSAGES,	\
		  way_send, way_receive),				\
	  .also = "kucomms one way " #bytes " B, bytes" }

#define BATCHES(bytes)							\
	{ CHANNEL("kucomms in batches " #bytes " B", bytes,		\
		  UNIT_MESSAGES, batch_send, batch_receive) }

#define ONE_THREAD(title, bytes, function) {				\
	.name = title " " #bytes " B",					\
	.unit = UNIT_NS,						\
	.size = bytes,							\
	.shared = two_sides,						\
	.open = pair_open,						\
	.attach = pair_attach,						\
	.run = { function, NULL },					\
	.close = pair_close,						\
}

const struct measurement channel_measurements[] = {
	ROUND_TRIP(64),
	ROUND_TRIP(1024),
	ONE_WAY(64),
	ONE_WAY(1024),
	ONE_WAY(65536),
	BATCHES(64),
	BATCHES(1024),
	ONE_THREAD("kucomms one thread", 64, thread_run),
	ONE_THREAD("kucomms one thread", 1024, thread_run),
	ONE_THREAD("kucomms one thread with copies", 64, thread_copy),
	ONE_THREAD("kucomms one thread with copies", 1024, thread_copy),
	{ .name = NULL },
};
