/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Unit tests of ring.h and channel.h: one thread, nothing left to chance.
 *
 * Both sides of a channel live here, over one memfd, as two processes would map
 * it. What a hostile peer may do is done through a third mapping of the file.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <kucomms/channel.h>

#define CHECK(condition)						\
	do {								\
		if (!(condition)) {					\
			fprintf(stderr, "%s:%d: %s: not so: %s\n",	\
				__FILE__, __LINE__, __func__,		\
				#condition);				\
			exit(1);					\
		}							\
	} while (0)

struct pair {
	struct kucomms_channel a;	/* side 0; sends in most tests */
	struct kucomms_channel b;	/* side 1; receives in most tests */
	uint64_t page;
	uint64_t size;			/* of each ring */
	uint64_t side;			/* bytes of a side's pages */
	unsigned char *raw;		/* the whole file, writable */
};

static void pair_open_with(struct pair *pair, uint64_t asked, uint64_t features)
{
	int fd;

	pair->page = kucomms_page_size();
	pair->size = kucomms_ring_size(asked);
	pair->side = kucomms_side_size(pair->size);
	fd = memfd_create("ring_test", MFD_CLOEXEC);
	CHECK(fd >= 0);
	CHECK(!ftruncate(fd, (off_t)(2 * pair->side)));
	pair->raw = mmap(NULL, 2 * pair->side, PROT_READ | PROT_WRITE,
			 MAP_SHARED, fd, 0);
	CHECK(pair->raw != MAP_FAILED);
	CHECK(!kucomms_channel_init(&pair->a, 0, pair->size, features, fd, 0));
	CHECK(!kucomms_channel_init(&pair->b, 1, pair->size, features, fd,
				    pair->side));
	CHECK(!kucomms_channel_attach(&pair->a, fd, pair->side));
	CHECK(!kucomms_channel_attach(&pair->b, fd, 0));
	close(fd);
}

static void pair_open(struct pair *pair, uint64_t asked)
{
	pair_open_with(pair, asked, 0);
}

static void pair_close(struct pair *pair)
{
	kucomms_channel_destroy(&pair->a);
	kucomms_channel_destroy(&pair->b);
	munmap(pair->raw, 2 * pair->side);
}

/* What side 0 writes as the producer, and what side 1 writes as the consumer */
static struct kucomms_producer *raw_producer(struct pair *pair)
{
	return (struct kucomms_producer *)(pair->raw + pair->page);
}

static struct kucomms_consumer *raw_consumer(struct pair *pair)
{
	return (struct kucomms_consumer *)(pair->raw + pair->side +
					   2 * pair->page);
}

static struct kucomms_frame *raw_frame(struct pair *pair, uint64_t position)
{
	return (struct kucomms_frame *)(pair->raw + 3 * pair->page +
					(position & (pair->size - 1)));
}

static unsigned char pattern(uint64_t seed, uint64_t at)
{
	return (unsigned char)((seed * 2654435761u + at * 40503u) >> 7);
}

static int send_pattern(struct pair *pair, uint32_t length, uint64_t seed)
{
	static unsigned char data[1 << 17];
	uint32_t i;

	CHECK(length <= sizeof(data));
	for (i = 0; i < length; i++)
		data[i] = pattern(seed, i);
	return kucomms_channel_send(&pair->a, data, length, 0, seed, ~seed,
				    seed * 3);
}

static void check_view(const struct kucomms_view *view, uint32_t length,
		       uint64_t seed)
{
	uint32_t i;

	CHECK(view->length == length);
	CHECK(view->flags == 0);
	CHECK(view->type == seed);
	CHECK(view->id == ~seed);
	CHECK(view->user_value == seed * 3);
	for (i = 0; i < length; i++)
		CHECK(view->data[i] == pattern(seed, i));
}

static void receive_pattern(struct pair *pair, uint32_t length, uint64_t seed)
{
	struct kucomms_view view;

	CHECK(!kucomms_channel_peek(&pair->b, &view));
	check_view(&view, length, seed);
	kucomms_channel_advance(&pair->b, &view);
	kucomms_channel_release(&pair->b);
}

static void expect_empty(struct pair *pair)
{
	struct kucomms_view view;

	CHECK(kucomms_channel_peek(&pair->b, &view) == -EAGAIN);
}

/* ---- sizes --------------------------------------------------------------- */

static void test_arithmetic(void)
{
	uint64_t page = kucomms_page_size();

	CHECK(kucomms_frame_span(0) == 32);
	CHECK(kucomms_frame_span(1) == 40);
	CHECK(kucomms_frame_span(8) == 40);
	CHECK(kucomms_frame_span(9) == 48);
	CHECK(kucomms_frame_span(UINT32_MAX) == (1ULL << 32) + 32);
	CHECK(kucomms_ring_size(0) == page);
	CHECK(kucomms_ring_size(1) == page);
	CHECK(kucomms_ring_size(page) == page);
	CHECK(kucomms_ring_size(page + 1) == 2 * page);
	CHECK(kucomms_ring_size(KUCOMMS_RING_MAX) == KUCOMMS_RING_MAX);
	CHECK(kucomms_ring_size(KUCOMMS_RING_MAX + 1) == 0);
	CHECK(kucomms_message_max(page) == page - 32);
	CHECK(kucomms_message_max(KUCOMMS_RING_MAX) == (1ULL << 32) - 32);
	CHECK(kucomms_side_size(page) == 4 * page);
}

static void test_sizes(void)
{
	struct kucomms_frame *frame;
	struct pair pair;
	uint32_t most;

	pair_open(&pair, 0);
	most = (uint32_t)kucomms_message_max(pair.size);
	CHECK(send_pattern(&pair, 0, 1) >= 0);
	receive_pattern(&pair, 0, 1);
	CHECK(send_pattern(&pair, 1, 2) >= 0);
	receive_pattern(&pair, 1, 2);
	CHECK(send_pattern(&pair, most, 3) >= 0);
	CHECK(kucomms_channel_tx_free(&pair.a) == 0);
	CHECK(kucomms_channel_tx_avail(&pair.a) == pair.size);
	CHECK(kucomms_channel_rx_avail(&pair.b) == pair.size);
	receive_pattern(&pair, most, 3);
	CHECK(kucomms_channel_tx_free(&pair.a) == pair.size);
	CHECK(kucomms_channel_tx_avail(&pair.a) == 0);
	CHECK(send_pattern(&pair, most + 1, 4) == -EMSGSIZE);
	CHECK(kucomms_channel_reserve(&pair.a, UINT32_MAX, &frame, NULL) ==
	      -EMSGSIZE);
	expect_empty(&pair);
	CHECK(pair.a.messages_sent == 3 && pair.b.messages_received == 3);
	CHECK(pair.a.bytes_sent == most + 1u);
	CHECK(pair.b.bytes_received == most + 1u);
	CHECK(!pair.a.protocol_errors && !pair.b.protocol_errors);
	pair_close(&pair);
}

static void test_header(void)
{
	struct kucomms_view view;
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(kucomms_channel_send(&pair.a, "abc", 3, KUCOMMS_FLAG_REPLY,
				   UINT64_MAX, 0, 1ULL << 63) >= 0);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	CHECK(view.flags == KUCOMMS_FLAG_REPLY && view.length == 3);
	CHECK(view.type == UINT64_MAX && view.id == 0);
	CHECK(view.user_value == 1ULL << 63);
	CHECK(!memcmp(view.data, "abc", 3));
	pair_close(&pair);
}

static void test_both_directions(void)
{
	struct kucomms_view view;
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(kucomms_channel_send(&pair.a, "to b", 4, 0, 1, 2, 3) >= 0);
	CHECK(kucomms_channel_send(&pair.b, "to a!", 5, 0, 4, 5, 6) >= 0);
	CHECK(!kucomms_channel_peek(&pair.a, &view));
	CHECK(view.length == 5 && !memcmp(view.data, "to a!", 5));
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	CHECK(view.length == 4 && !memcmp(view.data, "to b", 4));
	pair_close(&pair);
}

/* ---- full, and round the end --------------------------------------------- */

static void test_full(void)
{
	uint64_t sent, got, fits;
	struct pair pair;

	pair_open(&pair, 0);
	fits = pair.size / kucomms_frame_span(64);
	for (sent = 0; send_pattern(&pair, 64, sent) >= 0; sent++)
		CHECK(sent < fits);
	CHECK(sent == fits);
	CHECK(send_pattern(&pair, 64, sent) == -EAGAIN);
	CHECK(pair.a.full_waits == 2);
	/* One out, one in; the order stays. */
	for (got = 0; got < 1000; got++) {
		receive_pattern(&pair, 64, got);
		CHECK(send_pattern(&pair, 64, sent++) >= 0);
		CHECK(send_pattern(&pair, 64, sent) == -EAGAIN);
	}
	for (; got < sent; got++)
		receive_pattern(&pair, 64, got);
	expect_empty(&pair);
	CHECK(pair.b.rx.high_water <= pair.size);
	CHECK(pair.a.tx.high_water <= pair.size);
	pair_close(&pair);
}

/* Every offset at which a frame can begin, with lengths that cross the end. */
static void test_wrap(void)
{
	static const uint32_t lengths[] = { 0, 1, 7, 8, 9, 63, 1000, 4064 };
	uint64_t offset, seed = 0;
	struct pair pair;
	size_t i;

	pair_open(&pair, 4096);
	CHECK(pair.size >= 4096);
	for (offset = 0; offset < pair.size; offset += 8) {
		for (i = 0; i < sizeof(lengths) / sizeof(*lengths); i++) {
			/* Round the ring to where the test begins. */
			while ((pair.a.tx.position & (pair.size - 1)) !=
			       offset) {
				uint64_t gap = (offset - pair.a.tx.position) &
					       (pair.size - 1);
				/* A gap below a header's size: once round. */
				uint32_t filler =
					(uint32_t)(gap < 32 ? pair.size / 2 :
						   gap) - 32;

				CHECK(send_pattern(&pair, filler, ++seed) >= 0);
				receive_pattern(&pair, filler, seed);
			}
			CHECK(send_pattern(&pair, lengths[i], ++seed) >= 0);
			CHECK(pair.a.tx.position ==
			      pair.b.rx.position +
			      kucomms_frame_span(lengths[i]));
			receive_pattern(&pair, lengths[i], seed);
		}
	}
	expect_empty(&pair);
	pair_close(&pair);
}

/* Both halves of the double mapping are the same memory. */
static void test_double_mapping(void)
{
	struct pair pair;
	uint64_t i;

	pair_open(&pair, 0);
	for (i = 0; i < pair.size; i += 509) {
		pair.a.tx.data[i] = (unsigned char)(i >> 3);
		CHECK(pair.a.tx.data[i + pair.size] == (unsigned char)(i >> 3));
		CHECK(pair.b.rx.data[i] == (unsigned char)(i >> 3));
		CHECK(pair.b.rx.data[i + pair.size] == (unsigned char)(i >> 3));
	}
	pair_close(&pair);
}

/* Positions are 64 bits and may run over. */
static void test_position_overflow(void)
{
	const uint64_t start = 0 - (uint64_t)20000;
	struct pair pair;
	uint64_t seed;

	pair_open(&pair, 0);
	pair.a.tx.position = start;
	pair.a.tx.consumed = start;
	pair.b.rx.position = start;
	pair.b.rx.published = start;
	pair.b.rx.available = start;
	raw_producer(&pair)->position = start;
	raw_consumer(&pair)->position = start;
	for (seed = 0; seed < 40; seed += 2) {
		CHECK(send_pattern(&pair, 1000, seed) >= 0);
		CHECK(send_pattern(&pair, 900, seed + 1) >= 0);
		receive_pattern(&pair, 1000, seed);
		CHECK(kucomms_channel_tx_avail(&pair.a) == 936);
		receive_pattern(&pair, 900, seed + 1);
	}
	CHECK(pair.a.tx.position < start);
	pair_close(&pair);
}

/* ---- reserve now, commit later ------------------------------------------- */

static struct kucomms_frame *reserve(struct pair *pair, uint32_t length,
				     uint64_t seed, struct kucomms_pin *pin)
{
	struct kucomms_frame *frame;
	uint32_t i;

	CHECK(!kucomms_channel_reserve(&pair->a, length, &frame, pin));
	frame->type = seed;
	frame->id = ~seed;
	frame->user_value = seed * 3;
	for (i = 0; i < length; i++)
		((unsigned char *)(frame + 1))[i] = pattern(seed, i);
	return frame;
}

static void test_busy_front(void)
{
	struct kucomms_frame *first, *second;
	struct pair pair;

	pair_open(&pair, 0);
	first = reserve(&pair, 100, 1, NULL);
	second = reserve(&pair, 200, 2, NULL);
	CHECK(send_pattern(&pair, 300, 3) >= 0);
	expect_empty(&pair);
	kucomms_ring_commit(second, 200, 0);
	expect_empty(&pair);
	CHECK(!kucomms_channel_park_rx(&pair.b));
	kucomms_ring_commit(first, 100, 0);
	CHECK(kucomms_channel_publish(&pair.a) == 1);
	receive_pattern(&pair, 100, 1);
	receive_pattern(&pair, 200, 2);
	receive_pattern(&pair, 300, 3);
	expect_empty(&pair);
	pair_close(&pair);
}

static void test_discard(void)
{
	struct kucomms_frame *first, *second, *third;
	struct pair pair;

	pair_open(&pair, 0);
	first = reserve(&pair, 10, 1, NULL);
	second = reserve(&pair, 20, 2, NULL);
	third = reserve(&pair, 30, 3, NULL);
	kucomms_channel_discard(&pair.a, second, 20);
	expect_empty(&pair);
	kucomms_channel_discard(&pair.a, first, 10);
	expect_empty(&pair);		/* two skipped, the third is busy */
	kucomms_ring_commit(third, 30, 0);
	receive_pattern(&pair, 30, 3);
	CHECK(pair.a.messages_sent == 1 && pair.a.bytes_sent == 30);
	CHECK(pair.b.messages_received == 1);

	/* Alone in the ring it is skipped and its space comes back. */
	CHECK(!kucomms_channel_park_rx(&pair.b));
	first = reserve(&pair, (uint32_t)kucomms_message_max(pair.size), 4,
			NULL);
	CHECK(send_pattern(&pair, 0, 5) == -EAGAIN);
	CHECK(kucomms_channel_park_tx(&pair.a, 0) == 1);
	CHECK(!kucomms_channel_park_rx(&pair.b));	/* woken, and nothing yet */
	CHECK(kucomms_channel_discard(&pair.a, first,
				      (uint32_t)kucomms_message_max(pair.size))
	      == 1);
	CHECK(kucomms_channel_park_rx(&pair.b) == 1);
	CHECK(kucomms_channel_release(&pair.b) == 1);
	CHECK(!kucomms_channel_park_rx(&pair.b));
	CHECK(send_pattern(&pair, 0, 5) == 1);
	receive_pattern(&pair, 0, 5);
	pair_close(&pair);
}

static void discard(struct pair *pair, unsigned int count)
{
	while (count--)
		kucomms_channel_discard(&pair->a, reserve(pair, 0, 0, NULL), 0);
}

/* One look passes so many frames, then the caller has its turn. */
static void test_many_discarded(void)
{
	const uint64_t most = KUCOMMS_SKIP_MOST * KUCOMMS_HEADER_SIZE;
	struct kucomms_view view;
	struct pair pair;
	uint64_t before;
	int err, looks;

	pair_open(&pair, 1 << 16);
	discard(&pair, 1000);
	CHECK(send_pattern(&pair, 10, 1) >= 0);
	for (looks = 0;; looks++) {
		before = pair.b.rx.position;
		err = kucomms_channel_peek(&pair.b, &view);
		if (!err)
			break;
		CHECK(err == KUCOMMS_SKIPPED);
		CHECK(pair.b.rx.position - before == most);
	}
	CHECK(looks == 1000 / KUCOMMS_SKIP_MOST);
	CHECK(pair.b.rx.position - before < most);
	receive_pattern(&pair, 10, 1);
	expect_empty(&pair);

	/* Nobody sleeps before all of it was passed. */
	discard(&pair, KUCOMMS_SKIP_MOST + 1);
	CHECK(kucomms_channel_park_rx(&pair.b) == 1);
	CHECK(kucomms_channel_park_rx(&pair.b) == 1);
	CHECK(kucomms_channel_park_rx(&pair.b) == 0);
	kucomms_channel_release(&pair.b);

	/* The room that it took is there again, and who waits for it is rung. */
	discard(&pair, (unsigned int)(pair.size / KUCOMMS_HEADER_SIZE));
	CHECK(kucomms_channel_park_tx(&pair.a, 0) >= 0);
	CHECK(kucomms_channel_peek(&pair.b, &view) == KUCOMMS_SKIPPED);
	CHECK(kucomms_channel_release(&pair.b) == 1);
	CHECK(kucomms_channel_tx_free(&pair.a) == most);
	while (kucomms_channel_peek(&pair.b, &view) == KUCOMMS_SKIPPED)
		kucomms_channel_release(&pair.b);

	/* That the producer is gone is no reason to believe that this is all. */
	discard(&pair, KUCOMMS_SKIP_MOST - KUCOMMS_HELD_MOST);
	for (looks = 0; looks < KUCOMMS_HELD_MOST; looks++)
		reserve(&pair, 0, 2, NULL);
	CHECK(send_pattern(&pair, 10, 3) >= 0);
	pair.b.rx.final = 1;
	CHECK(kucomms_channel_peek(&pair.b, &view) == KUCOMMS_SKIPPED);
	receive_pattern(&pair, 10, 3);
	expect_empty(&pair);
	pair_close(&pair);
}

/* ---- a consumer that lies about what it has read -------------------------- */

static void lie(struct pair *pair, uint64_t position)
{
	WRITE_ONCE(raw_consumer(pair)->position, position);
}

static void check_untouched(const struct kucomms_frame *frame, uint32_t length,
			    uint64_t seed)
{
	uint32_t i;

	CHECK(frame->type == seed && frame->id == ~seed);
	for (i = 0; i < length; i++)
		CHECK(((const unsigned char *)(frame + 1))[i] ==
		      pattern(seed, i));
}

/* Send until there is no more room, or something is wrong. */
static int send_until_error(struct pair *pair)
{
	int err;

	do {
		err = send_pattern(pair, 64, 9);
	} while (err >= 0);
	return err;
}

/* Each way to look for room, over a loan that is out, of which the peer says it is read. */
static void test_consumer_beyond_a_loan(void)
{
	const uint64_t lies[] = { 8, KUCOMMS_HEADER_SIZE + 104, UINT64_MAX };
	struct kucomms_frame *loan, *other;
	unsigned int how, lie_number;
	struct pair pair;
	uint64_t before;
	int err;

	for (lie_number = 0; lie_number < 3; lie_number++) {
		for (how = 0; how < 4; how++) {
			pair_open(&pair, 0);
			loan = reserve(&pair, 100, 1, NULL);
			before = pair.a.tx.position;
			while (send_pattern(&pair, 64, 9) >= 0)
				continue;
			lie(&pair, lies[lie_number] == UINT64_MAX ?
			    pair.a.tx.position : lies[lie_number]);
			if (how == 0)
				err = send_until_error(&pair);
			else if (how == 1)
				err = kucomms_channel_reserve(&pair.a, 64,
							      &other, NULL);
			else if (how == 2)	/* a long one */
				err = kucomms_channel_send(&pair.a, loan + 1,
							   (uint32_t)pair.size / 2,
							   0, 1, 2, 3);
			else		/* looks again instead of sleeping */
				err = kucomms_channel_park_tx(&pair.a, 64) ==
				      -EAGAIN ? send_until_error(&pair) : 0;
			CHECK(err == -EPROTO);
			CHECK(pair.a.tx.consumed == 0);
			CHECK(pair.a.tx.position > before);
			check_untouched(loan, 100, 1);
			pair_close(&pair);
		}
	}
}

/* What is behind a loan is not free before that is committed, either. */
static void test_room_behind_a_loan(void)
{
	struct kucomms_frame *first, *second, *third;
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(send_pattern(&pair, 64, 1) >= 0);
	first = reserve(&pair, 64, 2, NULL);
	second = reserve(&pair, 64, 3, NULL);
	CHECK(send_pattern(&pair, 64, 4) >= 0);
	third = reserve(&pair, 64, 5, NULL);
	CHECK(pair.a.tx.held_count == 3);
	/* Up to a loan the consumer may be, and no further. */
	receive_pattern(&pair, 64, 1);
	CHECK(!kucomms_ring_refresh_consumed(&pair.a.tx));
	CHECK(pair.a.tx.consumed == 96);
	lie(&pair, 96 + 8);
	CHECK(kucomms_ring_refresh_consumed(&pair.a.tx) == -EPROTO);
	/* The second one is committed, and the first one is still out. */
	kucomms_ring_commit(second, 64, 0);
	lie(&pair, 96 + 192);
	CHECK(kucomms_ring_refresh_consumed(&pair.a.tx) == -EPROTO);
	CHECK(pair.a.tx.held_count == 2);
	lie(&pair, 96);
	kucomms_channel_discard(&pair.a, first, 64);
	receive_pattern(&pair, 64, 3);
	receive_pattern(&pair, 64, 4);
	CHECK(!kucomms_ring_refresh_consumed(&pair.a.tx));
	CHECK(pair.a.tx.consumed == 96 * 4 && pair.a.tx.held_count == 1);
	kucomms_ring_commit(third, 64, 0);
	receive_pattern(&pair, 64, 5);
	CHECK(!kucomms_ring_refresh_consumed(&pair.a.tx));
	CHECK(pair.a.tx.consumed == 96 * 5 && !pair.a.tx.held_count);
	expect_empty(&pair);
	pair_close(&pair);
}

/* As many as can be held; a long message is sent all the same, in another way. */
static void test_many_held(void)
{
	const uint32_t large = KUCOMMS_PUT_MAX + 1;
	struct kucomms_frame *frames[KUCOMMS_HELD_MOST], *one_more;
	struct pair pair;
	unsigned int i;

	pair_open(&pair, 1 << 16);
	for (i = 0; i < KUCOMMS_HELD_MOST; i++)
		frames[i] = reserve(&pair, 8, i, NULL);
	CHECK(kucomms_channel_reserve(&pair.a, 8, &one_more, NULL) == -ENOBUFS);
	CHECK(send_pattern(&pair, large, i) >= 0);
	/* Any that is committed makes room for one. */
	kucomms_ring_commit(frames[i / 2], 8, 0);
	CHECK(!kucomms_channel_reserve(&pair.a, 8, &one_more, NULL));
	kucomms_channel_discard(&pair.a, one_more, 8);
	for (i = 0; i < KUCOMMS_HELD_MOST; i++)
		if (i != KUCOMMS_HELD_MOST / 2)
			kucomms_ring_commit(frames[i], 8, 0);
	for (i = 0; i < KUCOMMS_HELD_MOST; i++)
		receive_pattern(&pair, 8, i);
	receive_pattern(&pair, large, i);
	expect_empty(&pair);
	pair_close(&pair);
}

static void test_final(void)
{
	struct kucomms_frame *frame;
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(send_pattern(&pair, 10, 1) >= 0);
	reserve(&pair, 20, 2, NULL);
	CHECK(send_pattern(&pair, 30, 3) >= 0);
	frame = reserve(&pair, 40, 4, NULL);
	kucomms_channel_discard(&pair.a, frame, 40);
	reserve(&pair, 50, 5, NULL);
	receive_pattern(&pair, 10, 1);
	expect_empty(&pair);
	pair.b.rx.final = 1;
	receive_pattern(&pair, 30, 3);
	expect_empty(&pair);
	CHECK(pair.b.rx.position == pair.a.tx.position);
	CHECK(pair.b.messages_received == 2);
	pair_close(&pair);
}

static void test_state(void)
{
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(kucomms_ring_peer_state(&pair.b.rx) == KUCOMMS_STATE_OPEN);
	CHECK(send_pattern(&pair, 10, 1) >= 0);
	kucomms_channel_close(&pair.a, KUCOMMS_STATE_CLOSED);
	CHECK(kucomms_ring_peer_state(&pair.b.rx) == KUCOMMS_STATE_CLOSED);
	CHECK(kucomms_ring_peer_state(&pair.a.rx) == KUCOMMS_STATE_OPEN);
	receive_pattern(&pair, 10, 1);
	expect_empty(&pair);
	pair_close(&pair);
}

/* ---- pins ----------------------------------------------------------------- */

static const int orders[24][4] = {
	{ 0, 1, 2, 3 }, { 0, 1, 3, 2 }, { 0, 2, 1, 3 }, { 0, 2, 3, 1 },
	{ 0, 3, 1, 2 }, { 0, 3, 2, 1 }, { 1, 0, 2, 3 }, { 1, 0, 3, 2 },
	{ 1, 2, 0, 3 }, { 1, 2, 3, 0 }, { 1, 3, 0, 2 }, { 1, 3, 2, 0 },
	{ 2, 0, 1, 3 }, { 2, 0, 3, 1 }, { 2, 1, 0, 3 }, { 2, 1, 3, 0 },
	{ 2, 3, 0, 1 }, { 2, 3, 1, 0 }, { 3, 0, 1, 2 }, { 3, 0, 2, 1 },
	{ 3, 1, 0, 2 }, { 3, 1, 2, 0 }, { 3, 2, 0, 1 }, { 3, 2, 1, 0 },
};

/* The space of @count held spans comes back up to the oldest that is held. */
static uint64_t given_back(const int *held, const uint64_t *spans, int count)
{
	uint64_t bytes = 0;
	int i;

	for (i = 0; i < count && !held[i]; i++)
		bytes += spans[i];
	return bytes;
}

static void test_borrow(void)
{
	struct kucomms_view views[4];
	struct kucomms_pin pins[4];
	uint64_t spans[4], base;
	struct pair pair;
	int held[4];
	int order, i;

	pair_open(&pair, 0);
	for (order = 0; order < 24; order++) {
		base = pair.b.rx.published;
		for (i = 0; i < 4; i++) {
			CHECK(send_pattern(&pair, 100u * (unsigned int)i,
					   (uint64_t)i) >= 0);
			spans[i] = kucomms_frame_span(100u * (uint32_t)i);
			held[i] = 1;
		}
		for (i = 0; i < 4; i++) {
			CHECK(!kucomms_channel_peek(&pair.b, &views[i]));
			kucomms_channel_borrow(&pair.b, &views[i], &pins[i]);
		}
		expect_empty(&pair);
		kucomms_channel_release(&pair.b);
		CHECK(raw_consumer(&pair)->position == base);
		for (i = 0; i < 4; i++) {
			int which = orders[order][i];

			check_view(&views[which], 100u * (uint32_t)which,
				   (uint64_t)which);
			kucomms_channel_unpin_rx(&pins[which]);
			held[which] = 0;
			kucomms_channel_release(&pair.b);
			CHECK(raw_consumer(&pair)->position ==
			      base + given_back(held, spans, 4));
		}
		CHECK(kucomms_channel_tx_free(&pair.a) == pair.size);
	}
	pair_close(&pair);
}

/* Messages that are only read go out behind a borrowed one, not past it. */
static void test_borrow_blocks_release(void)
{
	struct kucomms_view view;
	struct kucomms_pin pin;
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(send_pattern(&pair, 8, 1) >= 0);
	CHECK(send_pattern(&pair, 8, 2) >= 0);
	CHECK(send_pattern(&pair, 8, 3) >= 0);
	receive_pattern(&pair, 8, 1);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	kucomms_channel_borrow(&pair.b, &view, &pin);
	receive_pattern(&pair, 8, 3);
	CHECK(kucomms_channel_tx_avail(&pair.a) == 80);
	kucomms_channel_unpin_rx(&pin);
	kucomms_channel_release(&pair.b);
	CHECK(kucomms_channel_tx_avail(&pair.a) == 0);
	pair_close(&pair);
}

/* A loan that was dropped while somebody still writes into it. */
static void test_loan_pins(void)
{
	struct kucomms_frame *frames[4];
	struct kucomms_pin pins[4];
	uint64_t spans[4], before;
	struct pair pair;
	int held[4];
	int order, i;

	pair_open(&pair, 0);
	for (order = 0; order < 24; order++) {
		for (i = 0; i < 4; i++) {
			frames[i] = reserve(&pair, 50u * (uint32_t)i,
					    (uint64_t)i, &pins[i]);
			spans[i] = kucomms_frame_span(50u * (uint32_t)i);
			held[i] = 1;
		}
		for (i = 0; i < 4; i++)
			kucomms_channel_discard(&pair.a, frames[i],
						50u * (uint32_t)i);
		expect_empty(&pair);
		kucomms_channel_release(&pair.b);
		/* The consumer has passed them, the space is not free yet. */
		before = kucomms_channel_tx_free(&pair.a);
		CHECK(before == pair.size - spans[0] - spans[1] - spans[2] -
		      spans[3]);
		CHECK(kucomms_channel_tx_avail(&pair.a) == 0);
		for (i = 0; i < 4; i++) {
			int which = orders[order][i];

			kucomms_channel_unpin_tx(&pair.a, &pins[which]);
			held[which] = 0;
			CHECK(kucomms_channel_tx_free(&pair.a) ==
			      before + given_back(held, spans, 4));
		}
		CHECK(kucomms_channel_tx_free(&pair.a) == pair.size);
	}
	pair_close(&pair);
}

/* A pinned loan in front of the consumer takes no room twice. */
static void test_loan_out(void)
{
	struct kucomms_frame *frame;
	struct kucomms_pin pin;
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(send_pattern(&pair, 8, 1) >= 0);
	frame = reserve(&pair, 8, 2, &pin);
	CHECK(kucomms_channel_tx_free(&pair.a) == pair.size - 80);
	receive_pattern(&pair, 8, 1);
	CHECK(kucomms_channel_tx_free(&pair.a) == pair.size - 40);
	kucomms_ring_commit(frame, 8, 0);
	receive_pattern(&pair, 8, 2);
	CHECK(kucomms_channel_tx_free(&pair.a) == pair.size - 40);
	CHECK(send_pattern(&pair, (uint32_t)kucomms_message_max(pair.size), 3)
	      == -EAGAIN);
	kucomms_channel_unpin_tx(&pair.a, &pin);
	CHECK(send_pattern(&pair, (uint32_t)kucomms_message_max(pair.size), 3)
	      >= 0);
	pair_close(&pair);
}

/* ---- waking ---------------------------------------------------------------- */

static void test_data_epoch(void)
{
	struct pair pair;
	int burst, i;

	pair_open(&pair, 0);
	/* Nobody sleeps yet: no bell. */
	CHECK(send_pattern(&pair, 8, 0) == 0);
	CHECK(kucomms_channel_park_rx(&pair.b) == 1);
	receive_pattern(&pair, 8, 0);
	for (burst = 0; burst < 5; burst++) {
		CHECK(!kucomms_channel_park_rx(&pair.b));
		CHECK(send_pattern(&pair, 8, 0) == 1);
		for (i = 1; i < 20; i++)
			CHECK(send_pattern(&pair, 8, (uint64_t)i) == 0);
		for (i = 0; i < 20; i++)
			receive_pattern(&pair, 8, (uint64_t)i);
		/* Awake, all of it is found without a bell. */
		CHECK(send_pattern(&pair, 8, 0) == 0);
		receive_pattern(&pair, 8, 0);
	}
	/* Parked twice, as after a bell for another reason: rung once. */
	CHECK(!kucomms_channel_park_rx(&pair.b));
	CHECK(!kucomms_channel_park_rx(&pair.b));
	CHECK(send_pattern(&pair, 8, 0) == 1);
	CHECK(send_pattern(&pair, 8, 1) == 0);
	CHECK(pair.a.doorbells_rung == 6);
	pair_close(&pair);
}

static void test_space_epoch(void)
{
	struct kucomms_view view;
	struct pair pair;
	uint64_t fits;
	uint64_t i;

	pair_open(&pair, 0);
	fits = pair.size / 32;
	CHECK(kucomms_channel_park_tx(&pair.a, 0) == -EAGAIN); /* there is room */
	for (i = 0; i < fits; i++)
		CHECK(send_pattern(&pair, 0, i) >= 0);
	CHECK(kucomms_channel_park_tx(&pair.a, 0) == 0);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	/* Nothing was given back yet, nothing to ring for. */
	CHECK(kucomms_channel_release(&pair.b) == 0);
	kucomms_channel_advance(&pair.b, &view);
	CHECK(kucomms_channel_release(&pair.b) == 1);
	CHECK(kucomms_channel_release(&pair.b) == 0);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	kucomms_channel_advance(&pair.b, &view);
	CHECK(kucomms_channel_release(&pair.b) == 0);
	CHECK(kucomms_channel_park_tx(&pair.a, 32) == -EAGAIN);
	CHECK(kucomms_channel_park_tx(&pair.a, 33) == 0);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	kucomms_channel_advance(&pair.b, &view);
	CHECK(kucomms_channel_release(&pair.b) == 1);
	CHECK(pair.b.doorbells_rung == 2);
	pair_close(&pair);
}

/* Released lazily: a bell when a quarter is free, and whoever stops can ask. */
static void test_lazy_release(void)
{
	uint64_t fits, i, quarter;
	struct kucomms_view view;
	struct pair pair;

	pair_open(&pair, 0);
	fits = pair.size / 32;
	quarter = fits / 4;
	CHECK(kucomms_channel_release_lazily(&pair.b) == 0);
	for (i = 0; i < fits; i++)
		CHECK(send_pattern(&pair, 0, i) >= 0);
	/* Nobody sleeps for it. */
	receive_pattern(&pair, 0, 0);
	CHECK(kucomms_channel_release_lazily(&pair.b) == 0);
	CHECK(send_pattern(&pair, 0, fits) >= 0);
	CHECK(kucomms_channel_park_tx(&pair.a, 0) == 0);
	for (i = 1; i < quarter; i++) {
		CHECK(!kucomms_channel_peek(&pair.b, &view));
		kucomms_channel_advance(&pair.b, &view);
		CHECK(kucomms_channel_release_lazily(&pair.b) == -EAGAIN);
	}
	for (; i <= quarter + 3; i++) {
		CHECK(!kucomms_channel_peek(&pair.b, &view));
		kucomms_channel_advance(&pair.b, &view);
		CHECK(kucomms_channel_release_lazily(&pair.b) ==
		      (i == quarter));
	}
	CHECK(kucomms_channel_wake_producer(&pair.b) == 0);
	CHECK(pair.b.doorbells_rung == 1);
	/* Asked before that, once. */
	while (send_pattern(&pair, 0, 0) >= 0)
		;
	CHECK(kucomms_channel_park_tx(&pair.a, 0) == 0);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	kucomms_channel_advance(&pair.b, &view);
	CHECK(kucomms_channel_release_lazily(&pair.b) == -EAGAIN);
	CHECK(kucomms_channel_wake_producer(&pair.b) == 1);
	CHECK(kucomms_channel_wake_producer(&pair.b) == 0);
	/* A position that cannot be is rung for. */
	CHECK(kucomms_channel_park_tx(&pair.a, 32) == 0);
	raw_producer(&pair)->position += 2 * pair.size;
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	kucomms_channel_advance(&pair.b, &view);
	CHECK(kucomms_channel_release_lazily(&pair.b) == 1);
	pair_close(&pair);
}

/* Written first, shown once: the consumer sees all of it or nothing. */
static void test_publish(void)
{
	struct kucomms_frame *frame, *again;
	struct kucomms_view view;
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(!kucomms_ring_next(&pair.a.tx, 8, &frame));
	CHECK(kucomms_channel_tx_avail(&pair.a) == 0);
	expect_empty(&pair);
	/* Nothing was taken: the next one goes to the same place. */
	CHECK(!kucomms_ring_next(&pair.a.tx, 16, &again));
	CHECK(again == frame);
	kucomms_channel_fill(frame, "12345678", 8, 1, 2, 3);
	expect_empty(&pair);
	kucomms_ring_publish(&pair.a.tx, frame, 8, KUCOMMS_FLAG_REPLY,
			     KUCOMMS_KIND_MESSAGE);
	CHECK(kucomms_channel_tx_avail(&pair.a) == 40);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	CHECK(view.length == 8 && view.flags == KUCOMMS_FLAG_REPLY);
	CHECK(view.type == 1 && view.id == 2 && view.user_value == 3);
	CHECK(!memcmp(view.data, "12345678", 8));
	CHECK(kucomms_ring_next(&pair.a.tx,
				(uint32_t)kucomms_message_max(pair.size),
				&frame) == -EAGAIN);
	CHECK(kucomms_ring_next(&pair.a.tx, (uint32_t)pair.size, &frame) ==
	      -EMSGSIZE);
	pair_close(&pair);
}

/* Frames that hand over buffers, or are no messages at all. */
static void test_buffers(void)
{
	static const struct kucomms_carried two[] = { { 2, 3, 4 }, { 5, 6, 7 } };
	const struct kucomms_pool_news news = { .number = 2 };
	uint32_t most;
	struct kucomms_view view;
	struct pair pair;

	pair_open_with(&pair, 0, KUCOMMS_FEATURE_POOLS);
	CHECK(!kucomms_channel_put_front_locked(&pair.a, kucomms_frame_kind(2),
						KUCOMMS_FLAG_REPLY, two,
						sizeof(two), "data", 4, 1, 2, 3));
	CHECK(!kucomms_channel_put_front_locked(&pair.a, kucomms_frame_kind(1),
						KUCOMMS_FLAG_NOTICE, two, 16,
						NULL, 0, 0, 0, 0));
	CHECK(!kucomms_channel_put_front_locked(&pair.a, KUCOMMS_KIND_POOL, 0,
						&news, sizeof(news), NULL, 0, 0,
						0, 0));
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	CHECK(view.kind == KUCOMMS_KIND_BUFFER && view.buffers == 2);
	CHECK(view.length == 36 && view.flags == KUCOMMS_FLAG_REPLY);
	CHECK(view.type == 1 && view.id == 2 && view.user_value == 3);
	CHECK(!memcmp(view.data, two, 32) && !memcmp(view.data + 32, "data", 4));
	kucomms_channel_advance_front(&pair.b, &view);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	CHECK(view.kind == KUCOMMS_KIND_BUFFER && view.buffers == 1 &&
	      view.length == 16 && view.flags == KUCOMMS_FLAG_NOTICE);
	kucomms_channel_advance_front(&pair.b, &view);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	CHECK(view.kind == KUCOMMS_KIND_POOL && view.length == sizeof(news));
	kucomms_channel_advance_front(&pair.b, &view);
	expect_empty(&pair);
	/* Counted is what is the user's. */
	CHECK(pair.a.messages_sent == 1 && pair.a.bytes_sent == 4);
	CHECK(pair.b.messages_received == 1 && pair.b.bytes_received == 4);
	CHECK(pair.a.publishes == 3);
	/* Never, and not now. */
	most = (uint32_t)kucomms_message_max(pair.size) - 32;
	CHECK(kucomms_channel_put_front_locked(&pair.a, kucomms_frame_kind(2), 0,
					       two, 32, pair.raw, most + 1, 0, 0,
					       0) == -EMSGSIZE);
	CHECK(kucomms_channel_put_front_locked(&pair.a, kucomms_frame_kind(2), 0,
					       two, 32, pair.raw, UINT32_MAX, 0,
					       0, 0) == -EMSGSIZE);
	CHECK(kucomms_channel_put_front_locked(&pair.a, kucomms_frame_kind(2), 0,
					       two, 32, pair.raw, most, 0, 0,
					       0) == -EAGAIN);
	CHECK(pair.a.full_waits == 1);
	CHECK(kucomms_channel_put_front_locked(&pair.a, kucomms_frame_kind(2),
					       KUCOMMS_FLAG_NOTICE, two, 32,
					       pair.raw, most, 0, 0, 0) ==
	      -EAGAIN);
	CHECK(pair.a.full_waits == 1);
	pair_close(&pair);
	/* Without the feature it is nonsense. */
	pair_open(&pair, 0);
	CHECK(!kucomms_channel_put_front_locked(&pair.a, kucomms_frame_kind(2), 0,
						two, sizeof(two), NULL, 0, 0, 0,
						0));
	CHECK(kucomms_channel_peek(&pair.b, &view) == -EPROTO);
	pair_close(&pair);
}

/* A consumer learns that the producer sleeps for what it has borrowed. */
static void test_starves(void)
{
	struct kucomms_view view;
	struct kucomms_pin pin;
	struct pair pair;
	uint32_t half;

	pair_open(&pair, 0);
	half = (uint32_t)(pair.size / 2 - KUCOMMS_HEADER_SIZE);
	CHECK(send_pattern(&pair, half, 0) >= 0);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	kucomms_channel_borrow(&pair.b, &view, &pin);
	CHECK(!kucomms_channel_park_rx(&pair.b));
	CHECK(!kucomms_channel_peer_starves(&pair.b));
	/* Found room after all: not asleep, whatever its epoch says. */
	CHECK(kucomms_channel_park_tx(&pair.a, half) == -EAGAIN);
	CHECK(!kucomms_channel_peer_starves(&pair.b));
	/* More than is left: rings once, and the consumer sees why. */
	CHECK(kucomms_channel_park_tx(&pair.a, half + 1) == 1);
	CHECK(kucomms_channel_park_tx(&pair.a, half + 1) == 0);
	CHECK(!kucomms_channel_park_rx(&pair.b));
	CHECK(kucomms_channel_peer_starves(&pair.b));
	/* What is sent instead says that nobody sleeps any more. */
	CHECK(send_pattern(&pair, 0, 1) == 1);
	CHECK(!kucomms_channel_peer_starves(&pair.b));
	CHECK(kucomms_channel_park_tx(&pair.a, half + 1) >= 0);
	kucomms_channel_unpark_tx(&pair.a);
	CHECK(!kucomms_channel_peer_starves(&pair.b));
	/* Without a pin the consumer only has to release. */
	CHECK(kucomms_channel_park_tx(&pair.a, half + 1) >= 0);
	CHECK(kucomms_channel_peer_starves(&pair.b));
	kucomms_channel_unpin_rx(&pin);
	CHECK(!kucomms_channel_peer_starves(&pair.b));
	CHECK(kucomms_channel_release(&pair.b) == 1);
	pair_close(&pair);
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void test_poll(void)
{
	const uint64_t some = 10000000;
	struct kucomms_channel *channels[2];
	struct pair one, two;
	uint64_t begin;

	pair_open(&one, 0);
	pair_open(&two, 0);
	channels[0] = &one.b;
	channels[1] = &two.b;
	begin = now();
	CHECK(kucomms_channels_poll(channels, 2, some) == 0);
	CHECK(now() - begin >= some);
	CHECK(send_pattern(&two, 8, 1) == 0);
	CHECK(kucomms_channels_poll(channels, 2, 1000000000) == 1);
	receive_pattern(&two, 8, 1);
	CHECK(kucomms_channels_poll(channels, 2, 0) == 0);
	pair_close(&one);
	pair_close(&two);
}

/* ---- a hostile peer -------------------------------------------------------- */

static void expect_broken(struct pair *pair)
{
	uint64_t before = pair->b.protocol_errors;
	struct kucomms_view view;

	CHECK(kucomms_channel_peek(&pair->b, &view) == -EPROTO);
	CHECK(pair->b.protocol_errors == before + 1);
	/* It must not go to sleep over that either. */
	CHECK(kucomms_channel_park_rx(&pair->b) == 1);
}

static void test_hostile_producer_position(void)
{
	struct kucomms_producer *raw;
	struct pair pair;

	pair_open(&pair, 0);
	raw = raw_producer(&pair);
	CHECK(send_pattern(&pair, 100, 1) >= 0);
	receive_pattern(&pair, 100, 1);

	raw->position = 0;				/* back */
	expect_broken(&pair);
	raw->position = pair.a.tx.position - 8;
	expect_broken(&pair);
	raw->position = pair.a.tx.position + 4;		/* misaligned */
	expect_broken(&pair);
	raw->position = pair.a.tx.position + 1;
	expect_broken(&pair);
	raw->position = pair.a.tx.position + pair.size + 8;	/* ahead */
	expect_broken(&pair);
	raw->position = UINT64_MAX - 7;
	expect_broken(&pair);
	raw->position = pair.a.tx.position;
	CHECK(send_pattern(&pair, 100, 2) >= 0);
	receive_pattern(&pair, 100, 2);
	pair_close(&pair);
}

/* Ahead is measured from what was given back, not from what was read. */
static void test_hostile_producer_overrun(void)
{
	struct kucomms_view view;
	struct kucomms_pin pin;
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(send_pattern(&pair, 100, 1) >= 0);
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	kucomms_channel_borrow(&pair.b, &view, &pin);
	kucomms_channel_release(&pair.b);
	raw_producer(&pair)->position = pair.size + 8;
	expect_broken(&pair);
	/* Back, though not behind what was given back. */
	raw_producer(&pair)->position = pair.a.tx.position - 8;
	expect_broken(&pair);
	raw_producer(&pair)->position = pair.a.tx.position;
	expect_empty(&pair);
	pair_close(&pair);
}

static void hostile_control(struct pair *pair, uint64_t control)
{
	uint64_t position = pair->b.rx.position;
	struct kucomms_frame *frame = raw_frame(pair, position);
	uint64_t good = frame->control;

	frame->control = control;
	expect_broken(pair);
	CHECK(pair->b.rx.position == position);
	frame->control = good;
}

static void test_hostile_frame(void)
{
	struct kucomms_view view;
	struct pair pair;
	uint32_t bit;

	pair_open(&pair, 0);
	/* Somewhere else than at the start. */
	CHECK(send_pattern(&pair, 1000, 1) >= 0);
	receive_pattern(&pair, 1000, 1);
	CHECK(send_pattern(&pair, 100, 2) >= 0);

	/* 100 bytes are padded to 104: 105 begin where nothing is published. */
	hostile_control(&pair, kucomms_frame_control(105, 0, 0));
	hostile_control(&pair, kucomms_frame_control(UINT32_MAX, 0, 0));
	hostile_control(&pair, kucomms_frame_control(UINT32_MAX,
						     KUCOMMS_FLAG_DISCARD, 0));
	hostile_control(&pair, kucomms_frame_control(105, KUCOMMS_FLAG_BUSY,
						     0));
	for (bit = 0; bit < 16; bit++) {
		if (KUCOMMS_FLAGS & 1u << bit)
			continue;
		hostile_control(&pair, kucomms_frame_control(100, 1u << bit,
							     0));
	}
	for (bit = 0; bit < 8; bit++)
		hostile_control(&pair, kucomms_frame_control(100, 0,
							     1u << bit));
	for (bit = 56; bit < 64; bit++)
		hostile_control(&pair, 100 | 1ULL << bit);
	hostile_control(&pair, UINT64_MAX);

	/* Less than a header is published. */
	CHECK(!kucomms_channel_peek(&pair.b, &view));
	kucomms_channel_advance(&pair.b, &view);
	kucomms_channel_release(&pair.b);
	raw_producer(&pair)->position += 8;
	raw_frame(&pair, pair.b.rx.position)->control = 0;
	expect_broken(&pair);
	pair_close(&pair);
}

/* Also in the last 8 bytes of the ring, where a header crosses the end. */
static void test_hostile_frame_at_end(void)
{
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(send_pattern(&pair, (uint32_t)pair.size - 40, 1) >= 0);
	receive_pattern(&pair, (uint32_t)pair.size - 40, 1);
	CHECK((pair.b.rx.position & (pair.size - 1)) == pair.size - 8);
	CHECK(send_pattern(&pair, 16, 2) >= 0);
	hostile_control(&pair, kucomms_frame_control(17, 0, 0));
	hostile_control(&pair, kucomms_frame_control(UINT32_MAX, 0, 0));
	receive_pattern(&pair, 16, 2);
	pair_close(&pair);
}

/* With final set a busy frame is skipped, but not further than published. */
static void test_hostile_final(void)
{
	struct pair pair;

	pair_open(&pair, 0);
	reserve(&pair, 100, 1, NULL);
	pair.b.rx.final = 1;
	hostile_control(&pair, kucomms_frame_control(UINT32_MAX,
						     KUCOMMS_FLAG_BUSY, 0));
	hostile_control(&pair, kucomms_frame_control(100, 0x8001, 0));
	expect_empty(&pair);
	pair_close(&pair);
}

/* A producer that said it is gone, and goes on, is heard once more and no more. */
static void test_hostile_after_the_end(void)
{
	struct pair pair;

	pair_open(&pair, 0);
	CHECK(send_pattern(&pair, 10, 1) >= 0);
	receive_pattern(&pair, 10, 1);
	CHECK(send_pattern(&pair, 20, 2) >= 0);
	kucomms_channel_close(&pair.a, KUCOMMS_STATE_CLOSED);
	pair.b.rx.final = 1;
	CHECK(send_pattern(&pair, 30, 3) >= 0);
	receive_pattern(&pair, 20, 2);
	CHECK(send_pattern(&pair, 40, 4) >= 0);
	receive_pattern(&pair, 30, 3);
	expect_empty(&pair);
	pair_close(&pair);
}

static void expect_refused(struct pair *pair)
{
	uint64_t before = pair->a.protocol_errors;
	struct kucomms_frame *frame;

	CHECK(send_pattern(pair, 64, 9) == -EPROTO);
	CHECK(pair->a.protocol_errors == before + 1);
	CHECK(kucomms_channel_reserve(&pair->a, 64, &frame, NULL) ==
	      -EPROTO);
	CHECK(kucomms_channel_park_tx(&pair->a, 64) == -EAGAIN);
}

static void test_hostile_consumer(void)
{
	struct kucomms_consumer *raw;
	struct pair pair;
	uint64_t i;

	pair_open(&pair, 0);
	raw = raw_consumer(&pair);
	for (i = 0; i < 10; i++) {
		CHECK(send_pattern(&pair, 64, i) >= 0);
		receive_pattern(&pair, 64, i);
	}
	while (send_pattern(&pair, 64, i) >= 0)
		i++;
	CHECK(pair.a.tx.consumed == 960);

	raw->position = 0;				/* back */
	expect_refused(&pair);
	raw->position = 952;
	expect_refused(&pair);
	raw->position = pair.a.tx.position + 8;		/* ahead */
	expect_refused(&pair);
	raw->position = UINT64_MAX - 7;
	expect_refused(&pair);
	raw->position = 960 + 97;			/* misaligned */
	expect_refused(&pair);
	raw->position = 960 + 4;
	expect_refused(&pair);
	CHECK(pair.a.tx.consumed == 960);
	CHECK(kucomms_channel_tx_free(&pair.a) < 96);
	raw->position = 960;
	CHECK(send_pattern(&pair, 64, 9) == -EAGAIN);
	receive_pattern(&pair, 64, 10);
	CHECK(send_pattern(&pair, 64, 9) >= 0);
	pair_close(&pair);
}

/* The consumer has read a loan of which a view lives: its bytes stay taken. */
static void test_consumer_passes_pinned_loan(void)
{
	struct kucomms_frame *frame;
	struct kucomms_pin pin;
	struct pair pair;
	uint32_t most;

	pair_open(&pair, 0);
	most = (uint32_t)kucomms_message_max(pair.size);
	frame = reserve(&pair, 1000, 1, &pin);
	CHECK(kucomms_channel_tx_free(&pair.a) == pair.size - 1032);
	kucomms_channel_discard(&pair.a, frame, 1000);
	expect_empty(&pair);
	kucomms_channel_release(&pair.b);
	CHECK(send_pattern(&pair, most, 2) == -EAGAIN);
	CHECK(kucomms_channel_tx_free(&pair.a) == pair.size - 1032);
	kucomms_channel_unpin_tx(&pair.a, &pin);
	CHECK(send_pattern(&pair, most, 2) >= 0);
	pair_close(&pair);
}

/* ---- turns ------------------------------------------------------------------- */

static void expect_turn(struct pair *pair, const struct kucomms_channel *whose)
{
	CHECK(kucomms_channel_has_turn(&pair->a) == (whose == &pair->a));
	CHECK(kucomms_channel_has_turn(&pair->b) == (whose == &pair->b));
}

static void turns_open(struct pair *pair, uint64_t asked)
{
	pair_open_with(pair, asked, KUCOMMS_FEATURE_TURNS);
	CHECK(kucomms_channel_has_turns(&pair->a));
	CHECK(kucomms_channel_has_turns(&pair->b));
	expect_turn(pair, &pair->b);	/* who connects begins */
}

static int send_one(struct kucomms_channel *channel, uint32_t flags)
{
	return kucomms_channel_send(channel, "one", flags ? 0 : 3, flags, 1, 2,
				    3);
}

static void receive_one(struct kucomms_channel *channel, uint32_t flags)
{
	struct kucomms_view view;

	CHECK(!kucomms_channel_peek(channel, &view));
	CHECK(view.flags == flags && view.length == (flags ? 0 : 3));
	/* To look is not to receive. */
	CHECK(!kucomms_channel_has_turn(channel));
	kucomms_channel_advance(channel, &view);
	CHECK(kucomms_channel_has_turn(channel));
	kucomms_channel_release(channel);
}

static void test_turns(void)
{
	static unsigned char large[KUCOMMS_PUT_MAX + 1];
	struct kucomms_frame *frame;
	struct kucomms_view view;
	struct kucomms_pin pin;
	struct pair pair;
	int round;

	turns_open(&pair, 65536);
	for (round = 0; round < 1000; round++) {
		CHECK(send_one(&pair.a, 0) == -EPERM);
		CHECK(send_one(&pair.b, 0) >= 0);
		/* It is nobody's as long as it is on its way. */
		expect_turn(&pair, NULL);
		CHECK(send_one(&pair.b, 0) == -EPERM);
		CHECK(send_one(&pair.a, 0) == -EPERM);
		receive_one(&pair.a, 0);
		expect_turn(&pair, &pair.a);
		CHECK(send_one(&pair.a, KUCOMMS_FLAG_TOKEN) >= 0);
		receive_one(&pair.b, KUCOMMS_FLAG_TOKEN);
	}
	/* Also one that is copied without the lock, and one that is borrowed. */
	CHECK(kucomms_channel_send(&pair.b, large, sizeof(large), 0, 1, 2,
				   3) >= 0);
	expect_turn(&pair, NULL);
	CHECK(kucomms_channel_send(&pair.b, large, sizeof(large), 0, 1, 2,
				   3) == -EPERM);
	CHECK(!kucomms_channel_peek(&pair.a, &view));
	kucomms_channel_borrow(&pair.a, &view, &pin);
	expect_turn(&pair, &pair.a);
	/* A loan takes the turn, and gives it back when it is dropped. */
	CHECK(!kucomms_channel_reserve(&pair.a, 8, &frame, NULL));
	expect_turn(&pair, NULL);
	CHECK(kucomms_channel_reserve(&pair.a, 8, &frame, NULL) == -EPERM);
	kucomms_channel_discard(&pair.a, frame, 8);
	expect_turn(&pair, &pair.a);
	CHECK(!kucomms_channel_reserve(&pair.a, 8, &frame, NULL));
	kucomms_ring_commit(frame, 8, 0);
	expect_turn(&pair, NULL);
	CHECK(!kucomms_channel_peek(&pair.b, &view) && view.length == 8);
	kucomms_channel_advance(&pair.b, &view);
	expect_turn(&pair, &pair.b);
	kucomms_channel_unpin_rx(&pin);
	CHECK(!pair.a.protocol_errors && !pair.b.protocol_errors);
	pair_close(&pair);
}

/* No room, or never: the turn stays. */
static void test_turn_when_full(void)
{
	static unsigned char data[65536];
	struct kucomms_view view;
	struct kucomms_pin pin;
	struct pair pair;

	turns_open(&pair, 0);
	CHECK(kucomms_channel_send(&pair.b, data, (uint32_t)pair.size, 0, 0, 0,
				   0) == -EMSGSIZE);
	expect_turn(&pair, &pair.b);
	CHECK(kucomms_channel_send(&pair.b, data, (uint32_t)pair.size - 64, 0,
				   0, 0, 0) >= 0);
	CHECK(!kucomms_channel_peek(&pair.a, &view));
	kucomms_channel_borrow(&pair.a, &view, &pin);
	CHECK(send_one(&pair.a, KUCOMMS_FLAG_TOKEN) >= 0);
	receive_one(&pair.b, KUCOMMS_FLAG_TOKEN);
	CHECK(send_one(&pair.b, 0) == -EAGAIN);
	expect_turn(&pair, &pair.b);
	kucomms_channel_unpin_rx(&pin);
	kucomms_channel_release(&pair.a);
	CHECK(send_one(&pair.b, 0) >= 0);
	receive_one(&pair.a, 0);
	pair_close(&pair);
}

/* Who takes the turn at a look has it once, however often he looks. */
static void test_turn_at_a_look(void)
{
	struct kucomms_view view;
	struct pair pair;

	turns_open(&pair, 0);
	CHECK(send_one(&pair.b, 0) >= 0);
	CHECK(!kucomms_channel_peek(&pair.a, &view));
	kucomms_channel_take_turn(&pair.a);
	CHECK(!kucomms_channel_peek(&pair.a, &view));
	expect_turn(&pair, &pair.a);
	CHECK(send_one(&pair.a, 0) >= 0);
	CHECK(!kucomms_channel_peek(&pair.a, &view));
	kucomms_channel_take_turn(&pair.a);
	expect_turn(&pair, NULL);
	/* The answer is there, and the message that it answers still is. */
	receive_one(&pair.b, 0);
	CHECK(send_one(&pair.b, 0) >= 0);
	CHECK(!kucomms_channel_peek(&pair.a, &view));
	kucomms_channel_advance(&pair.a, &view);
	expect_turn(&pair, NULL);
	receive_one(&pair.a, 0);
	pair_close(&pair);
}

static void test_hostile_turns(void)
{
	struct kucomms_view view;
	struct pair pair;

	/* A peer that does as if it knew nothing of turns sends twice. */
	turns_open(&pair, 0);
	pair.b.turn = KUCOMMS_TURN_ANY;
	CHECK(send_one(&pair.b, 0) >= 0 && send_one(&pair.b, 0) >= 0);
	receive_one(&pair.a, 0);
	CHECK(kucomms_channel_peek(&pair.a, &view) == -EPROTO);
	pair_close(&pair);

	/* It sends first, though we begin. */
	turns_open(&pair, 0);
	pair.a.turn = KUCOMMS_TURN_ANY;
	CHECK(send_one(&pair.a, 0) >= 0);
	CHECK(kucomms_channel_peek(&pair.b, &view) == -EPROTO);
	pair_close(&pair);

	/* Tokens with data, as replies, and where there are no turns. */
	turns_open(&pair, 0);
	CHECK(kucomms_channel_send(&pair.b, "x", 1, KUCOMMS_FLAG_TOKEN, 0, 0,
				   0) >= 0);
	CHECK(kucomms_channel_peek(&pair.a, &view) == -EPROTO);
	pair_close(&pair);
	turns_open(&pair, 0);
	CHECK(send_one(&pair.b, KUCOMMS_FLAG_TOKEN | KUCOMMS_FLAG_REPLY) >= 0);
	CHECK(kucomms_channel_peek(&pair.a, &view) == -EPROTO);
	pair_close(&pair);
	pair_open(&pair, 0);
	CHECK(!kucomms_channel_has_turns(&pair.a));
	CHECK(kucomms_channel_has_turn(&pair.a));
	CHECK(send_one(&pair.b, KUCOMMS_FLAG_TOKEN) >= 0);
	CHECK(kucomms_channel_peek(&pair.a, &view) == -EPROTO);
	CHECK(pair.a.protocol_errors == 1);
	pair_close(&pair);
}

/* ---- set-up ------------------------------------------------------------------ */

static void test_geometry(void)
{
	static const size_t words = sizeof(struct kucomms_geometry) / 8;
	struct kucomms_geometry good, bad;
	uint64_t word;
	size_t i;
	int bit;

	kucomms_geometry_fill(&good, 1, 8192, 0);
	CHECK(!kucomms_geometry_check(&good, 1, 8192, 0));
	CHECK(kucomms_geometry_check(&good, 0, 8192, 0) == -EPROTO);
	CHECK(kucomms_geometry_check(&good, 1, 4096, 0) == -EPROTO);
	bad = good;
	bad.magic++;
	CHECK(kucomms_geometry_check(&bad, 1, 8192, 0) == -EPROTO);
	bad = good;
	bad.version++;
	CHECK(kucomms_geometry_check(&bad, 1, 8192, 0) == -EPROTONOSUPPORT);
	bad = good;
	bad.features = 1ULL << 40;
	CHECK(kucomms_geometry_check(&bad, 1, 8192, 0) == -EPROTONOSUPPORT);
	/* What we know, and what was not agreed on. */
	CHECK(kucomms_geometry_check(&good, 1, 8192, KUCOMMS_FEATURE_TURNS) ==
	      -EPROTO);
	bad.features = KUCOMMS_FEATURE_TURNS;
	CHECK(kucomms_geometry_check(&bad, 1, 8192, 0) == -EPROTO);
	CHECK(!kucomms_geometry_check(&bad, 1, 8192, KUCOMMS_FEATURE_TURNS));
	/* Each bit of it counts. */
	for (i = 0; i < words; i++) {
		for (bit = 0; bit < 64; bit++) {
			bad = good;
			memcpy(&word, (char *)&bad + 8 * i, 8);
			word ^= 1ULL << bit;
			memcpy((char *)&bad + 8 * i, &word, 8);
			CHECK(kucomms_geometry_check(&bad, 1, 8192, 0));
		}
	}
}

static void test_attach_refused(void)
{
	struct kucomms_channel channel;
	uint64_t page = kucomms_page_size();
	uint64_t side = kucomms_side_size(page);
	int fd;

	fd = memfd_create("ring_test", MFD_CLOEXEC);
	CHECK(fd >= 0);
	CHECK(!ftruncate(fd, (off_t)(2 * side)));
	CHECK(!kucomms_channel_init(&channel, 0, page, 0, fd, 0));
	/* The other side has not written anything yet. */
	CHECK(kucomms_channel_attach(&channel, fd, side) == -EPROTO);
	/* Our own pages are not the other side's. */
	CHECK(kucomms_channel_attach(&channel, fd, 0) == -EPROTO);
	CHECK(!channel.side[1].control && !channel.side[1].data);
	CHECK(kucomms_channel_attach(&channel, -1, side) == -EBADF);
	kucomms_channel_destroy(&channel);
	CHECK(kucomms_channel_init(&channel, 0, page, 0, -1, 0) == -EBADF);
	close(fd);
}

/* The peer's pages can be read only. */
static void test_protection(void)
{
	struct pair pair;
	FILE *maps;
	char line[256];
	unsigned long begin, end;
	char rights[5];
	int found = 0;

	pair_open(&pair, 0);
	maps = fopen("/proc/self/maps", "r");
	CHECK(maps);
	while (fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx %4s", &begin, &end, rights) != 3)
			continue;
		if ((unsigned long)pair.a.side[1].control >= begin &&
		    (unsigned long)pair.a.side[1].control < end) {
			CHECK(!strcmp(rights, "r--s"));
			found++;
		}
		if ((unsigned long)pair.a.side[1].data >= begin &&
		    (unsigned long)pair.a.side[1].data < end) {
			CHECK(!strcmp(rights, "r--s"));
			found++;
		}
	}
	fclose(maps);
	CHECK(found == 2);
	pair_close(&pair);
}

static const struct {
	const char *name;
	void (*run)(void);
} tests[] = {
	{ "arithmetic", test_arithmetic },
	{ "sizes", test_sizes },
	{ "header", test_header },
	{ "both_directions", test_both_directions },
	{ "full", test_full },
	{ "wrap", test_wrap },
	{ "double_mapping", test_double_mapping },
	{ "position_overflow", test_position_overflow },
	{ "busy_front", test_busy_front },
	{ "discard", test_discard },
	{ "many_discarded", test_many_discarded },
	{ "consumer_beyond_a_loan", test_consumer_beyond_a_loan },
	{ "room_behind_a_loan", test_room_behind_a_loan },
	{ "many_held", test_many_held },
	{ "final", test_final },
	{ "state", test_state },
	{ "borrow", test_borrow },
	{ "borrow_blocks_release", test_borrow_blocks_release },
	{ "loan_pins", test_loan_pins },
	{ "loan_out", test_loan_out },
	{ "data_epoch", test_data_epoch },
	{ "space_epoch", test_space_epoch },
	{ "lazy_release", test_lazy_release },
	{ "publish", test_publish },
	{ "buffers", test_buffers },
	{ "starves", test_starves },
	{ "poll", test_poll },
	{ "hostile_producer_position", test_hostile_producer_position },
	{ "hostile_producer_overrun", test_hostile_producer_overrun },
	{ "hostile_frame", test_hostile_frame },
	{ "hostile_frame_at_end", test_hostile_frame_at_end },
	{ "hostile_final", test_hostile_final },
	{ "hostile_after_the_end", test_hostile_after_the_end },
	{ "hostile_consumer", test_hostile_consumer },
	{ "consumer_passes_pinned_loan", test_consumer_passes_pinned_loan },
	{ "turns", test_turns },
	{ "turn_when_full", test_turn_when_full },
	{ "turn_at_a_look", test_turn_at_a_look },
	{ "hostile_turns", test_hostile_turns },
	{ "geometry", test_geometry },
	{ "attach_refused", test_attach_refused },
	{ "protection", test_protection },
};

int main(void)
{
	size_t i;

	for (i = 0; i < sizeof(tests) / sizeof(*tests); i++) {
		tests[i].run();
		printf("ok %s\n", tests[i].name);
	}
	return 0;
}
